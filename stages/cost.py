"""What both stages cost without doing it: FLOPs and memory of the real code, counted on meta tensors (dry runs)."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from manifests.errors import UsageError
from stages.distill.batches import Batch
from stages.distill.losses import paired_layers, student_terms, teacher_targets, weighted
from stages.distill.run import student_config
from stages.models import build
from stages.models.build import blank_teacher
from stages.models.inputs import InputSpec
from stages.models.source import resolve
from stages.models.teacher import Teacher
from stages.settings import DistillSettings, GuidanceSettings, LossSettings, SynthSettings
from stages.synth import decoders
from stages.synth.cmi import cmi
from stages.synth.decoders import FittedDecoder, decode_with_vjp, load_decoder, sobolev_loss, trajectories, visited
from stages.synth.group import make_group
from stages.synth.guidance import Guidance
from stages.synth.inversion import deepinversion
from stages.synth.priors.diffusion import DiffusionPrior
from stages.synth.priors.kinds import load_prior
from stages.synth.priors.schedule import Prediction, State, VariationPrior
from stages.synth.sampler import Counters, Models

# Count work without doing it: FLOPs and saved activations of any call on meta tensors, which have shapes and no data.
#
# Used by ``--dry-run`` of both stages and by ``benchmarks/counted_work.py``. A multiplication and an addition are two
# FLOPs; convolutions, matrix products and attention are counted, what works element by element is not.


META = torch.device("meta")


class Flops(TorchDispatchMode):
    """``total`` of everything that runs within, by PyTorch's own formulas.

    (Its ``FlopCounterMode`` also hooks every module, which ``autograd.grad`` up to a leaf does not survive.)
    """

    total = 0

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += int(formula(*args, **(kwargs or {}), out_val=out))
        return out


class FusedAttention(TorchFunctionMode):
    """Attention as fused kernels compute it. On meta tensors PyTorch itself would take the naive way, in float32 and
    with every attention map saved, which runs on no device."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = args[:3]
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]


def flops(call: Callable[[], object]) -> int:
    """FLOPs of ``call``, backward passes included."""
    with FusedAttention(), Flops() as counter:
        call()
    return counter.total


