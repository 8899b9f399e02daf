"""DeepInversion (Yin et al. 2020): pixels optimised against the teacher's class loss and BatchNorm statistics.

BN is the normalised distance of :func:`stages.synth.guidance.moments_gap` with the first layer weighed more: the
paper's sum of plain norms differs by two orders of magnitude between teachers, so that no weight would fit another one.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from stages.synth.groups import Group
from stages.synth.guidance import Losses, class_prior, inconsistency, moments_gap, shifted
from stages.synth.inversion import Best, as_rgb, inverted_side, unit_pixels
from stages.synth.inversion_settings import DeepInversionSettings
from stages.synth.sampler import Frame, Models, Work
from stages.synth.seeds import torch_rng
from stages.synth.settings import SynthSettings

BETAS = (0.5, 0.9)
Moments = Sequence[tuple[Tensor, Tensor]]  # (mean, variance) of each layer, [c] each


def total_variation(x: Tensor) -> Tensor:
    """Σ over the four directions (right, down, both diagonals) of ‖x − shifted x‖₂, mean over images; a scalar."""
    differences = (
        x[..., :, 1:] - x[..., :, :-1],
        x[..., 1:, :] - x[..., :-1, :],
        x[..., 1:, 1:] - x[..., :-1, :-1],
        x[..., 1:, :-1] - x[..., :-1, 1:],
    )
    return torch.stack([norms(d).mean() for d in differences]).sum()


def norms(x: Tensor) -> Tensor:
    """‖·‖₂ of each image ``[n]``, with a finite gradient at 0."""
    return (x.flatten(1).square().sum(1) + 1e-12).sqrt()


def competition(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """1 − JS(T, S) per sample ``[n]``, in nats: 1 where both agree (Adaptive DeepInversion)."""
    return 1 - inconsistency(teacher_logits, student_logits)


def weighted_statistics(batch: Moments, running: Moments, first: float) -> Tensor:
    """Σ_l w_l·d_l / L with w = ``first`` for the first layer and 1 for the others."""
    return moments_gap(batch, running) + (first - 1) / len(batch) * moments_gap(batch[:1], running[:1])


def deepinversion(models: Models, group: Group, settings: SynthSettings, work: Work) -> Iterator[Frame]:
    """min over x of w_ce·CE + w_bn·BN + w_tv·TV + w_l2·‖x‖₂ (+ w_adv·(1 − JS)); the iterate of the lowest loss."""
    own, teacher, side = settings.deepinversion, models.teacher, inverted_side(models.teacher, settings.images.size)
    labels = torch.tensor(group.labels, device=models.device)
    noise = group.noise(settings.seed, (teacher.input.channels, side, side)).to(models.device)
    x = unit_pixels(noise, teacher).requires_grad_()
    adam, best = torch.optim.Adam([x], own.lr, BETAS), Best()
    for step in range(own.steps):
        rng = torch_rng(settings.seed, "view", group.index, step)
        view = shifted(as_rgb(x), own.jitter, rng)
        if own.flip and torch.rand((), generator=rng) < 0.5:
            view = view.flip(-1)
        losses = inversion_losses(view, labels, models, own)
        loss = own.ce * losses.ce.mean() + own.bn * losses.bn + own.tv * total_variation(x) + own.l2 * norms(x).mean()
        loss = loss + settings.guidance.adversarial * losses.adversarial.mean()
        best.offer(loss, as_rgb(x), losses)
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            x.clamp_(-1, 1)
        work.teacher_calls += 1
    yield Frame(own.steps, 0, best.checked(group), [[] for _ in group.trajectories], best.losses)


def inversion_losses(view: Tensor, labels: Tensor, models: Models, settings: DeepInversionSettings) -> Losses:
    """The terms that look at the teacher; ``adversarial`` is the competition with the adversary, if there is one."""
    if settings.bn and models.teacher.has_batchnorm:
        logits, batch = models.teacher.with_moments(view)
        bn = weighted_statistics(batch, models.teacher.batchnorms, settings.first_bn)
    else:
        logits = models.teacher.logits(view)
        bn = logits.new_zeros(())
    against = competition(logits, models.adversary.logits(view)) if models.adversary else logits.new_zeros(len(logits))
    return Losses(class_prior(logits, labels), against, bn)
