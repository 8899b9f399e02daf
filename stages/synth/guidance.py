"""Teacher guidance: the loss terms of DiffDFKD (equations 6-9) and the normalized update of ẑ0 (equation 10)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.models.inputs import interpolated
from stages.models.teacher import Teacher, moments_gap
from stages.settings import LOSS_SCALE, GuidanceSettings
from stages.synth.priors.diffusion import DiffusionPrior
from stages.synth.priors.schedule import Prediction

EPS = 1e-12
DEFAULTS = GuidanceSettings()
DEFAULT_CONSISTENCY = 1.0  # weight where none is set and the term is on
CROP = 0.75  # smallest side of a second view

Moments = Sequence[tuple[Tensor, Tensor]]
"""(mean, biased variance) of the inputs of each BatchNorm layer, ``[c]`` each."""
Decode = Callable[[Tensor], Tensor]
"""Clean latents ``[n, c, h, w]`` to images ``[n, 3, side, side]`` in [−1, 1]. Differentiable."""


class Population:
    """BatchNorm moments of a shard's earlier groups at each denoising step, older groups weighted less by ``share``
    each (``guidance.bn_population``), so that a group completes them in place of repeating them (Fang et al. 2022 match
    such an average).

    A shard starts without any: its groups depend on each other in their order, and on no other shard.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self.earlier: dict[int, Moments] = {}
        self.latest: dict[int, Moments] = {}  # with those of the group that is being made

    def joined(self, step: int, group: Moments) -> Moments:
        """The moments of earlier groups and of this one together."""
        earlier = self.earlier.get(step)
        both = group if earlier is None else [union(*pair, self.share) for pair in zip(group, earlier, strict=True)]
        self.latest[step] = [(mean.detach(), variance.detach()) for mean, variance in both]
        return both

    def advance(self) -> None:
        """The group is made: to the next one it is an earlier one, but where its statistics overflowed."""
        finite = {s: m for s, m in self.latest.items() if all(x.isfinite().all() for pair in m for x in pair)}
        self.earlier |= finite

    def restart(self) -> None:
        """Forget all groups, for the next shard."""
        self.earlier, self.latest = {}, {}


def alone(group: Moments) -> Moments:
    """The moments of a group that nothing is joined with."""
    return group


def union(new: tuple[Tensor, Tensor], old: tuple[Tensor, Tensor], share: float) -> tuple[Tensor, Tensor]:
    """(mean, variance) ``[c]`` of data that are ``old`` to a ``share`` and else ``new``: by the law of total variance,
    what the means differ by counts, too."""
    mean = (1 - share) * new[0] + share * old[0]
    variance = (1 - share) * new[1] + share * old[1] + (1 - share) * share * (new[0] - old[0]).square()
    return mean, variance


