"""Inverting the teacher without a prior: what the methods share, and DeepInversion (Yin et al. 2020), which optimizes
pixels against the teacher's class loss and BatchNorm statistics."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from manifests.errors import DataError
from stages.models.teacher import Teacher, moments_gap
from stages.seeds import torch_rng
from stages.settings import DeepInversionSettings, SynthSettings
from stages.synth.group import Group
from stages.synth.guidance import Losses, class_prior, inconsistency, shifted
from stages.synth.sampler import Counters, DecodedGroup, Models


class Best:
    """The iterate of the lowest loss so far: ``images [n, 3, h, w]`` and the terms they had."""

    images: Tensor
    losses: Losses

    def __init__(self) -> None:
        self.loss = math.inf

    def offer(self, loss: Tensor, images: Tensor, losses: Losses) -> None:
        """Keep this iterate if it is better; NaN never is."""
        if loss.item() < self.loss:
            self.loss, self.images, self.losses = loss.item(), images.detach().clone(), losses.detached()

    def checked(self, group: Group) -> Tensor:
        """Its images. Raises DataError where no iterate had a finite loss."""
        if self.loss == math.inf:
            raise DataError(f"group {group.index}: the loss was never finite; try a smaller learning rate")
        return self.images


def inverted_side(teacher: Teacher, size: int | None) -> int:
    """Side of inverted images: as they are stored, by default what the teacher sees."""
    return size or teacher.input.size


def as_rgb(images: Tensor) -> Tensor:
    """``[n, 1 or 3, h, w]`` to ``[n, 3, h, w]``: gray images for a teacher of luminance."""
    return images.expand(-1, 3, -1, -1)


def unit_pixels(noise: Tensor, teacher: Teacher) -> Tensor:
    """Unit noise ``[n, channels, h, w]`` in the teacher's normalization as pixels in [−1, 1]."""
    mean, std = (
        torch.tensor(v, device=noise.device).view(1, -1, 1, 1)
        for v in (teacher.input.settings.mean, teacher.input.settings.std)
    )
    return (2 * (mean + std * noise) - 1).clamp(-1, 1)


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
    """Σ_l w_l·d_l / L with w = ``first`` for the first layer and 1 for the others, d that of
    :func:`~stages.models.teacher.moments_gap`: the paper's plain norms differ by two orders of magnitude between
    teachers, so no weight would fit another one."""
    return moments_gap(batch, running) + (first - 1) / len(batch) * moments_gap(batch[:1], running[:1])


def deepinversion(models: Models, group: Group, settings: SynthSettings, counters: Counters) -> Iterator[DecodedGroup]:
    """min over x of w_ce·CE + w_bn·BN + w_tv·TV + w_l2·‖x‖₂ (+ w_adv·(1 − JS)); the iterate of the lowest loss."""
    method, teacher, side = settings.deepinversion, models.teacher, inverted_side(models.teacher, settings.images.size)
    labels = torch.tensor(group.labels, device=models.device)
    noise = group.noise(settings.seed, (teacher.input.channels, side, side)).to(models.device)
    x = unit_pixels(noise, teacher).requires_grad_()
    adam, best = torch.optim.Adam([x], method.lr, BETAS), Best()
    for step in range(method.steps):
        rng = torch_rng(settings.seed, "view", group.index, step)
        view = shifted(as_rgb(x), method.jitter, rng)
        if method.flip and torch.rand((), generator=rng) < 0.5:
            view = view.flip(-1)
        losses = inversion_losses(view, labels, models, method)
        loss = method.ce * losses.ce.mean() + method.bn * losses.bn
        loss = loss + method.tv * total_variation(x) + method.l2 * norms(x).mean()
        loss = loss + settings.guidance.adversarial * losses.adversarial.mean()
        best.offer(loss, as_rgb(x), losses)
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            x.clamp_(-1, 1)
        counters.teacher_calls += 1
        models.on_step(losses)
    yield DecodedGroup(method.steps, 0, best.checked(group), [[] for _ in group.trajectories], best.losses)


def inversion_losses(view: Tensor, labels: Tensor, models: Models, settings: DeepInversionSettings) -> Losses:
    """The terms of the teacher; ``adversarial`` is the competition with the adversary, if there is one."""
    teacher, adversary = models.teacher, models.adversary
    if settings.bn and teacher.has_batchnorm:
        logits, batch = teacher.with_moments(view)
        bn = weighted_statistics(batch, teacher.batchnorms, settings.first_bn)
    else:
        logits = teacher.logits(view)
        bn = logits.new_zeros(())
    adversarial = competition(logits, adversary.logits(view)) if adversary else logits.new_zeros(len(logits))
    return Losses(class_prior(logits, labels), adversarial, bn)
