"""What the kinds of priors share: a denoising network, an optional VAE, a schedule, classifier-free guidance."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from manifests.errors import DataError
from stages.memory import in_micro_batches
from stages.settings import PriorSettings
from stages.synth.priors.files import PriorSource, class_of, loading
from stages.synth.priors.lora import merge_lora
from stages.synth.priors.parts import DTYPES, frozen, load_network, load_whole, quiet
from stages.synth.priors.schedule import Prediction, Schedule, State, parameters_of, printable_line, scheduler_class

log = logging.getLogger(__name__)


class DiffusionPrior(ABC):
    """A pre-trained diffusion model from a diffusers folder and the schedule it is sampled with: everything but loading
    and conditioning, which the kinds of priors add.

    Latents are ``[n, *latent_shape]``, images ``[n, 3, image_size, image_size]`` in [−1, 1]. ``timesteps`` is the
    schedule, noisiest first; ``conditioning`` is "text", "class", "image" or "none". On the device ``meta`` it has
    shapes and no weights: for counting. Raises :class:`DataError` where a component is missing, damaged or of a kind
    that cannot be guided.
    """

    encoders: Sequence[Any] = ()  # of prompts, and of images
    batch_limit: int | None = None  # most trajectories that a network sees at once
    tiny: Callable[[Tensor], Tensor] | None = None  # decodes in place of the VAE

    @quiet()
    def __init__(self, source: PriorSource, settings: PriorSettings, device: str) -> None:
        self.source, self.settings, self.device = source, settings, device
        self.parts: dict[str, Any] = {}  # networks by their names in the pipeline
        self.folder, self.index, self.conditioning = source.folder, source.index, source.family.conditioning
        shape, folder = source.geometry, source.folder
        self.latent_shape, self.image_size, self.classes = shape.latent, shape.image_size, shape.classes
        config = source.scheduler
        if source.family.mended and "steps_offset" in parameters_of(scheduler_class(config)):
            config = config | {"steps_offset": 1}  # as the pipeline of diffusers sets it
        self.schedule = Schedule(config, settings, str(folder))
        self.timesteps, self.stochastic = self.schedule.timesteps, self.schedule.stochastic
        self.times = torch.tensor(self.schedule.times, device=device)  # a number would be copied there at every step
        try:
            self.network, self.vae = self.load()
            self.latent_mean, self.latent_std = self.latent_statistics()
        except DataError:
            raise
        except Exception as error:  # diffusers raises a dozen kinds for a damaged folder
            raise DataError(f"prior {folder} cannot be loaded: {printable_line(error)}") from error
        if device != "meta":
            for file, weight in source.loras:
                merge_lora(file, weight, self.parts)
        networks = [frozen(network, device) for network in (self.network, self.vae) if network is not None]
        self.attention = use_attention(networks, settings.attention, device)
        if settings.compile:
            self.network.compile()

    @abstractmethod
    def load(self) -> tuple[Any, Any]:
        """The denoising network and the VAE (None: the network sees pixels)."""

    @abstractmethod
    def encode(self, conditions: Sequence[str]) -> Any:
        """The network's condition for ``n`` prompts, or class names of the teacher for a class-conditional prior; where
        CFG is on, the unconditional half comes first."""

    @abstractmethod
    def evaluate(self, latents: Tensor, time: Tensor, condition: Any) -> Tensor:
        """The network's raw output for latents in its own dtype; ``time`` is a scalar on the device."""

    def part(self, name: str, *classes: type) -> Any:
        """Network ``name`` of the folder, if ``model_index.json`` gives it one of the diffusers ``classes``."""
        place, kind, config = self.source.part(name), class_of(self.index, name), self.source.config(name)
        if kind == "Transformer2DModel":  # an earlier class, of which diffusers makes others by their normalization
            norm = config.get("norm_type")
            kind = "DiTTransformer2DModel" if norm == "ada_norm_zero" else f"{kind} with norm_type {norm!r}"
        by_name = {cls.__name__: cls for cls in classes}
        if kind not in by_name:
            raise DataError(f"prior {self.folder}: {name} is a {kind}, expected {' or '.join(by_name)}")
        how = {} if self.device == "meta" else loading(place, self.settings.variant)  # shapes come without weights
        self.parts[name] = load_network(by_name[kind], place, DTYPES[self.settings.dtype], self.device, **how)
        return self.parts[name]

    def encoder(self, name: str, kind: Any) -> Any:
        """Transformers encoder ``name`` of the folder, frozen.

        Raises DataError for another model type than that of ``kind``; another class of the same type is logged.
        """
        dtype, place = DTYPES[self.settings.dtype], self.source.part(name)
        self.check_type(name, kind)
        if self.device == "meta":
            config = kind.config_class.from_pretrained(str(place), local_files_only=True)
            with torch.device("meta"):
                return frozen(kind(config).to(dtype), self.device)
        how = loading(place, self.settings.variant)
        self.parts[name] = frozen(load_whole(kind, place, dtype=dtype, local_files_only=True, **how), self.device)
        return self.parts[name]

    def check_type(self, name: str, kind: Any) -> None:
        """Compare what ``model_index.json`` and the encoder's ``config.json`` say with the class that is loaded."""
        place, type_ = self.source.part(name), kind.config_class
        config = self.source.config(name)
        section = config.get(type_.base_config_key)  # of a CLIPConfig the half that is loaded
        model_type = (section if isinstance(section, dict) else config).get("model_type", type_.model_type)
        if model_type != type_.model_type:
            raise DataError(
                f"{place}: config.json describes a model of type {model_type!r}, but {kind.__name__} is of type "
                f"{type_.model_type!r}"
            )
        classes = config.get("architectures")
        named = [class_of(self.index, name), *(classes if isinstance(classes, list) else [])]
        if others := sorted({repr(other)[1:-1] for other in named if other not in (None, kind.__name__)}):
            log.warning("%s is a %s by its configuration, loaded as %s", place, " or ".join(others), kind.__name__)

    def tokens(self, name: str, kind: Any) -> Any:
        """Tokenizer ``name`` of the folder."""
        return kind.from_pretrained(str(self.source.part(name)), local_files_only=True)

    def start(self, noise: Tensor) -> State:
        """Unit noise ``[n, *latent_shape]`` as the state before step 0."""
        return self.schedule.start(noise)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Images ``[n, 3, h, w]`` in [−1, 1], resized to ``image_size``, to clean latents: :meth:`decode`'s inverse, as
        near as the VAE gets."""
        side = self.image_size
        if images.shape[-1] != side:
            size = (side, side)
            images = F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False)
        images = images.clamp(-1, 1)
        if self.vae is None:
            return images if self.latent_shape[0] == 3 else images.mean(1, keepdim=True)
        latents: Tensor = in_micro_batches(self._encode, self.batch_limit, images.to(self.vae.dtype)).float()
        return (latents - self.latent_mean) / self.latent_std * self.vae.config.scaling_factor

    def _encode(self, images: Tensor) -> Tensor:
        slices = images.split(1) if self.settings.vae_slicing else (images,)
        encoded = [self.vae.encode(part)[0] for part in slices]  # latents, or a normal distribution of them
        return torch.cat([e if isinstance(e, Tensor) else e.mode() for e in encoded])

    def noised(self, z0: Tensor, noise: Tensor, step: int) -> State:
        """The state before denoising step ``step`` of clean latents ``z0``."""
        return self.schedule.noised(z0, noise, step)

    def levels(self, step: int) -> tuple[float, float]:
        """(α, σ) of the step: z = α·z0 + σ·eps."""
        return self.schedule.levels[step]

    def predict(self, state: State, condition: Any) -> Prediction:
        """One evaluation of the network. Differentiable in ``state.z`` where gradients are enabled."""
        z, scale = self.schedule.network_input(state), self.settings.cfg_at(state.step) if self.two_halves else 1.0
        if scale == 1 and self.two_halves:
            condition = condition[len(z) :]  # outside the interval: the conditional half alone
        batch = z if scale == 1 else torch.cat([z, z])
        limit = self.batch_limit and self.batch_limit * (len(batch) // len(z))

        def evaluate(latents: Tensor, condition: Any) -> Tensor:
            return self.evaluate(latents, self.times[state.step], condition)

        output: Tensor = in_micro_batches(evaluate, limit, batch.to(self.network.dtype), condition).float()
        output = output[:, : z.shape[1]]  # the other half of a learned-sigma network is a variance
        if scale != 1:  # equation 3, with the scale counted from the unconditional prediction
            negative, positive = output.chunk(2)
            output = negative + scale * (positive - negative)
        return self.schedule.prediction(state, output)

    def move(self, state: Prediction, delta: Tensor) -> Prediction:
        """Shift ẑ0 by ``delta`` and keep eps."""
        return self.schedule.move(state, delta)

    def step(self, state: Prediction, rngs: Sequence[torch.Generator] | None = None) -> State:
        """One step of the scheduler; a ``stochastic`` one draws from ``rngs``, one generator per trajectory."""
        return self.schedule.step(state, rngs)

    @property
    def two_halves(self) -> bool:
        """Whether conditions come with their unconditional half: not where the network takes the scale of
        classifier-free guidance as an input (LCM, equation 13), for which one evaluation is enough."""
        return self.settings.cfg_scale != 1 and not getattr(self.network.config, "time_cond_proj_dim", None)

    def latent_statistics(self) -> tuple[Any, Any]:
        """Mean and standard deviation by which the pipeline normalizes the VAE's latents before scaling: numbers, or
        ``[1, c, 1, 1]``. Most use neither, whatever the VAE's configuration holds."""
        return 0.0, 1.0

    def decode(self, z0: Tensor) -> Tensor:
        """Clean latents to images (not clamped). Differentiable."""
        if self.tiny is not None:
            return self.tiny(z0)
        if self.vae is None:
            return z0.expand(-1, 3, -1, -1)  # gray becomes RGB
        latents = (z0 * self.latent_std / self.vae.config.scaling_factor + self.latent_mean).to(self.vae.dtype)
        images: Tensor = in_micro_batches(self._decode, self.batch_limit, latents).float()
        return images

    def _decode(self, latents: Tensor) -> Tensor:
        slices = latents.split(1) if self.settings.vae_slicing else (latents,)
        return torch.cat([self.vae.decode(part).sample for part in slices])


def xformers_works(device: str) -> str | None:
    """None if xformers runs a tiny attention on ``device``, else the reason. Importing it proves nothing:
    wheels built for another torch import, but hold no kernel that loads."""
    try:
        import xformers.ops

        q = torch.zeros(1, 16, 1, 16, device=device, dtype=torch.float16)
        xformers.ops.memory_efficient_attention(q, q, q)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def use_attention(networks: Iterable[Any], choice: str, device: str) -> str:
    """Switch ``networks`` to ``choice`` (``auto | sdpa | xformers``); returns the one in use, ``sdpa`` or ``xformers``.

    ``auto`` takes PyTorch's, whose way back has deterministic kernels; asking for xformers where it does not work costs
    one line, not the run.
    """
    if choice != "xformers":
        return "sdpa"  # diffusers' default processors call SDPA already
    reason = xformers_works(device)
    if reason is None:
        for network in networks:
            network.enable_xformers_memory_efficient_attention()
        return "xformers"
    log.warning("xformers does not work here (%s); using PyTorch's attention instead", reason)
    return "sdpa"