class Guidance:
    """Moves ẑ0 of ``n`` trajectories against the gradient of the guidance loss (equation 10): called with a prediction
    of ``prior`` at a step where it is :meth:`active`, it returns the moved prediction.

    ``labels [n]`` are the target classes, ``adversary`` is a frozen student or None, ``decode`` stands in for the
    prior's own decoder, ``rng`` gives the generator of a step's random views, ``population`` are earlier groups.

    Its record: ``losses`` of the last guided step (before its last update), the number of guided ``steps``, and for
    each trajectory how many updates were ``skipped [n]``, because their gradient was not finite (half precision
    overflows).
    """

    def __init__(
        self,
        prior: DiffusionPrior,
        teacher: Teacher,
        labels: Tensor,
        settings: GuidanceSettings,
        *,
        adversary: Teacher | None = None,
        decode: Decode | None = None,
        rng: Callable[[int], torch.Generator] = lambda step: torch.Generator(),
        population: Population | None = None,
    ) -> None:
        self.prior, self.teacher, self.adversary, self.labels = prior, teacher, adversary, labels
        self.settings, self.decode, self.rng, self.population = settings, decode or prior.decode, rng, population
        self.loss_scale = LOSS_SCALE if prior.settings.dtype == "fp16" else 1.0
        self.losses: Losses | None = None
        self.steps = 0
        self.skipped = torch.zeros(len(labels), dtype=torch.int16, device=labels.device)

    def active(self, step: int) -> bool:
        """Whether step ``step`` of the prior's schedule is guided."""
        return self.settings.at(step, len(self.prior.timesteps))

    def differentiates_denoiser(self, step: int) -> bool:
        """Whether the prediction of ``step`` must carry the graph from z_t to ẑ0."""
        return self.settings.gradient_at == "xt" and self.active(step)

    def __call__(self, x: Prediction) -> Prediction:
        rng = self.rng(x.step)
        for _ in range(self.settings.updates_per_step):
            x = self.update(x, rng)
        self.steps += 1
        return x

    def update(self, x: Prediction, rng: torch.Generator) -> Prediction:
        """One update of ẑ0, and of z_t with it: eps is kept. ``gradient_at: x0`` differentiates decoder and teacher
        alone, ``xt`` the denoiser too."""
        settings, (alpha, sigma) = self.settings, self.prior.levels(x.step)
        with torch.enable_grad():
            source = x.z if settings.gradient_at == "xt" else x.z0.detach().requires_grad_()
            losses = self.terms(self.decode(x.z0 if settings.gradient_at == "xt" else source), rng, x.step)
            (gradient,) = torch.autograd.grad(losses.total(settings) * self.loss_scale, source)
        gradient = gradient / self.loss_scale
        finite = gradient.isfinite().flatten(1).all(1)
        delta = update(gradient, alpha, sigma, settings).where(finite.view(-1, 1, 1, 1), 0)
        if settings.gradient_at == "xt" and settings.normalize == "none":
            delta = delta / alpha  # equation 10 moves z_t itself, while ``move`` counts in ẑ0
        self.losses, self.skipped = losses.detached(), self.skipped + ~finite
        return self.prior.move(x.detached(), delta)

    def terms(self, images: Tensor, rng: torch.Generator, step: int | None = None) -> "Losses":
        """The terms of the loss for images ``[n, 3, h, w]`` in [−1, 1], seen through random views; with the population
        as it was at ``step``, if there is one."""
        bn = self.settings.bn > 0 and self.teacher.has_batchnorm
        moved = shifted(images, self.settings.jitter, rng)
        other = cropped(moved, rng) if two_views(self.settings, self.teacher) else None
        population = self.population
        joined = partial(population.joined, step) if population is not None and step is not None else alone
        return teacher_losses(moved, self.labels, self.teacher, self.adversary, bn, other, self.settings, joined)


def class_prior(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy per sample ``[n]`` (equation 7)."""
    return F.cross_entropy(logits, labels, reduction="none")


def disagreement(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """Adversarial term per sample ``[n]``: −KL(T‖S) where both name the same class, else 0 (temperature 1)."""
    log_t, log_s = teacher_logits.log_softmax(1), student_logits.log_softmax(1)
    kl = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(1)
    return -kl * (teacher_logits.argmax(1) == student_logits.argmax(1))


def inconsistency(first: Tensor, second: Tensor) -> Tensor:
    """Jensen-Shannon divergence per sample ``[n]`` of the answers ``[n, C]`` to two views, 0 to ln 2.

    ½KL(p‖m) + ½KL(q‖m) with m = (p + q)/2: the consistency loss of AugMix (Hendrycks et al. 2020, equation 1).
    """
    p, q = first.log_softmax(1), second.log_softmax(1)
    mean = torch.logaddexp(p, q) - math.log(2)
    to_p, to_q = (F.kl_div(mean, x, reduction="none", log_target=True).sum(1) for x in (p, q))
    return (to_p + to_q) / 2


def energy(logits: Tensor) -> Tensor:
    """Free energy −log Σ_c exp(logit_c) per sample ``[n]`` (Liu et al. 2020, equation 3, temperature 1): high for
    images unlike those the teacher was trained on."""
    return -logits.logsumexp(1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy −Σ_c p_c·log p_c of the answer per sample ``[n]``, 0 to ln C."""
    log_p = logits.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1)


@dataclass(frozen=True)
class Losses:
    """Terms of one guided step: per sample ``[n]`` (``adversarial`` zero without a student) and ``bn`` per group.

    The others are None where they are off.
    """

    ce: Tensor
    adversarial: Tensor
    bn: Tensor
    inconsistency: Tensor | None = None
    energy: Tensor | None = None
    entropy: Tensor | None = None

    def detached(self) -> "Losses":
        terms = {field.name: getattr(self, field.name) for field in fields(self)}
        detached: dict[str, Any] = {name: None if term is None else term.detach() for name, term in terms.items()}
        return Losses(**detached)

    def total(self, settings: GuidanceSettings) -> Tensor:
        """Σ_i w_ce·CE_i + n·w_bn·BN + Σ_i w_adv·ADV_i + Σ_i w_con·JS_i + Σ_i w_en·E_i + Σ_i w_h·H_i: sums, so that a
        sample's gradient does not shrink with n."""
        n = len(self.ce)
        loss = settings.ce * self.ce.sum() + n * settings.bn * self.bn + settings.adversarial * self.adversarial.sum()
        consistency = DEFAULT_CONSISTENCY if settings.consistency is None else settings.consistency
        others = (consistency, self.inconsistency), (settings.energy, self.energy), (settings.entropy, self.entropy)
        for weight, term in others:
            if term is not None:
                loss = loss + weight * term.sum()
        return loss


