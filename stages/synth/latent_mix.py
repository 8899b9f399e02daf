"""Latent augmentation between two denoising steps (DiffDFKD, section III-D): latent CutMix and the kinds of table IV.

``cutmix`` is the method's own (LCA): a box of another trajectory of the class. ``mixup`` (Zhang et al. 2018) blends
with one, ``traditional`` flips, shifts, or crops and resizes. z, the network's output, ẑ0 and the solver's memory all
go through the same, or eps would no longer be that of z. The steps that remain let the prior repair the seams.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from torch import Tensor

from stages.seeds import python_rng
from stages.settings import LatentMixSettings
from stages.synth.group import Group
from stages.synth.priors.schedule import Prediction


@dataclass(frozen=True)
class Mix:
    """One change of one latent; with the kind, the latents before it and this record give the latent after it exactly.

    ``partner``: a position in the group. ``y, x, h, w`` in latent cells and ``lam`` by kind:

    - cutmix: the box that comes from the partner, and the share of cells kept;
    - mixup: the whole latent, and λ of λ·own + (1 − λ)·partner (a float32);
    - traditional: the window of the own latent (``partner`` is itself, ``lam`` 1) that is stretched to the whole.
    """

    step: int
    timestep: int
    partner: int
    y: int
    x: int
    h: int
    w: int
    lam: float


class LatentMix:
    """Mixes latents of a group's trajectories (equation 11): called with a prediction at a step where it is
    :meth:`active`. Keeps who was mixed with whom."""

    def __init__(
        self, settings: LatentMixSettings, group: Group, seed: int, timesteps: Sequence[int], shape: Sequence[int]
    ) -> None:
        self.settings, self.group, self.seed, self.timesteps, self.shape = settings, group, seed, timesteps, shape
        self._mixes: list[list[Mix]] = [[] for _ in group.trajectories]

    def record(self) -> list[list[Mix]]:
        """For each trajectory the mixes that it went through so far."""
        return [list(mixes) for mixes in self._mixes]

    def active(self, step: int) -> bool:
        """Whether step ``step`` of the schedule mixes."""
        return self.settings.at(step, len(self.timesteps))

    def __call__(self, x: Prediction) -> Prediction:
        drawn = draw_mixes(self.settings, self.group, self.seed, x.step, self.timesteps[x.step], self.shape)
        for position, mix in drawn.items():
            self._mixes[position].append(mix)
        return x.mapped(mixing(drawn, len(x.z), self.shape, self.settings.kind, x.z.device))


def draw_mixes(
    settings: LatentMixSettings, group: Group, seed: int, step: int, timestep: int, shape: Sequence[int]
) -> dict[int, Mix]:
    """The mixes of one step by receiving position: a pure function of ``(settings, group, seed, step)``.

    Partners are of the same class; a trajectory without one goes unmixed (but for the traditional kinds).
    """
    if settings.pairs == "permutation":
        return draw_permutations(settings, group, seed, step, timestep, shape)
    height, width = shape[-2:]
    mixes = {}
    for position, (trajectory, label) in enumerate(zip(group.trajectories, group.labels, strict=True)):
        rng = python_rng(seed, "lca", trajectory, step)
        partners = [p for p, other in enumerate(group.labels) if other == label and p != position]
        if settings.kind == "traditional":
            partners = [position]
        if not partners or rng.random() >= settings.probability:
            continue
        partner = rng.choice(partners)
        y, x, h, w, lam = draw_region(settings, rng, height, width)
        if h and w:
            mixes[position] = Mix(step, timestep, partner, y, x, h, w, lam)
    return mixes


def draw_permutations(
    settings: LatentMixSettings, group: Group, seed: int, step: int, timestep: int, shape: Sequence[int]
) -> dict[int, Mix]:
    """As DiffDFKD's public code mixes its batches of one class: one permutation of the class and one box (MixUp: one λ)
    for all, so that every latent of the class stays whole, in two parts. What meets itself stays as it is.

    ``probability`` is that of a class.
    """
    height, width = shape[-2:]
    mixes: dict[int, Mix] = {}
    for label in sorted({*group.labels}):
        rng = python_rng(seed, "lca", "class", group.index, label, step)
        positions = [position for position, other in enumerate(group.labels) if other == label]
        partners = rng.sample(positions, len(positions))
        y, x, h, w, lam = draw_region(settings, rng, height, width)
        if h and w and rng.random() < settings.probability:
            pairs = zip(positions, partners, strict=True)
            mixes |= {own: Mix(step, timestep, other, y, x, h, w, lam) for own, other in pairs if own != other}
    return mixes


def draw_region(settings: LatentMixSettings, rng: Random, height: int, width: int) -> tuple[int, int, int, int, float]:
    """``y, x, h, w, lam`` of a :class:`Mix`."""
    if settings.kind == "traditional":
        return *draw_window(rng, height, width), 1.0
    lam = rng.betavariate(settings.alpha, settings.alpha)
    if settings.kind == "mixup":
        return 0, 0, height, width, float(np.float32(lam))  # as the manifest stores it
    y, x, h, w = draw_box(lam, rng.random(), rng.random(), height, width)
    return y, x, h, w, 1 - h * w / (height * width)


def draw_box(lam: float, cy: float, cx: float, height: int, width: int) -> tuple[int, int, int, int]:
    """CutMix's box (Yun et al. 2019): sides √(1−λ) of the latent's, center (cy, cx) in [0, 1), clipped to the latent.

    >>> draw_box(0.75, 0.5, 0.5, 8, 8), draw_box(0.75, 0.0, 0.0, 8, 8)
    ((2, 2, 4, 4), (0, 0, 2, 2))
    """
    share = math.sqrt(1 - lam)
    h, w = round(height * share), round(width * share)
    top, left = math.floor(cy * height) - h // 2, math.floor(cx * width) - w // 2
    y, x = max(top, 0), max(left, 0)
    return y, x, min(top + h, height) - y, min(left + w, width) - x


SHIFT = 1 / 8  # of the side, at most: the 4 pixels of 32 that are customary
CROP = 3 / 4  # of the side, at least


def draw_window(rng: Random, height: int, width: int) -> tuple[int, int, int, int]:
    """Traditional augmentation (table IV): flip, small shift, or crop and resize, equally likely, as one window
    ``(y, x, h, w)`` in cells.

    The window, its edges repeated where it reaches beyond, is stretched to the whole by nearest cells, and mirrored
    where w is negative. Cells are copied, never averaged: noise keeps its variance.
    """
    kind = rng.choice(("flip", "shift", "crop"))
    if kind == "flip":
        return 0, 0, height, -width
    if kind == "shift":
        down, right = (max(1, round(SHIFT * side)) for side in (height, width))
        return rng.randint(-down, down), rng.randint(-right, right), height, width
    h, w = (rng.randint(min(round(CROP * side), side - 1), side - 1) for side in (height, width))
    return rng.randint(0, height - h), rng.randint(0, width - w), h, w


def cells(windows: Sequence[tuple[int, int, int, int]], height: int, width: int) -> Tensor:
    """Where each cell of the result comes from: indices ``[n, 1, height·width]`` into the flattened latents.

    >>> cells([(0, 0, 1, -3)], 1, 3).tolist(), cells([(0, 1, 1, 3)], 1, 3).tolist()
    ([[[2, 1, 0]]], [[[1, 2, 2]]])
    """
    rows = torch.stack([_along(y, h, height) for y, _, h, _ in windows])
    columns = torch.stack([_along(x, w, width) for _, x, _, w in windows])
    return (rows[:, :, None] * width + columns[:, None, :]).flatten(1)[:, None]


def _along(start: int, length: int, side: int) -> Tensor:
    """``side`` indices spread over ``|length|`` cells from ``start``; backwards where ``length`` is negative."""
    offset = (torch.arange(side) * 2 + 1) * abs(length) // (2 * side)  # the cell under each center
    index = (start + offset).clamp(0, side - 1)
    return index.flip(0) if length < 0 else index


def mixing(
    mixes: dict[int, Mix], n: int, shape: Sequence[int], kind: str, device: torch.device | str = "cpu"
) -> Callable[[Tensor], Tensor]:
    """What ``mixes`` do to any tensor of latents ``[n, c, h, w]`` (equation 11); others stay bit for bit.

    Sources are the latents before any change, also where a partner is mixed itself.
    """
    height, width = shape[-2:]
    if kind == "traditional":
        whole = (0, 0, height, width)
        windows = [(m.y, m.x, m.h, m.w) if (m := mixes.get(p)) else whole for p in range(n)]
        index = cells(windows, height, width).to(device)
        return lambda x: x.flatten(2).gather(2, index.expand(-1, x.shape[1], -1)).view_as(x)
    partner = torch.tensor([mixes[p].partner if p in mixes else p for p in range(n)], device=device)
    share = shares(mixes, n, height, width, kind).to(device)
    return lambda x: torch.lerp(x, x[partner], share.to(x.dtype))


def shares(mixes: dict[int, Mix], n: int, height: int, width: int, kind: str) -> Tensor:
    """The partner's share of each cell ``[n, 1, h, w]``: 1 inside a box of cutmix, 1 − λ all over for mixup."""
    share = torch.zeros(n, 1, height, width)
    for position, m in mixes.items():
        share[position, :, m.y : m.y + m.h, m.x : m.x + m.w] = 1 - m.lam if kind == "mixup" else 1.0
    return share
