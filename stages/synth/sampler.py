"""The denoising loop of one group, and the methods that are nothing but it: ``diffdfkd`` and ``dmkd``."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manifests.errors import UsageError
from stages.models.teacher import Teacher
from stages.seeds import torch_rng
from stages.settings import GuidanceSettings, LatentMixSettings, SynthSettings
from stages.synth.group import Group
from stages.synth.guidance import Losses, cropped, shifted, teacher_losses, two_views, update
from stages.synth.latent_mix import Mix, draw_mixes, mixing
from stages.synth.priors.schedule import Prediction, Prior

Decode = Callable[[Tensor], Tensor]
"""Clean latents ``[n, c, h, w]`` to images ``[n, 3, side, side]`` in [−1, 1]. Differentiable."""


@dataclass(frozen=True)
class Models:
    """What a worker loads once, on ``device``; ``adversary`` is a frozen student or None.

    ``decode`` is what guidance looks through (None: the prior's own decoder).
    """

    prior: Prior | None  # None for methods that invert the teacher
    teacher: Teacher
    adversary: Teacher | None
    device: str
    decode: Decode | None = None

    def limit_batches(self, limit: int | None) -> None:
        """Let no network see more than ``limit`` trajectories at once (None: any number), to save memory."""
        for model in (self.prior, self.teacher, self.adversary):
            if model is not None:
                model.batch_limit = limit


@dataclass(frozen=True)
class Guide:
    """A teacher that steers; ``settings`` weigh its terms, ``adversary`` is a frozen student or None.

    ``decode`` stands in for the prior's own decoder, for guidance alone.
    """

    settings: GuidanceSettings
    teacher: Teacher
    labels: Tensor  # [n] target classes
    adversary: Teacher | None = None
    decode: Decode | None = None

    def losses(self, images: Tensor, rng: torch.Generator) -> Losses:
        bn = self.settings.bn > 0 and self.teacher.has_batchnorm
        moved = shifted(images, self.settings.jitter, rng)
        other = cropped(moved, rng) if two_views(self.settings, self.teacher) else None
        return teacher_losses(moved, self.labels, self.teacher, self.adversary, bn, other)


@dataclass
class DecodedGroup:
    """All images of a group decoded at one step: ``[n, 3, h, w]`` in [−1, 1], with what led there."""

    step: int
    timestep: int
    images: Tensor
    mixes: list[list[Mix]]  # per trajectory, every one it went through so far
    losses: Losses | None = None  # at the last guided step
    skipped: list[int] | None = None  # per trajectory, the guided updates left out so far
    source: int | None = None  # number of the group's frame that these were made from, image by image
    embed: Callable[[Tensor], Tensor] | None = None  # of stored images, where cosines are not of teacher features


@dataclass
class Counters:
    """What a group cost so far, in calls on the whole group."""

    evaluations: int = 0  # of the prior's network (with CFG one call holds both halves)
    decodes: int = 0  # of frames that are stored
    guided_steps: int = 0
    updates: int = 0  # of ẑ0: each decodes once, in guidance's own way, and asks the teacher once
    skipped_updates: int = 0  # single trajectories left out of these: their gradient was not finite
    teacher_calls: int = 0  # by methods that invert it, on a batch of the group each


def intermediate_steps(count: int, steps: int) -> set[int]:
    """The steps at which ``count`` x0-predictions are stored, evenly spaced: j·steps/(count + 1) for j = 1…count.

    >>> sorted(intermediate_steps(4, 50))
    [10, 20, 30, 40]
    """
    return {round(j * steps / (count + 1)) for j in range(1, count + 1)}


def check_intermediates(count: int, timesteps: Sequence[int]) -> None:
    """Raises UsageError where one of ``count`` x0-predictions would be stored at timestep 0 of a prior's ``timesteps``,
    which tells final images."""

    def clash(count: int) -> bool:
        return any(timesteps[step] == 0 for step in intermediate_steps(count, len(timesteps)))

    if clash(count):
        most = next(fewer for fewer in range(count, -1, -1) if not clash(fewer))
        raise UsageError(
            f"images.intermediates {count}: the last of them is at timestep 0 of this prior's schedule, as only final "
            f"images are; set at most {most}"
        )


def guide_step(
    prior: Prior, state: Prediction, guide: Guide, rng: torch.Generator
) -> tuple[Prediction, Losses, Tensor]:
    """Move ẑ0 (and z_t with it, eps kept) against the gradient of the guidance loss (equation 10).

    ``through: z0`` differentiates decoder and teacher only; ``through: zt`` the denoiser too, so ``state`` must then
    carry the graph from ``state.z`` to ``state.z0``. Losses are those before the last update, detached. Where a
    sample's gradient is not finite (half precision overflows) it is not moved; ``[n]`` counts these updates.
    """
    settings, levels, decode = guide.settings, prior.levels(state.step), guide.decode or prior.decode
    skipped = torch.zeros(len(state.z), dtype=torch.int16, device=state.z.device)
    for _ in range(settings.updates_per_step):
        with torch.enable_grad():
            source = state.z if settings.gradient_at == "xt" else state.z0.detach().requires_grad_()
            losses = guide.losses(decode(state.z0 if settings.gradient_at == "xt" else source), rng)
            (gradient,) = torch.autograd.grad(losses.total(settings), source)
        finite = gradient.isfinite().flatten(1).all(1)
        delta = update(gradient, *levels, settings).where(finite.view(-1, 1, 1, 1), 0)
        skipped += ~finite
        if settings.gradient_at == "xt" and settings.normalize == "none":
            delta = delta / levels[0]  # equation 10 moves z_t itself, while ``move`` counts in ẑ0
        state = prior.move(state.detached(), delta)
    return state, losses.detached(), skipped


@torch.no_grad()
def denoise(
    prior: Prior,
    group: Group,
    seed: int,
    device: str,
    guide: Guide | None = None,
    lca: LatentMixSettings | None = None,
    intermediates: int = 0,
    work: Counters | None = None,
    origin: Tensor | None = None,
    first: int = 0,
    condition: Any = None,
) -> Iterator[DecodedGroup]:
    """Denoise a group: yields ``intermediates`` frames of x̂0, then the final one (timestep 0).

    Image-to-image: from step ``first`` on, where the group starts as the clean latents ``origin`` with noise added.

    ``condition`` takes the place of the group's own, as ``prior.encode`` gives it.

    One evaluation of the prior per step. An intermediate is decoded before its step's update and mix.
    """
    n, steps = len(group.trajectories), len(prior.timesteps)
    work = work or Counters()
    mixes: list[list[Mix]] = [[] for _ in range(n)]
    losses: Losses | None = None
    skipped = torch.zeros(n, dtype=torch.int16, device=device)
    store = intermediate_steps(intermediates, steps)

    def frame(step: int, timestep: int, z0: Tensor) -> DecodedGroup:
        work.decodes += 1
        return DecodedGroup(step, timestep, prior.decode(z0), [list(m) for m in mixes], losses, skipped.tolist())

    if condition is None:
        condition = prior.encode(group.conditions(prior.conditioning))
    noise = group.noise(seed, prior.latent_shape).to(device)
    start = prior.start(noise) if origin is None else prior.noised(origin, noise, first)
    for step, timestep in list(enumerate(prior.timesteps))[first:]:
        active = guide if guide and guide.settings.at(step, steps) else None
        with torch.set_grad_enabled(active is not None and active.settings.gradient_at == "xt"):
            start.z.requires_grad_(torch.is_grad_enabled())
            state = prior.predict(start, condition)
        work.evaluations += 1
        if step in store:
            yield frame(step, timestep, state.z0)
        if active:
            state, losses, left_out = guide_step(prior, state, active, torch_rng(seed, "shift", group.index, step))
            skipped += left_out
            work.guided_steps += 1
            work.updates += active.settings.updates_per_step
        if lca and lca.at(step, steps):
            drawn = draw_mixes(lca, group, seed, step, timestep, prior.latent_shape)
            state = state.mapped(mixing(drawn, n, prior.latent_shape, lca.kind, device))
            for position, mix in drawn.items():
                mixes[position].append(mix)
        rngs = [torch_rng(seed, "step", t, step) for t in group.trajectories] if prior.stochastic else None
        start = prior.step(state.detached(), rngs)
    work.skipped_updates += int(skipped.sum())
    yield frame(steps, 0, start.z)


# DiffDFKD (Qi et al.): the teacher guides every denoising step; latents of one class are cut and mixed (LCA).


def diffdfkd(models: Models, group: Group, settings: SynthSettings, work: Counters) -> Iterator[DecodedGroup]:
    """L = w_ce·CE + w_bn·BN + w_adv·ADV (equation 9), ẑ0 ← ẑ0 − s·∇L (10), LCA (11), then the scheduler's step (5)."""
    labels = torch.tensor(group.labels, device=models.device)
    guide = Guide(settings.guidance, models.teacher, labels, models.adversary, models.decode)
    assert models.prior is not None
    kept = settings.images.intermediates
    yield from denoise(models.prior, group, settings.seed, models.device, guide, settings.lca, kept, work)


# DM-KD (Li et al. 2023): plain samples of the prior, no guidance. The baseline, and the source of generate-then-select
# (``min_confidence`` marks as kept what the teacher agrees with).


def dmkd(models: Models, group: Group, settings: SynthSettings, work: Counters) -> Iterator[DecodedGroup]:
    """Denoise without looking at the teacher; it only scores what was made."""
    assert models.prior is not None
    kept = settings.images.intermediates
    yield from denoise(models.prior, group, settings.seed, models.device, None, None, kept, work)
