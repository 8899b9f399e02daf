"""What synthesis costs: FLOPs and memory, counted by sampling on meta tensors. Used by ``factory run synth --dry-run``.

One step of each kind (with CFG or without, guided or not) is run by the code that samples, for one trajectory; steps of
a kind cost the same, and so does every trajectory. Text encoders (one pass a distinct prompt) are not counted.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch

from manifests.errors import UsageError
from stages.counting import META, flops, saved_bytes, weight_bytes
from stages.models.blank import blank_teacher
from stages.models.identity import resolve
from stages.models.teacher import Teacher
from stages.synth import fitted_decoder
from stages.synth.fitted_decoder import FittedDecoder, misfit, pull_back, trajectories, visited
from stages.synth.groups import make_group
from stages.synth.guidance_decoder import load_decoder
from stages.synth.inversion_cost import inversion_cost
from stages.synth.priors.diffusion import DiffusionPrior
from stages.synth.priors.load import load_prior
from stages.synth.priors.prior import Prediction, State, VariationPrior
from stages.synth.sampler import Guide, guide_step
from stages.synth.settings import GuidanceSettings, SynthSettings

Through = Literal["z0", "zt"]


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
        shapes = settings.prior.labelled(names).model_copy(update={"attention": "sdpa", "compile": False})
        prior = load_prior(shapes, "meta")
        assert isinstance(prior, DiffusionPrior)
        self.prior, self.teacher = prior, blank_teacher(settings.teacher)
        self.decoder = load_decoder(prior, settings, self.teacher) if settings.guides and self.teacher else None
        self.adversary = blank_teacher(settings.adversary) if settings.adversary else None
        group = make_group(settings, 0, names)
        self.condition = prior.encode(group.conditions(prior.conditioning)[:1])
        self.labels = torch.zeros(1, dtype=torch.long, device=META)
        self.rng = torch.Generator()

    @property
    def networks(self) -> list[torch.nn.Module]:
        classifiers = [teacher.net for teacher in (self.teacher, self.adversary) if teacher]
        decoder = getattr(self.decoder, "network", self.decoder)
        parts = (self.prior.network, self.prior.vae, decoder, *self.prior.encoders)
        return [part for part in parts if part is not None] + classifiers

    def predict(self, step: int, through: Through = "z0") -> Prediction:
        start = torch.empty(1, *self.prior.latent_shape, device=META, requires_grad=through == "zt")
        with torch.set_grad_enabled(through == "zt"):
            return self.prior.predict(State(start, step), self.condition)

    def guide(self, step: int, through: Through) -> None:
        """A guided step with one update, its prediction included."""
        settings = self.settings.guidance.model_copy(update={"through": through, "inner": 1})
        guide_step(self.prior, self.predict(step, through), self.guidance(settings), self.rng)

    def teach(self) -> None:
        """The teacher's part of a guided step, forward and back to its input."""
        images = self.images(self.prior.image_size).requires_grad_()
        losses = self.guidance(self.settings.guidance).losses(images, self.rng)
        torch.autograd.grad(losses.total(self.settings.guidance), images)

    def guidance(self, settings: GuidanceSettings) -> Guide:
        if self.teacher is None:
            raise UsageError(
                f"teacher '{self.settings.teacher.name}' is a black box and cannot guide: use --method dmkd"
            )
        return Guide(settings, self.teacher, self.labels, self.adversary, self.decoder)

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
            update = flops(partial(meter.guide, step, "z0")) - predict
            decoder += times * count * guidance.inner * (update - teach)
            teacher += times * count * guidance.inner * teach
            if guidance.through == "zt":
                denoiser += times * count * (flops(partial(meter.guide, step, "zt")) - predict - update)
            saved = max(saved, saved_bytes(partial(meter.guide, step, guidance.through), meter.networks))
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
    """What :func:`~stages.synth.fitted_decoder.fit` does, for guidance's decoder of ``meter``."""
    prior, decoder, shape = meter.prior, meter.decoder, meter.prior.latent_shape
    assert isinstance(decoder, FittedDecoder)
    drawn = trajectories(shape[1]) * fitted_decoder.VISITS
    net = FittedDecoder(shape[0], shape[1], decoder.size, decoder.rule).to(META)
    latents, images = torch.empty(1, *shape, device=META), meter.images(decoder.size)
    decode = flops(lambda: pull_back(prior.decode, latents, meter.images(prior.image_size)))
    learn = flops(lambda: misfit(net, latents, images, images, latents).backward())
    steps = [visited(prior, visit, fitted_decoder.VISITS) for visit in range(fitted_decoder.VISITS)]
    kinds = {prior.settings.cfg_at(step): step for step in steps}
    predict = {scale: flops(partial(meter.predict, step)) for scale, step in kinds.items()}
    return (
        trajectories(shape[1]) * sum(predict[prior.settings.cfg_at(step)] for step in steps)
        + drawn * (1 + fitted_decoder.NOISY) * decode
        + fitted_decoder.STEPS * fitted_decoder.BATCH * learn
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

    ``varies``: the prior is a :class:`~stages.synth.priors.prior.VariationPrior`.
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