def two_views(settings: GuidanceSettings, teacher: Teacher) -> bool:
    """Whether the teacher sees a second view: as set, else where it has no BatchNorm statistics to match."""
    return not teacher.has_batchnorm if settings.consistency is None else settings.consistency > 0


def teacher_losses(
    images: Tensor,
    labels: Tensor,
    teacher: Teacher,
    adversary: Teacher | None,
    bn: bool,
    other: Tensor | None = None,
    settings: GuidanceSettings = DEFAULTS,
    joined: Callable[[Moments], Moments] = alone,
) -> Losses:
    """All terms for images ``[n, 3, h, w]`` in [−1, 1]; ``bn`` needs a teacher with BatchNorm.

    With a second view ``other`` of the same images the class prior is the mean over both. ``joined`` adds other images
    to the group's moments. ``settings`` say which of the further terms are on.
    """
    if bn:
        logits, moments = teacher.with_moments(images)
        statistics = moments_gap(joined(moments), teacher.batchnorms)
    else:
        logits = teacher.logits(images)
        statistics = logits.new_zeros(())
    adversarial = disagreement(logits, adversary.logits(images)) if adversary else torch.zeros_like(logits[:, 0])
    losses = Losses(
        class_prior(logits, labels),
        adversarial,
        statistics,
        energy=energy(logits) if settings.energy else None,
        entropy=entropy(logits) if settings.entropy else None,
    )
    if other is None:
        return losses
    others = teacher.logits(other)
    ce = (losses.ce + class_prior(others, labels)) / 2
    return replace(losses, ce=ce, inconsistency=inconsistency(logits, others))


def update(gradient: Tensor, alpha: float, sigma: float, settings: GuidanceSettings) -> Tensor:
    """Δ of ẑ0, −s·min(1, σ/α)·g/RMS(g) per sample: ``[n, c, h, w]`` like ``gradient``.

    min(1, σ/α) shrinks the step with the noise, so that late steps stay within what the prior can absorb.
    """
    if settings.normalize == "none":
        return -settings.step_size * gradient
    rms = gradient.flatten(1).square().mean(1).sqrt().clamp_min(EPS).view(-1, 1, 1, 1)
    return -settings.step_size * min(1.0, sigma / alpha) * gradient / rms


def shifted(images: Tensor, limit: float, rng: torch.Generator) -> Tensor:
    """Images moved by up to ``limit`` of their side, edges repeated: one shift for the batch."""
    reach = round(limit * images.shape[-1])
    if reach == 0:
        return images
    dy, dx = torch.randint(-reach, reach + 1, (2,), generator=rng).tolist()
    side = images.shape[-1]
    if torch.are_deterministic_algorithms_enabled():  # as in interpolated
        rows, columns = (_shift(side, distance, images.device).to(images) for distance in (dy, dx))
        return rows @ images @ columns.T
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    return padded[..., reach + dy : reach + dy + side, reach + dx : reach + dx + side]


@lru_cache(256)
def _shift(side: int, distance: int, device: torch.device) -> Tensor:
    """What one axis of ``side`` pixels is multiplied with to move by ``distance``: ``[side, side]``."""
    return torch.eye(side, device="cpu")[(torch.arange(side, device="cpu") + distance).clamp(0, side - 1)].to(device)


def cropped(images: Tensor, rng: torch.Generator) -> Tensor:
    """A second view: a random square of at least ``CROP`` of the side, enlarged to it. One square for the batch."""
    side = images.shape[-1]
    size = int(torch.randint(math.ceil(CROP * side), side, (1,), generator=rng))
    y, x = torch.randint(side - size + 1, (2,), generator=rng).tolist()
    square = images[..., y : y + size, x : x + size]
    return interpolated(square, side, mode="bilinear", align_corners=False)
