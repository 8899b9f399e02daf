"""What both stages cost without doing it: FLOPs and memory of the real code, counted on meta tensors (dry runs).

Meta tensors have shapes and no data. A multiplication and an addition are two FLOPs; convolutions, matrix products and
attention are counted, what works element by element is not.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from manifests.errors import UsageError
from stages.distill.batches import Batch
from stages.distill.losses import align_head, paired_layers, student_terms, teacher_targets, weighted
from stages.distill.run import student_config
from stages.models.build import build_net, check_runs
from stages.models.inputs import InputSpec
from stages.models.loading import untrained_teacher
from stages.models.source import ModelSource
from stages.models.teacher import Teacher
from stages.settings import DistillSettings, GuidanceSettings, LossSettings, SynthSettings
from stages.synth import decoders
from stages.synth.cmi import cmi
from stages.synth.decoders import FittedDecoder, load_decoder, sobolev_loss, trajectories, use_tiny_decoder, visited
from stages.synth.group import make_group
from stages.synth.guidance import Guidance
from stages.synth.inputs import model_sources
from stages.synth.inversion import deepinversion
from stages.synth.priors.diffusion import DiffusionPrior
from stages.synth.priors.kinds import load_prior
from stages.synth.priors.schedule import State, VariationPrior
from stages.synth.sampler import Counters, Models

META = torch.device("meta")


class Flops(TorchDispatchMode):
    """``total`` of everything that runs within, by PyTorch's own formulas.

    (Its ``FlopCounterMode`` also hooks every module, which ``autograd.grad`` up to a leaf does not survive.)
    """

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += int(formula(*args, **(kwargs or {}), out_val=out))
        return out


class FusedAttention(TorchFunctionMode):
    """Attention as fused kernels compute it. On meta tensors PyTorch itself would take the naive way, in float32 and
    with every attention map saved, which runs on no device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args[:3])[0]


def flops(call: Callable[[], object]) -> int:
    """FLOPs of ``call``, backward passes included."""
    with FusedAttention(), Flops() as counter:
        call()
    return counter.total


