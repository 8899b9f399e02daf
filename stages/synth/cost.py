"""What synthesis costs: FLOPs and memory, counted by sampling on meta tensors. Used by ``factory run synth --dry-run``.

One step of each kind (with CFG or without, guided or not) is run by the code that samples, for one trajectory; steps of
a kind cost the same, and so does every trajectory. Text encoders (one pass a distinct prompt) are not counted.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from manifests.errors import UsageError
from stages.counting import META, flops, saved_bytes, weight_bytes
from stages.models.blank import blank_teacher
from stages.models.identity import resolve
from stages.synth.diffusion import DiffusionPrior
from stages.synth.groups import make_group
from stages.synth.guidance import guided
from stages.synth.guidance_decoder import load_decoder
from stages.synth.prior import Prediction, State
from stages.synth.priors import load_prior
from stages.synth.sampler import Guide, guide_step
from stages.synth.settings import GuidanceSettings, SynthSettings

COUNTED = ("diffdfkd", "dmkd")
Through = Literal["z0", "zt"]


@dataclass(frozen=True)
class SynthCost:
    """FLOPs of one trajectory by what they are spent on, and bytes: of all weights, and of what one trajectory's guided
    step saves for its backward pass. ``score`` and ``stored`` are those of the images it stores."""

    denoiser: int
    guidance_decoder: int
    guidance_teacher: int
    stored: int
    score: int
    weights: int
    saved: int

    @property
    def flops(self) -> int:
        return self.denoiser + self.guidance_decoder + self.guidance_teacher + self.stored + self.score


class Meter:
    """Prior, teacher and adversary of ``settings`` as shapes, and one trajectory to try them on."""

    def __init__(self, settings: SynthSettings) -> None:
        self.settings = settings
        names = resolve(settings.teacher).config.class_names
        shapes = settings.prior.labelled(names).model_copy(update={"attention": "sdpa", "compile": False})
        prior = load_prior(shapes, "meta")
        assert isinstance(prior, DiffusionPrior)
        self.prior, self.teacher = prior, blank_teacher(settings.teacher)
        guides = settings.method == "diffdfkd"
        self.decoder = load_decoder(prior, settings, self.teacher) if guides and self.teacher else None
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
    def score(self) -> None:
        if self.teacher:
            self.teacher.logits(self.images(self.settings.images.size or self.prior.image_size))

    def images(self, size: int) -> torch.Tensor:
        return torch.empty(1, 3, size, size, device=META)


def synth_cost(settings: SynthSettings) -> SynthCost | None:
    """The cost of one trajectory of ``settings``; None for methods that do more than sample the prior.

    Raises what loading prior and teacher raises; their weights are not read.
    """
    if settings.method not in COUNTED:
        return None
    meter = Meter(settings)
    guidance = settings.guidance
    denoiser = decoder = teacher = saved = 0
    for step, count, is_guided in step_kinds(settings):
        predict = flops(partial(meter.predict, step))
        denoiser += count * predict
        if is_guided:
            teach = flops(meter.teach)
            update = flops(partial(meter.guide, step, "z0")) - predict
            decoder += count * guidance.inner * (update - teach)
            teacher += count * guidance.inner * teach
            if guidance.through == "zt":
                denoiser += count * (flops(partial(meter.guide, step, "zt")) - predict - update)
            saved = max(saved, saved_bytes(partial(meter.guide, step, guidance.through), meter.networks))
    images = 1 + settings.images.intermediates
    return SynthCost(
        denoiser=denoiser,
        guidance_decoder=decoder,
        guidance_teacher=teacher,
        stored=images * flops(meter.decode),
        score=images * flops(meter.score),
        weights=weight_bytes(*meter.networks),
        saved=saved,
    )


def step_kinds(settings: SynthSettings) -> Iterator[tuple[int, int, bool]]:
    """For each kind of denoising step: one such step, how many there are, whether it is guided."""
    steps, guides = settings.prior.steps, settings.method == "diffdfkd"
    kinds: Counter[tuple[bool, bool]] = Counter()
    first: dict[tuple[bool, bool], int] = {}
    for step in range(steps):
        kind = (settings.prior.cfg_at(step) != 1, guides and guided(settings.guidance, step, steps))
        kinds[kind] += 1
        first.setdefault(kind, step)
    yield from ((first[kind], count, kind[1]) for kind, count in kinds.items())