def saved_bytes(call: Callable[[], object], networks: Iterable[nn.Module | None]) -> int:
    """Bytes that autograd keeps for the backward passes of ``call``: each storage once, no weights of ``networks``."""
    own = {_storage(tensor) for tensor in _tensors(networks)}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in own:
            kept.setdefault(_storage(tensor), tensor)  # held, so that no later storage takes its address
        return tensor

    with FusedAttention(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def weight_bytes(*networks: nn.Module | None) -> int:
    """Bytes of parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(networks))


def _tensors(networks: Iterable[nn.Module | None]) -> Iterable[Tensor]:
    for network in networks:
        if network is not None:
            yield from network.parameters()
            yield from network.buffers()


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


# Synthesis. One step of each kind (with CFG or without, guided or not) is run by the code that samples, for one
# trajectory; steps of a kind cost the same, and so does every trajectory. Text encoders (one pass per distinct prompt)
# are not counted.


Through = Literal["x0", "xt"]


@dataclass(frozen=True)
class SynthCost:
    """FLOPs of one trajectory by what they are spent on, and bytes: of all weights, and of what one trajectory's guided
    step (or one image's inversion) saves for its backward pass.

    ``stored``: the VAE's work on images that are stored; ``score``: the teacher's look at them. ``fit``: FLOPs of
    fitting guidance's decoder, no part of a trajectory's: once, unless an earlier run left one.
    """

    denoiser: int = 0
    guidance_decoder: int = 0
    guidance_teacher: int = 0
    inversion: int = 0
    stored: int = 0
    score: int = 0
    fit: int = 0
    weights: int = 0
    saved: int = 0

    @property
    def flops(self) -> int:
        guidance = self.guidance_decoder + self.guidance_teacher
        return self.denoiser + guidance + self.inversion + self.stored + self.score


class Meter:
    """Prior, teacher and adversary of ``settings`` as shapes, and one trajectory to try them on."""

    def __init__(self, settings: SynthSettings) -> None:
        self.settings = settings
        names = resolve(settings.teacher).config.class_names
        shapes = settings.prior.labeled(names).model_copy(update={"attention": "sdpa", "compile": False})
        prior = load_prior(shapes, "meta")
        assert isinstance(prior, DiffusionPrior)
        self.prior, self.teacher = prior, blank_teacher(settings.teacher)
        self.decoder = load_decoder(prior, settings, self.teacher) if settings.guides and self.teacher else None
        self.adversary = blank_teacher(settings.adversary) if settings.adversary else None
        group = make_group(settings, 0, names)
        self.condition = prior.encode(group.conditions(prior.conditioning)[:1])
        self.labels = torch.zeros(1, dtype=torch.long, device=META)

    @property
    def networks(self) -> list[torch.nn.Module]:
        classifiers = [teacher.net for teacher in (self.teacher, self.adversary) if teacher]
        decoder = getattr(self.decoder, "network", self.decoder)
        parts = (self.prior.network, self.prior.vae, decoder, *self.prior.encoders)
        return [part for part in parts if part is not None] + classifiers

    def predict(self, step: int, through: Through = "x0") -> Prediction:
        start = torch.empty(1, *self.prior.latent_shape, device=META, requires_grad=through == "xt")
        with torch.set_grad_enabled(through == "xt"):
            return self.prior.predict(State(start, step), self.condition)

    def guide(self, step: int, through: Through) -> None:
        """A guided step with one update, its prediction included."""
        settings = self.settings.guidance.model_copy(update={"gradient_at": through, "updates_per_step": 1})
        self.guidance(settings)(self.predict(step, through))

    def teach(self) -> None:
        """The teacher's part of a guided step, forward and back to its input."""
        images = self.images(self.prior.image_size).requires_grad_()
        losses = self.guidance(self.settings.guidance).terms(images, torch.Generator())
        torch.autograd.grad(losses.total(self.settings.guidance), images)

    def guidance(self, settings: GuidanceSettings) -> Guidance:
        if self.teacher is None:
            raise UsageError(
                f"teacher '{self.settings.teacher.name}' is a black box and cannot guide: use --method dmkd"
            )
        return Guidance(self.prior, self.teacher, self.labels, settings, adversary=self.adversary, decode=self.decoder)

    @torch.no_grad()
    def decode(self) -> None:
        self.prior.decode(torch.empty(1, *self.prior.latent_shape, device=META))

    @torch.no_grad()
    def encode(self) -> None:
        """The prior's look at an image that it makes variants of."""
        images = self.images(self.prior.image_size)
        if isinstance(self.prior, VariationPrior):
            self.prior.embed_images(images)
        else:
            self.prior.encode_images(images)

    def images(self, size: int) -> torch.Tensor:
        return torch.empty(1, 3, size, size, device=META)


def synth_cost(settings: SynthSettings) -> SynthCost | None:
    """The cost of one trajectory of ``settings``; None for ``noise``, which runs no model.

    Raises what loading prior and teacher raises; their weights are not read.
    """
    if settings.method == "noise":
        return None
    found = sampling_cost(settings) if settings.needs_prior else SynthCost()
    teacher = blank_teacher(settings.teacher)
    if settings.inverts:
        inverted, saved = inversion_cost(settings)
        found = replace(found, inversion=inverted, saved=max(saved, found.saved))
        if not settings.needs_prior:
            adversary = blank_teacher(settings.adversary) if settings.adversary else None
            found = replace(found, weights=weight_bytes(*(t.net for t in (teacher, adversary) if t)))
    return replace(found, score=settings.images_per_trajectory * score_flops(teacher))


def sampling_cost(settings: SynthSettings) -> SynthCost:
    """What denoising costs, the prior's own decoding of what is stored included."""
    meter = Meter(settings)
    guidance, times = settings.guidance, settings.dda.variants if settings.method == "dda" else 1
    denoiser = decoder = teacher = saved = 0
    for step, count, is_guided in step_kinds(settings, isinstance(meter.prior, VariationPrior)):
        predict = flops(partial(meter.predict, step))
        denoiser += times * count * predict
        if is_guided:
            teach = flops(meter.teach)
            update = flops(partial(meter.guide, step, "x0")) - predict
            decoder += times * count * guidance.updates_per_step * (update - teach)
            teacher += times * count * guidance.updates_per_step * teach
            if guidance.gradient_at == "xt":
                denoiser += times * count * (flops(partial(meter.guide, step, "xt")) - predict - update)
            saved = max(saved, saved_bytes(partial(meter.guide, step, guidance.gradient_at), meter.networks))
    encoded = flops(meter.encode) if settings.method == "dda" else 0  # the inverted image, once for all its variants
    return SynthCost(
        denoiser=denoiser,
        guidance_decoder=decoder,
        guidance_teacher=teacher,
        fit=fit_flops(meter) if isinstance(meter.decoder, FittedDecoder) else 0,
        stored=(settings.images_per_trajectory - settings.inverts) * flops(meter.decode) + encoded,
        weights=weight_bytes(*meter.networks),
        saved=saved,
    )


def fit_flops(meter: Meter) -> int:
    """What :func:`~stages.synth.decoders.fit` does, for guidance's decoder of ``meter``."""
    prior, decoder, shape = meter.prior, meter.decoder, meter.prior.latent_shape
    assert isinstance(decoder, FittedDecoder)
    drawn = trajectories(shape[1]) * decoders.VISITS
    net = FittedDecoder(shape[0], shape[1], decoder.size, decoder.rule).to(META)
    latents, images = torch.empty(1, *shape, device=META), meter.images(decoder.size)
    decode = flops(lambda: decode_with_vjp(prior.decode, latents, meter.images(prior.image_size)))
    learn = flops(lambda: sobolev_loss(net, latents, images, images, latents).backward())
    steps = [visited(prior, visit, decoders.VISITS) for visit in range(decoders.VISITS)]
    kinds = {prior.settings.cfg_at(step): step for step in steps}
    predict = {scale: flops(partial(meter.predict, step)) for scale, step in kinds.items()}
    return (
        trajectories(shape[1]) * sum(predict[prior.settings.cfg_at(step)] for step in steps)
        + drawn * (1 + decoders.NOISY) * decode
        + decoders.STEPS * decoders.BATCH * learn
    )


@torch.no_grad()
def score_flops(teacher: Teacher | None) -> int:
    """The teacher's look at one image, at its own size: resizing is not counted. A black box counts nothing."""
    if teacher is None:
        return 0
    side = teacher.input.size
    return flops(lambda: teacher.logits(torch.empty(1, 3, side, side, device=META)))


def step_kinds(settings: SynthSettings, varies: bool = False) -> Iterator[tuple[int, int, bool]]:
    """For each kind of denoising step: one such step, how many there are, whether it is guided.

    ``varies``: the prior is a :class:`~stages.synth.priors.schedule.VariationPrior`.
    """
    steps = settings.prior.steps
    begin = settings.dda.first_step(steps, varies) if settings.method == "dda" else 0
    kinds: Counter[tuple[bool, bool]] = Counter()
    first: dict[tuple[bool, bool], int] = {}
    for step in range(begin, steps):
        kind = (settings.prior.cfg_at(step) != 1, settings.guides and settings.guidance.at(step, steps))
        kinds[kind] += 1
        first.setdefault(kind, step)
    yield from ((first[kind], count, kind[1]) for kind, count in kinds.items())


# What inverting the teacher costs: counted on a few images and iterations of the real thing, with random weights.


def inversion_cost(settings: SynthSettings) -> tuple[int, int]:
    """FLOPs of one inverted image, and bytes that its iteration saves for the backward pass.

    Every iteration costs the same, and so does every image but for the contrastive products of a large bank, which are
    left out. Raises UsageError for a black box.
    """
    few = 2 * settings.cmi.batches
    steps = settings.deepinversion.steps if settings.method == "deepinversion" else settings.cmi.steps
    (one, kept), (two, _), (_, more) = (_invert(settings, n, k) for n, k in ((few, 1), (few, 2), (2 * few, 1)))
    return (one + (steps - 1) * (two - one)) // few, (more - kept) // few


def _invert(settings: SynthSettings, images: int, steps: int) -> tuple[int, int]:
    """FLOPs and saved bytes of inverting a group of ``images`` in ``steps`` iterations."""
    teacher = blank_teacher(settings.teacher, "cpu")
    if teacher is None:
        raise UsageError(f"teacher '{settings.teacher.name}' is a black box and cannot be inverted: use --method dmkd")
    adversary = blank_teacher(settings.adversary, "cpu") if settings.adversary else None
    short = {name: getattr(settings, name).model_copy(update={"steps": steps}) for name in ("cmi", "deepinversion")}
    few = settings.model_copy(update={"group_size": images, **short})
    group = make_group(few, 0, resolve(settings.teacher).config.class_names)
    method = deepinversion if settings.method == "deepinversion" else cmi
    models = Models(None, teacher, adversary, "cpu")
    with torch.random.fork_rng(devices=[]), Flops() as counter:
        kept = saved_bytes(
            lambda: list(method(models, group, few, Counters())), [t.net for t in (teacher, adversary) if t]
        )
    return counter.total, kept


TWO = 2  # images in the step that is counted: BatchNorm in training needs more than one


@dataclass(frozen=True)
class DistillCost:
    """FLOPs of one view of one image: the teacher's answer, and each student's step. Bytes of all weights (the averaged
    ones, gradients and the optimizer's memory not counted), and of what one image saves for the backward pass of the
    hungriest student, since they learn one after another."""

    teacher: int
    students: dict[str, int]
    weights: int
    saved: int


def distill_cost(settings: DistillSettings, teacher: Teacher, image_size: int) -> DistillCost:
    """The cost of ``settings`` with the blank ``teacher`` on images of ``image_size`` pixels."""
    loss, x = settings.loss, torch.empty(TWO, 3, image_size, image_size, device=META)
    whole, share = torch.zeros(TWO, dtype=torch.long, device=META), torch.ones(TWO, device=META)
    batch = Batch(x, whole, whole, share, share, np.zeros(TWO, np.int64), np.zeros(TWO, np.int64), TWO, TWO)
    costs, nets, answer, saved = {}, [], 0, 0
    for name in settings.students:
        config = student_config(name, settings, teacher)
        with torch.device("meta"):
            net = build.build_net(config, named=True)
        layers = paired_layers(loss, teacher.net, net) if loss.gradcam else ([], [])
        look = partial(teacher_targets, teacher, x, loss, layers[0])
        targets, answer = look(), flops(look)
        inputs = InputSpec(config.input)(x)
        terms = partial(student_terms, net.train(), inputs, batch, targets, loss, layers[1])
        costs[name] = flops(partial(_learn, terms, loss)) // TWO
        saved = max(saved, saved_bytes(terms, [net, teacher.net]) // TWO)
        nets.append(net)
    return DistillCost(answer // TWO, costs, weight_bytes(teacher.net, *nets), saved)


def _learn(terms: Callable[[], dict[str, Tensor]], settings: LossSettings) -> None:
    weighted(terms(), settings).backward()
