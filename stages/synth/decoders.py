"""What guidance decodes ẑ0 with: the prior's own decoder, a tiny autoencoder, or a small network fitted to the decoder.

Images that are stored pass here only with ``images.decoder: tiny``. For the fitted decoder the prior draws the latents
itself; the network learns what they decode to and, since guidance needs nothing else, how a change of the image is
pulled back to the latent (Sobolev training: Czarnecki et al. 2017, equation 1).
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import Tensor, nn

from manifests.errors import DataError, FactoryError, NumericsError, UsageError, first_line
from manifests.storage import Storage
from stages.memory import in_micro_batches, retry_with_smaller_batches
from stages.models.checkpoints import read_checkpoint
from stages.models.inputs import finite, resized
from stages.models.loading import fill
from stages.models.matching import find_weights
from stages.models.teacher import Teacher
from stages.seeds import torch_rng
from stages.settings import ALGORITHM_VERSION, GuidanceSettings, SynthSettings
from stages.synth.group import prompt_for
from stages.synth.guidance import Decode, Guidance
from stages.synth.priors.diffusion import DiffusionPrior
from stages.synth.priors.files import locate_tiny_decoder
from stages.synth.priors.parts import DTYPES, frozen, load_network
from stages.synth.priors.schedule import State

log = logging.getLogger(__name__)

WIDTH, DEPTH = 32, 3
ROWS = 512  # of latent cells: 64 trajectories of 8 × 8 latents, never fewer than 16
VISITS = 4  # noise levels of each trajectory at which latents are drawn
NOISY = 2  # noisy copies of each latent: guidance moves latents off the prior's own paths
STEPS, BATCH, RATE = 700, 16, 5e-3  # at 1.2e-2 the fit to natural32 diverges
AT_ONCE = 4096  # latent cells decoded with gradients at once: one latent of Stable Diffusion
POOR = 0.5
"""Below this cosine a decoder's gradient is hardly the full decoder's: worth a warning."""


def use_tiny_decoder(prior: DiffusionPrior, settings: SynthSettings) -> None:
    """Let a tiny autoencoder decode whatever ``prior`` decodes, where ``images.decoder`` asks for it.

    Raises UsageError where the prior works on pixels, DataError as :class:`TinyDecoder`.
    """
    if settings.images.decoder == "tiny":
        prior.tiny = _tiny(prior, settings.guidance)


def _tiny(prior: DiffusionPrior, settings: GuidanceSettings) -> "TinyDecoder":
    if prior.vae is None:
        raise UsageError(f"prior {prior.folder} works on pixels: there is no decoder to replace")
    return TinyDecoder(prior, settings)


def load_decoder(
    prior: DiffusionPrior, settings: SynthSettings, teacher: Teacher, run: Storage | None = None
) -> Decode | None:
    """The decoder that ``settings`` ask for, None for the prior's own. A fitted one is shared by way of ``run``.

    Raises UsageError where a tiny one is asked for and the prior works on pixels.
    """
    kind = settings.guidance.decoder
    if kind == "tiny":
        return prior.tiny or _tiny(prior, settings.guidance)
    if kind == "full" or prior.vae is None:  # a prior of pixels is guided on its pixels
        return None
    return fitted_decoder(prior, settings, teacher, run)


def fidelity(decode: Decode, prior: DiffusionPrior, settings: SynthSettings, teacher: Teacher) -> dict[str, float]:
    """How well ``decode`` stands in for the prior's own decoder, on latents that neither was fitted to.

    ``pixel_error``: share of the pixels' variance at the teacher's size that is lost; ``gradient_cosine``: of the
    guidance gradients of both, through this teacher, mean over latents.
    """
    latents = draw_latents(prior, conditions(prior, settings, teacher.class_names, 8), 4, seed=1)
    labels = torch.arange(len(latents), device=prior.device) % teacher.num_classes
    guide = Guidance(prior, teacher, labels, settings.guidance)
    size, rule = min(teacher.input.size, prior.image_size), teacher.input.settings.resize
    (images, gradients), (full, full_gradients) = (guidance_gradient(d, latents, guide) for d in (decode, prior.decode))
    target = resized(full, size, rule)
    error = (resized(images, size, rule) - target).square().mean() / target.var()
    cosine = F.cosine_similarity(gradients.flatten(1), full_gradients.flatten(1)).mean()
    if not cosine >= POOR:  # NaN neither
        kind = settings.guidance.decoder
        log.warning("guidance.decoder=%s: its gradients have a cosine of %.2f with the full decoder's", kind, cosine)
    return {"pixel_error": round(error.item(), 4), "gradient_cosine": round(cosine.item(), 4)}


def guidance_gradient(decode: Decode, latents: Tensor, guide: Guidance) -> tuple[Tensor, Tensor]:
    """Images of ``latents`` and the (scaled) gradient of the guidance loss in them, decoded a few at a time."""
    with torch.no_grad():
        images = torch.cat([decode(latent) for latent in latents.split(1)])
    with torch.enable_grad():
        losses = guide.terms(images.requires_grad_(), torch.Generator())
        (cotangents,) = torch.autograd.grad(losses.total(guide.settings) * guide.loss_scale, images)
    return decode_with_vjp(decode, latents, cotangents)


class TinyDecoder:
    """An ``AutoencoderTiny`` (TAESD) in the prior's dtype: a few convolutions that imitate the prior's VAE.

    It takes latents as the denoiser knows them (scaled). Raises DataError where it is damaged or of another prior.
    """

    def __init__(self, prior: DiffusionPrior, settings: GuidanceSettings) -> None:
        self.source = locate_tiny_decoder(settings.tiny_decoder, prior.source)
        folder = self.source.folder
        self.prior, self.dtype = prior, DTYPES[prior.settings.dtype]
        try:
            loaded: Any = load_network(AutoencoderTiny, folder, self.dtype, prior.device)
        except DataError:
            raise
        except Exception as error:  # diffusers raises a dozen kinds for a damaged folder
            detail = first_line(error)
            raise DataError(f"tiny decoder {folder} cannot be loaded: {detail}") from error
        self.network = frozen(loaded, prior.device)
        channels, expected = self.network.config.latent_channels, prior.latent_shape[0]
        if channels != expected:
            raise DataError(f"tiny decoder {folder} takes {channels} channels, the prior's latents have {expected}")
        with torch.no_grad():
            side = self(torch.zeros(1, *prior.latent_shape, device=prior.device)).shape[-1]
        if side != prior.image_size:
            raise DataError(
                f"tiny decoder {folder} makes {side} pixels, the prior {prior.image_size}: not of this prior"
            )

    def __call__(self, z0: Tensor) -> Tensor:
        images: Tensor = in_micro_batches(self._decode, self.prior.batch_limit, z0.to(self.dtype)).float()
        return images

    def _decode(self, latents: Tensor) -> Tensor:
        images: Tensor = self.network.decode(latents).sample
        return images


class FittedDecoder(nn.Module):
    """Clean latents ``[n, c, h, h]`` to images ``[n, 3, size, size]``: convolutions at the latents' resolution.

    No normalization layers: an image does not depend on which others it is decoded with. ``sha256`` is of its weights.
    """

    def __init__(self, channels: int, side: int, size: int, rule: str) -> None:
        super().__init__()
        self.factor, self.size, self.rule, self.sha256 = -(-size // side), size, rule, ""
        self.first = nn.Conv2d(channels, WIDTH, 3, padding=1)
        self.middle = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(DEPTH))
        self.last = nn.Conv2d(WIDTH, 3 * self.factor**2, 3, padding=1)

    def forward(self, z0: Tensor) -> Tensor:
        x = self.first(z0)
        for convolution in self.middle:
            x = x + convolution(F.silu(x))
        return resized(F.pixel_shuffle(self.last(F.silu(x)), self.factor), self.size, self.rule)


def trajectories(side: int) -> int:
    """How many the prior draws for a fit, at ``VISITS`` noise levels each, where its latents have ``side`` cells."""
    return max(16, ROWS // side)


def conditions(prior: DiffusionPrior, settings: SynthSettings, class_names: Sequence[str], count: int) -> list[str]:
    """``count`` conditions as the run will use them, its classes evenly spread; the run's seed plays no part."""
    names = [class_names[i * len(class_names) // count] for i in range(count)]
    prompts = [prompt_for(settings.prompts, name, 0, i) for i, name in enumerate(names)]
    return names if prior.conditioning == "class" else prompts


def visited(prior: DiffusionPrior, visit: int, visits: int) -> int:
    """The denoising step whose noise level is number ``visit`` of ``visits``, from the first step to the last."""
    return visit * (len(prior.timesteps) - 1) // max(1, visits - 1)


@torch.no_grad()
def draw_latents(prior: DiffusionPrior, prompts: Sequence[str], visits: int, seed: int) -> Tensor:
    """Clean latents ``[visits · n, c, h, w]`` that the prior predicts for ``n`` conditions, without guidance.

    From pure noise to almost none in ``visits`` steps with fresh noise between them (DDIM with η = 1), whatever the
    prior's scheduler: each visited noise level yields latents as guidance meets them there.
    """
    condition = prior.encode(prompts)
    latents: list[Tensor] = []
    for visit in range(visits):
        step = visited(prior, visit, visits)
        noise = torch.randn(len(prompts), *prior.latent_shape, generator=torch_rng(seed, "decoder", visit))
        noise = noise.to(prior.device)
        alpha, sigma = prior.levels(step)
        state = State(alpha * latents[-1] + sigma * noise, step) if latents else prior.start(noise)
        latents.append(prior.predict(state, condition).z0)
    return torch.cat(latents)


def decode_with_vjp(decode: Decode, latents: Tensor, cotangents: Tensor) -> tuple[Tensor, Tensor]:
    """Images x = D(z) of ``latents [n, c, h, w]`` and vᵀ ∂D/∂z for ``cotangents`` v, shaped as the images."""
    images, gradients = [], []
    count = max(1, AT_ONCE // latents[0, 0].numel())
    for part, v in zip(latents.split(count), cotangents.split(count), strict=True):
        with torch.enable_grad():
            z = part.detach().requires_grad_()
            x = decode(z)
            (vjp,) = torch.autograd.grad(x, z, v)
        images.append(x.detach())
        gradients.append(vjp)
    return torch.cat(images), torch.cat(gradients)


@torch.enable_grad()
def sobolev_loss(
    net: nn.Module,
    latents: Tensor,
    cotangents: Tensor,
    images: Tensor,
    gradients: Tensor,
    scale: float | Tensor = 1.0,
    slope: float | Tensor = 1.0,
) -> Tensor:
    """‖f(z) − x‖² / scale + ‖vᵀ ∂f/∂z − g‖² / slope, means over all elements: a scalar.

    f: ``net``; z: ``latents``; v: ``cotangents``; x and g: what :func:`decode_with_vjp` makes of z and v.
    """
    z = latents.detach().requires_grad_()
    x = net(z)
    (vjp,) = torch.autograd.grad(x, z, cotangents, create_graph=True)
    return F.mse_loss(x, images) / scale + F.mse_loss(vjp, gradients) / slope


def fit(prior: DiffusionPrior, prompts: Sequence[str], size: int, rule: str) -> FittedDecoder:
    """A decoder of ``size`` pixels (shrunk by ``rule``), a pure function of the arguments up to hardware and threads.

    Raises DataError where the prior's own decoder gives NaN, NumericsError where the fit diverges.
    """
    channels, side, _ = prior.latent_shape
    latents = draw_latents(prior, prompts, VISITS, seed=0)
    rng = torch_rng(0, "decoder", "fit")
    copies = latents.repeat(NOISY, 1, 1, 1)
    noise = torch.rand(len(copies), 1, 1, 1, generator=rng) * torch.randn(copies.shape, generator=rng)
    latents = torch.cat([latents, copies + noise.to(prior.device)])
    cotangents = torch.randn(len(latents), 3, size, size, generator=rng).to(prior.device)
    images, gradients = decode_with_vjp(lambda z0: resized(prior.decode(z0), size, rule), latents, cotangents)
    if not (images.isfinite().all() and gradients.isfinite().all()):
        raise DataError(f"prior {prior.folder} decodes to NaN, so no decoder can be fitted to it; try prior.dtype=fp32")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = FittedDecoder(channels, side, size, rule)
    net.to(prior.device)
    optimizer = torch.optim.Adam(net.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS)
    scale, slope = images.var(), gradients.square().mean()
    for _ in range(STEPS):
        chosen = torch.randint(len(latents), (BATCH,), generator=rng).to(prior.device)
        optimizer.zero_grad()
        batch = latents[chosen], cotangents[chosen], images[chosen], gradients[chosen]
        sobolev_loss(net, *batch, scale, slope).backward()
        optimizer.step()
        schedule.step()
    if not finite(net):
        raise NumericsError(f"the decoder fitted to prior {prior.folder} is not finite; set guidance.decoder=full")
    return net


def fit_in_memory(prior: DiffusionPrior, prompts: Sequence[str], size: int, rule: str) -> FittedDecoder:
    """:func:`fit`; the prior sees fewer latents at once where they do not fit the memory.

    Raises FactoryError where one is too many.
    """

    def limit(count: int) -> None:
        prior.batch_limit = count

    return retry_with_smaller_batches(
        lambda: fit(prior, prompts, size, rule),
        len(prompts),
        limit,
        f"prior {prior.folder}: the gradients of its decoder, to which guidance fits one, do not fit the memory",
        "set guidance.decoder=tiny, or free memory",
    )


def fitted_decoder(
    prior: DiffusionPrior, settings: SynthSettings, teacher: Teacher, run: Storage | None
) -> FittedDecoder:
    """The decoder for this prior and what the teacher sees of it: from the folder of the ``run``, else from this
    machine's cache, else fitted.

    The first worker to finish leaves its weights in the run's folder; every worker, on any machine and device, takes
    those. The cache also tells devices and threads apart, on which the weights depend: a run that begins on this
    machine is a function of its settings. On the device ``meta`` it has shapes and no weights. Raises DataError for
    damaged weights.
    """
    channels, side, _ = prior.latent_shape
    size, rule = min(teacher.input.size, prior.image_size), teacher.input.settings.resize
    with torch.device(prior.device):
        net = FittedDecoder(channels, side, size, rule).requires_grad_(False)
    if prior.device == "meta":
        return net
    prompts = conditions(prior, settings, teacher.class_names, trajectories(side))
    identity = {
        "version": ALGORITHM_VERSION,
        "prior": [prior.source.sha256, settings.prior.model_dump(mode="json", exclude={"path"})],
        "conditions": prompts,
        "images": [size, rule],
    }
    machine = {"machine": [torch.get_num_threads(), prior.device.split(":")[0]]}
    shared, local = file_name(identity), file_name(identity | machine)

    def make() -> bytes:
        log.warning("guidance fits a decoder of %d pixels to this prior, once: later runs find it", size)
        state = fit_in_memory(prior, prompts, size, rule).state_dict()
        return safetensors.torch.save({name: weight.cpu() for name, weight in state.items()})

    def load(data: bytes, where: str) -> None:
        fill(net, find_weights(read_checkpoint({where: data}, where), net).state)
        if not finite(net):
            raise DataError(f"{where} holds weights that are not finite")

    cache = Storage(cache_folder())
    if run is None:
        data, where = cached(cache, local, make, load), cache.path(local)
    else:
        data, where = published(run, shared, lambda: cached(cache, local, make, load)), run.path(shared)
    load(data, where)
    net.sha256 = hashlib.sha256(data).hexdigest()
    return net


def file_name(identity: dict[str, Any]) -> str:
    return f"decoder/{hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]}.safetensors"


def published(run: Storage, name: str, make: Callable[[], bytes]) -> bytes:
    """The file ``name`` of the run's folder, else what ``make`` returns, left there.

    Who comes first decides: its bytes are what everybody gets, also those who made their own meanwhile.
    """
    if not run.exists(name):
        run.create(name, make())
    return run.read(name)


def cached(cache: Storage, name: str, make: Callable[[], bytes], check: Callable[[bytes, str], None]) -> bytes:
    """The file ``name`` of the cache, else what ``make`` returns, left there where that is possible. A file that
    ``check(data, where)`` refuses with a DataError is made again, with a line."""
    if cache.exists(name):
        try:
            data = cache.read(name)
            check(data, cache.path(name))
            return data
        except DataError as error:
            log.warning("%s: dropped, a decoder is fitted again", error)
            with suppress(FactoryError):
                cache.delete(name)
    data = make()
    try:
        cache.create(name, data)
    except FactoryError as error:
        log.warning("the fitted decoder is not kept for the next run: %s", error)
    return data


def cache_folder() -> str:
    """``FACTORY_CACHE``, else ``dfkd-factory`` in the user's cache folder (``XDG_CACHE_HOME``, ``~/.cache``)."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.environ.get("FACTORY_CACHE") or os.path.join(home, "dfkd-factory")