def saved_bytes(call: Callable[[], object], networks: Iterable[nn.Module]) -> int:
    """Bytes that autograd keeps for the backward passes of ``call``: each storage once, no weights of ``networks``."""
    weights = {_storage(tensor) for network in networks for tensor in _tensors(network)}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in weights:
            kept.setdefault(_storage(tensor), tensor)  # held, so that no later storage takes its address
        return tensor

    with FusedAttention(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def weight_bytes(*networks: nn.Module | None) -> int:
    """Bytes of parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for network in networks for tensor in _tensors(network))


def _tensors(network: nn.Module | None) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()] if network is not None else []


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def vjp_flops(function: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """FLOPs of ``function(x)`` and of its gradient with respect to ``x``."""

    def call() -> None:
        with torch.enable_grad():
            source = x.detach().requires_grad_()
            out = function(source)
            torch.autograd.grad(out, source, torch.empty_like(out))

    return flops(call)


@dataclass(frozen=True)
class SynthCost:
    """FLOPs of one trajectory by what they are spent on, in all, and of the whole run (``flop``); bytes of all weights,
    and of what a trajectory's (a group's) guided step or inversion saves for its backward pass.

    ``stored_decodes``: the VAE's work on images that are stored; ``scores``: the teacher's logits of them.
    ``fit_decoder_once``: of fitting guidance's decoder, unless an earlier run left one; in no sum. Not counted: text
    encoders, resizing, black boxes.
    """

    denoiser: int = 0
    guidance_decoder: int = 0
    guidance_teacher: int = 0
    inversion: int = 0
    stored_decodes: int = 0
    scores: int = 0
    fit_decoder_once: int = 0
    weights_bytes: int = 0
    saved_bytes_per_trajectory: int = 0
    saved_bytes_per_group: int = 0
    flop_per_trajectory: int = 0
    flop: int = 0

    @property
    def parts(self) -> dict[str, int]:
        """FLOPs of a trajectory by their names for people."""
        return {
            "denoiser": self.denoiser,
            "guidance decoder": self.guidance_decoder,
            "guiding teacher": self.guidance_teacher,
            "inversion": self.inversion,
            "stored images": self.stored_decodes,
            "their scores": self.scores,
        }


@torch.no_grad()
def synth_cost(settings: SynthSettings, sources: Mapping[str, ModelSource] | None = None) -> SynthCost:
    """The cost of ``settings``, by trajectory and in all; not of ``noise``, which runs no model.

    ``sources``: of teacher and adversary, where they are resolved already. Raises what loading prior and teacher
    raises (their weights are not read), UsageError for a black box that would have to give gradients.
    """
    sources = sources or model_sources(settings)
    models = {role: untrained_teacher(source) for role, source in sources.items()}
    teacher, adversary = models["teacher"], models.get("adversary")
    if teacher is None and (settings.guides or settings.inverts):
        verb = "be inverted" if settings.inverts else "guide"
        raise UsageError(f"teacher '{settings.teacher.name}' is a black box and cannot {verb}: use --method dmkd")
    if settings.needs_prior:
        cost = _sampling_cost(settings, sources["teacher"].config.class_names, teacher, adversary)
    else:
        cost = SynthCost(weights_bytes=weight_bytes(*(model.net for model in models.values() if model)))
    inversion, saved = inversion_cost(settings, sources) if settings.inverts else (0, 0)
    saved = max(saved, cost.saved_bytes_per_trajectory)
    scores = 0
    if teacher is not None:
        image = torch.empty(1, 3, teacher.input.size, teacher.input.size, device=META)
        scores = settings.images_per_trajectory * flops(lambda: teacher.logits(image))
    group = {"saved_bytes_per_trajectory": saved, "saved_bytes_per_group": saved * settings.group_size}
    cost = replace(cost, inversion=inversion, scores=scores, **group)
    each = sum(cost.parts.values())
    trajectories = settings.shards * settings.groups_per_shard * settings.group_size
    return replace(cost, flop_per_trajectory=each, flop=each * trajectories)


def _sampling_cost(
    settings: SynthSettings, class_names: Sequence[str], teacher: Teacher | None, adversary: Teacher | None
) -> SynthCost:
    """What denoising costs, and the prior's own decoding of stored images. One step of each kind is counted: steps of
    a kind cost the same, and so does every trajectory."""
    guidance, labeled = settings.guidance, settings.prior.labeled(class_names)
    prior = load_prior(labeled.model_copy(update={"attention": "sdpa", "compile": False}), "meta")
    assert isinstance(prior, DiffusionPrior)
    condition = prior.encode(make_group(settings, 0, class_names).conditions(prior.conditioning)[:1])
    use_tiny_decoder(prior, settings)
    decoder = load_decoder(prior, settings, teacher) if settings.guides and teacher else None
    label = torch.zeros(1, dtype=torch.long, device=META)

    def guide_by(settings: GuidanceSettings) -> Guidance:
        assert teacher is not None
        return Guidance(prior, teacher, label, settings, adversary=adversary, decode=decoder)

    latents = torch.empty(1, *prior.latent_shape, device=META)
    images = torch.empty(1, 3, prior.image_size, prior.image_size, device=META)
    rng = torch.Generator()
    parts = [
        prior.network,
        prior.vae,
        getattr(prior.tiny, "network", None),
        getattr(decoder, "network", decoder),
        *prior.encoders,
    ]
    networks = [part for part in (*parts, teacher and teacher.net, adversary and adversary.net) if part is not None]

    def predict(step: int, z: Tensor) -> Tensor:
        return prior.predict(State(z, step), condition).z0

    def guided_step(step: int) -> None:
        through = guidance.gradient_at == "xt"
        with torch.set_grad_enabled(through):
            prediction = prior.predict(State(latents.detach().requires_grad_(through), step), condition)
        guide_by(guidance.model_copy(update={"updates_per_step": 1}))(prediction)

    times = settings.dda.variants if settings.method == "dda" else 1
    denoiser = decode = teach = saved = 0
    for step, count, guided in step_kinds(settings, isinstance(prior, VariationPrior)):
        forward = flops(partial(predict, step, latents))
        denoiser += times * count * forward
        if guided and teacher:
            updates = times * count * guidance.updates_per_step
            decode += updates * vjp_flops(decoder or prior.decode, latents)
            teach += updates * vjp_flops(lambda x: guide_by(guidance).terms(x, rng).total(guidance), images)
            if guidance.gradient_at == "xt":
                denoiser += times * count * (vjp_flops(partial(predict, step), latents) - forward)
            saved = max(saved, saved_bytes(partial(guided_step, step), networks))
    stored = (settings.images_per_trajectory - settings.inverts) * flops(lambda: prior.decode(latents))
    if settings.method == "dda":  # the inverted image is encoded once for all its variants
        encode = prior.embed_images if isinstance(prior, VariationPrior) else prior.encode_images
        stored += flops(lambda: encode(images))
    fit = _fit_flops(prior, decoder, predict) if isinstance(decoder, FittedDecoder) else 0
    return SynthCost(
        denoiser,
        decode,
        teach,
        stored_decodes=stored,
        fit_decoder_once=fit,
        weights_bytes=weight_bytes(*networks),
        saved_bytes_per_trajectory=saved,
    )


def _fit_flops(prior: DiffusionPrior, decoder: FittedDecoder, predict: Callable[[int, Tensor], Tensor]) -> int:
    """What :func:`~stages.synth.decoders.fit` does for ``decoder``."""
    latents = torch.empty(1, *prior.latent_shape, device=META)
    images = torch.empty(1, 3, decoder.size, decoder.size, device=META)
    draws = trajectories(prior.latent_shape[1])
    steps = [visited(prior, visit, decoders.VISITS) for visit in range(decoders.VISITS)]
    decoder.requires_grad_()
    learn = flops(lambda: sobolev_loss(decoder, latents, images, images, latents).backward())
    return (
        draws * sum(flops(partial(predict, step, latents)) for step in steps)
        + draws * decoders.VISITS * (1 + decoders.NOISY) * vjp_flops(prior.decode, latents)
        + decoders.STEPS * decoders.BATCH * learn
    )


def step_kinds(settings: SynthSettings, varies: bool = False) -> list[tuple[int, int, bool]]:
    """For each kind of denoising step (with CFG or without, guided or not): its first step, how many there are, whether
    it is guided. ``varies``: the prior is a :class:`~stages.synth.priors.schedule.VariationPrior`.
    """
    steps = settings.prior.steps
    begin = settings.dda.first_step(steps, varies) if settings.method == "dda" else 0
    kinds: dict[tuple[bool, bool], list[int]] = {}
    for step in range(begin, steps):
        kind = (settings.prior.cfg_at(step) != 1, settings.guides and settings.guidance.at(step, steps))
        kinds.setdefault(kind, []).append(step)
    return [(members[0], len(members), guided) for (_, guided), members in kinds.items()]


@torch.enable_grad()
def inversion_cost(settings: SynthSettings, sources: Mapping[str, ModelSource]) -> tuple[int, int]:
    """FLOPs of one inverted image, and bytes that its iteration saves for the backward pass.

    Counted on a few images and iterations of the real thing, with random weights on the CPU. Every iteration costs the
    same, and so does every image but for the contrastive products of a large bank, which are left out.
    """
    models = {role: untrained_teacher(source, "cpu") for role, source in sources.items()}
    teacher, adversary = models["teacher"], models.get("adversary")
    assert teacher is not None
    invert = deepinversion if settings.method == "deepinversion" else cmi
    networks = [model.net for model in models.values() if model]

    def measured(images: int, steps: int) -> tuple[int, int]:
        short = {name: getattr(settings, name).model_copy(update={"steps": steps}) for name in ("cmi", "deepinversion")}
        few = settings.model_copy(update={"group_size": images, **short})
        group = make_group(few, 0, sources["teacher"].config.class_names)
        run = partial(invert, Models(None, teacher, adversary, "cpu"), group, few, Counters())
        with torch.random.fork_rng(devices=[]), Flops() as counter:
            saved = saved_bytes(lambda: list(run()), networks)
        return counter.total, saved

    few = 2 * settings.cmi.batches
    steps = settings.deepinversion.steps if settings.method == "deepinversion" else settings.cmi.steps
    (one, saved), (two, _), (_, twice) = measured(few, 1), measured(few, 2), measured(2 * few, 1)
    return (one + (steps - 1) * (two - one)) // few, (twice - saved) // few


TWO = 2  # images in the step that is counted: BatchNorm in training needs more than one


@dataclass(frozen=True)
class DistillCost:
    """FLOPs of a training: of the teacher's answers, of each student's steps, and in all (``flop``). Bytes of all
    weights (averaged ones, gradients and the optimizer's memory not counted), and of what a batch saves for the
    backward pass of the hungriest student, since they learn one after another."""

    teacher: int
    students: dict[str, int]
    flop: int
    weights_bytes: int
    saved_bytes_per_batch: int


def distill_cost(
    settings: DistillSettings, teacher: Teacher, image_size: int, views: int = 1, answers: int = 1
) -> DistillCost:
    """The cost of ``settings`` with a ``teacher`` on the meta device, on ``views`` of images of ``image_size`` pixels,
    of which ``answers`` are shown to the teacher."""
    loss, x = settings.loss, torch.empty(TWO, 3, image_size, image_size, device=META)
    labels, ones = torch.zeros(TWO, dtype=torch.long, device=META), torch.ones(TWO, device=META)
    rows = np.zeros(TWO, np.int64)
    batch = Batch(x, labels, labels, ones, ones, rows, rows, TWO, TWO)
    costs, nets, targets_flops, saved = {}, [], 0, 0
    for name in settings.students:
        config = student_config(name, settings, teacher)
        with torch.device("meta"):
            net = build_net(config)
        check_runs(net, config)
        layers = paired_layers(loss, teacher.net, net) if loss.gradcam else ([], [])
        ask = partial(teacher_targets, teacher, x, loss, layers[0])
        targets, targets_flops = ask(), flops(ask)
        with torch.device("meta"):
            align = align_head(teacher, net) if loss.feature else None
        terms = partial(student_terms, net.train(), InputSpec(config.input)(x), batch, targets, loss, layers[1], align)
        costs[name] = flops(partial(_backward, terms, loss)) // TWO * views
        saved = max(saved, saved_bytes(terms, [net, teacher.net]) // TWO)
        nets.append(net)
    teaching = targets_flops // TWO * answers
    flop = teaching + sum(costs.values())
    return DistillCost(teaching, costs, flop, weight_bytes(teacher.net, *nets), saved * settings.batch_size)


def _backward(terms: Callable[[], dict[str, Tensor]], loss: LossSettings) -> None:
    weighted(terms(), loss).backward()
