"""Traditional augmentation of a latent (DiffDFKD, table IV): flip, small shift, or crop and resize, as one window.

A window (y, x, h, w) of the latent, its edges repeated where it reaches beyond, is stretched to the whole by nearest
cells, and mirrored where w is negative. Cells are copied, never averaged: noise keeps its variance.
"""

from collections.abc import Sequence
from random import Random

import torch
from torch import Tensor

SHIFT = 1 / 8  # of the side, at most: the 4 pixels of 32 that are customary
CROP = 3 / 4  # of the side, at least


def draw_window(rng: Random, height: int, width: int) -> tuple[int, int, int, int]:
    """One of the three, equally likely: ``(y, x, h, w)`` in cells."""
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
    offset = (torch.arange(side) * 2 + 1) * abs(length) // (2 * side)  # the cell under each centre
    index = (start + offset).clamp(0, side - 1)
    return index.flip(0) if length < 0 else index
