"""The denoising loop, and the methods that are nothing but it: ``diffdfkd`` and ``dmkd``."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from manifests.errors import UsageError
from stages.models.teacher import Teacher
from stages.seeds import torch_rng
from stages.settings import SynthSettings
from stages.synth.group import Group
from stages.synth.guidance import Decode, Guidance, Losses, Population
from stages.synth.latent_mix import LatentMix, Mix
from stages.synth.priors.diffusion import DiffusionPrior
from stages.synth.priors.schedule import State

OnStep = Callable[[Losses | None], object]
"""Called after each step with the losses of the last guided one, if there was one; it only watches."""


def ignored(losses: Losses | None) -> None:
    """Nobody watches."""


@torch.no_grad()
def sample(
    prior: DiffusionPrior,
    state: State,
    condition: Any,
    *,
    guide: Guidance | None = None,
    mix: LatentMix | None = None,
    store: Collection[int] = (),
    rngs: Callable[[int], Sequence[torch.Generator]] | None = None,
    on_step: OnStep = ignored,
) -> Iterator[tuple[int, Tensor]]:
    """Denoise ``n`` trajectories from ``state`` on: yields (step, ẑ0 ``[n, c, h, w]``) for each step in ``store``,
    before its update and mix, then (number of steps, z).

    One evaluation of the prior per step. ``rngs`` gives a step's generators, one per trajectory, where it is random.
    """
    for step in range(state.step, len(prior.timesteps)):
        with torch.set_grad_enabled(guide is not None and guide.differentiates_denoiser(step)):
            x = prior.predict(state.tracked(), condition)
        if step in store:
            yield step, x.z0
        if guide is not None and guide.active(step):
            x = guide(x)
        if mix is not None and mix.active(step):
            x = mix(x)
        state = prior.step(x.detached(), rngs(step) if rngs else None)
        on_step(guide.losses if guide else None)
    yield len(prior.timesteps), state.z


@dataclass
class Counters:
    """What synthesis cost, in calls on a whole group."""

    evaluations: int = 0  # of the prior's network (with CFG one call holds both halves)
    decodes: int = 0  # of latents whose images are stored
    guided_steps: int = 0
    updates: int = 0  # of ẑ0: each decodes once, by guidance's decoder, and calls the teacher once
    skipped_updates: int = 0  # of single trajectories: their gradient was not finite
    teacher_calls: int = 0  # by methods that invert it, on a batch of the group each

    def __add__(self, other: "Counters") -> "Counters":
        return Counters(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass
class DecodedGroup:
    """All images of a group at one step: ``[n, 3, h, w]`` in [−1, 1], with what led there."""

    step: int
    timestep: int
    images: Tensor
    mixes: list[list[Mix]]  # per trajectory, every one it went through so far
    losses: Losses | None = None  # at the last guided step
    skipped: list[int] | None = None  # per trajectory, the guided updates left out so far
    source: int | None = None  # number of the group's frame that these were made from, image by image
    embed: Callable[[Tensor], Tensor] | None = None  # of stored images, where cosines are not of teacher features


@torch.no_grad()
def denoise(
    prior: DiffusionPrior,
    group: Group,
    seed: int,
    *,
    start: State | None = None,
    condition: Any = None,
    guide: Guidance | None = None,
    mix: LatentMix | None = None,
    intermediates: int = 0,
    counters: Counters | None = None,
    on_step: OnStep = ignored,
) -> Iterator[DecodedGroup]:
    """:func:`sample` a group and decode it: ``intermediates`` frames of ẑ0, then the final one (timestep 0).

    ``start`` and ``condition`` take the place of the group's own noise and conditions.
    """
    counters, n = counters or Counters(), len(group.trajectories)
    if condition is None:
        condition = prior.encode(group.conditions(prior.conditioning))
    if start is None:
        start = prior.start(group.noise(seed, prior.latent_shape).to(prior.device))
    store = intermediate_steps(intermediates, len(prior.timesteps))

    def rngs(step: int) -> list[torch.Generator]:
        return [torch_rng(seed, "step", trajectory, step) for trajectory in group.trajectories]

    timesteps = [*prior.timesteps, 0]
    for step, z in sample(
        prior, start, condition, guide=guide, mix=mix, store=store, rngs=rngs if prior.stochastic else None,
        on_step=on_step,
    ):  # fmt: skip
        decoded = DecodedGroup(step, timesteps[step], prior.decode(z), mix.record() if mix else [[] for _ in range(n)])
        if guide is not None:
            decoded.losses, decoded.skipped = guide.losses, guide.skipped.tolist()
        counters.decodes += 1
        yield decoded
    counters.evaluations += len(prior.timesteps) - start.step
    if guide is not None:
        counters.guided_steps += guide.steps
        counters.updates += guide.steps * guide.settings.updates_per_step
        counters.skipped_updates += int(guide.skipped.sum())


def intermediate_steps(count: int, steps: int) -> set[int]:
    """The steps at which ``count`` x0-predictions are stored, evenly spaced: j·steps/(count + 1) for j = 1…count.

    >>> sorted(intermediate_steps(4, 50))
    [10, 20, 30, 40]
    """
    return {round(j * steps / (count + 1)) for j in range(1, count + 1)}


def check_intermediates(count: int, timesteps: Sequence[int]) -> None:
    """Raises UsageError where one of ``count`` x0-predictions would be stored at timestep 0 of a prior's ``timesteps``,
    which marks final images."""

    def clash(count: int) -> bool:
        return any(timesteps[step] == 0 for step in intermediate_steps(count, len(timesteps)))

    if clash(count):
        most = next(fewer for fewer in range(count, -1, -1) if not clash(fewer))
        raise UsageError(
            f"images.intermediates {count}: the last of them is at timestep 0 of this prior's schedule, as only final "
            f"images are; set at most {most}"
        )


@dataclass(frozen=True)
class Models:
    """What a worker loads once, on ``device``; ``adversary`` is a frozen student or None.

    ``decode`` is the decoder of guidance (None: the prior's own); ``on_step`` watches every step of every method.
    ``population``: the shard's earlier groups, where guidance matches their statistics, too.
    """

    prior: DiffusionPrior | None  # None for methods that invert the teacher
    teacher: Teacher
    adversary: Teacher | None
    device: str
    decode: Decode | None = None
    on_step: OnStep = ignored
    population: Population | None = None

    def limit_batches(self, limit: int | None) -> None:
        """Let no network see more than ``limit`` trajectories at once (None: any number), to save memory."""
        for model in (self.prior, self.teacher, self.adversary):
            if model is not None:
                model.batch_limit = limit

    def guidance(self, group: Group, settings: SynthSettings, seed: int) -> Guidance:
        """The guidance of ``group``; ``seed`` decides its random views."""
        assert self.prior is not None
        return Guidance(
            self.prior,
            self.teacher,
            torch.tensor(group.labels, device=self.device),
            settings.guidance,
            adversary=self.adversary,
            decode=self.decode,
            rng=lambda step: torch_rng(seed, "shift", group.index, step),
            population=self.population,
        )


def diffdfkd(models: Models, group: Group, settings: SynthSettings, counters: Counters) -> Iterator[DecodedGroup]:
    """DiffDFKD (Qi et al.): L = w_ce·CE + w_bn·BN + w_adv·ADV (equation 9), ẑ0 ← ẑ0 − s·∇L (10), latent CutMix (11),
    then the scheduler's step (5)."""
    prior, seed = models.prior, settings.seed
    assert prior is not None
    return denoise(
        prior,
        group,
        seed,
        guide=models.guidance(group, settings, seed),
        mix=LatentMix(settings.lca, group, seed, prior.timesteps, prior.latent_shape),
        intermediates=settings.images.intermediates,
        counters=counters,
        on_step=models.on_step,
    )


def dmkd(models: Models, group: Group, settings: SynthSettings, counters: Counters) -> Iterator[DecodedGroup]:
    """DM-KD (Li et al. 2023): plain samples of the prior. The baseline, and the source of generate-then-select
    (``min_confidence`` marks as kept what the teacher agrees with)."""
    assert models.prior is not None
    return denoise(
        models.prior,
        group,
        settings.seed,
        intermediates=settings.images.intermediates,
        counters=counters,
        on_step=models.on_step,
    )
