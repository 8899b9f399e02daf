"""Latent CutMix augmentation (LCA): DiffDFKD equation 11, between two trajectories of one class and group.

A box of area 1 − λ is cut from the partner's latent; the prior heals the seams in the steps that remain.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.synth.groups import Group
from stages.synth.seeds import python_rng
from stages.synth.settings import LatentCutMixSettings


@dataclass(frozen=True)
class Cut:
    """One box, in latent cells; ``partner`` is a position in the group, ``lam`` the share kept after clipping."""

    step: int
    timestep: int
    partner: int
    y: int
    x: int
    h: int
    w: int
    lam: float


def due(settings: LatentCutMixSettings, step: int, steps: int) -> bool:
    """Whether step ``step`` (0 = first) of ``steps`` cuts. Step 0 is pure noise, so it never does."""
    low, high = settings.interval
    return settings.every > 0 and step > 0 and step % settings.every == 0 and low <= step / steps < high


def draw_box(lam: float, cy: float, cx: float, height: int, width: int) -> tuple[int, int, int, int]:
    """CutMix's box (Yun et al. 2019): sides √(1−λ) of the latent's, centre (cy, cx) in [0, 1), clipped to the latent.

    >>> draw_box(0.75, 0.5, 0.5, 8, 8), draw_box(0.75, 0.0, 0.0, 8, 8)
    ((2, 2, 4, 4), (0, 0, 2, 2))
    """
    share = math.sqrt(1 - lam)
    h, w = round(height * share), round(width * share)
    top, left = math.floor(cy * height) - h // 2, math.floor(cx * width) - w // 2
    y, x = max(top, 0), max(left, 0)
    return y, x, min(top + h, height) - y, min(left + w, width) - x


def draw_cuts(
    settings: LatentCutMixSettings, group: Group, seed: int, step: int, timestep: int, shape: Sequence[int]
) -> dict[int, Cut]:
    """The cuts of one step by receiving position: a pure function of ``(settings, group, seed, step)``."""
    height, width = shape[-2:]
    cuts = {}
    for position, (trajectory, label) in enumerate(zip(group.trajectories, group.labels, strict=True)):
        rng = python_rng(seed, "lca", trajectory, step)
        partners = [p for p, other in enumerate(group.labels) if other == label and p != position]
        if not partners or rng.random() >= settings.probability:
            continue
        partner = rng.choice(partners)
        lam = rng.betavariate(settings.alpha, settings.alpha)
        y, x, h, w = draw_box(lam, rng.random(), rng.random(), height, width)
        if h > 0 and w > 0:
            cuts[position] = Cut(step, timestep, partner, y, x, h, w, 1 - h * w / (height * width))
    return cuts


def box_mask(cuts: dict[int, Cut], count: int, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Boolean ``[count, 1, h, w]``, set inside each position's box."""
    mask = torch.zeros(count, 1, *shape[-2:], dtype=torch.bool)
    for position, cut in cuts.items():
        mask[position, :, cut.y : cut.y + cut.h, cut.x : cut.x + cut.w] = True
    return mask.to(device)


def partners(cuts: dict[int, Cut], count: int, device: torch.device | str = "cpu") -> Tensor:
    """Partner position per trajectory ``[count]``; itself where nothing is cut."""
    return torch.tensor([cuts[p].partner if p in cuts else p for p in range(count)], device=device)
