"""Random views of images for contrastive inversion: crops, shifts and flips, each image its own.

A view is two small matrices an image (rows, columns), so that its gradient is a matrix product: the same numbers on
every run, which grid sampling does not promise on a GPU.
"""

import math

import torch
from torch import Tensor

RATIO = 4 / 3  # greatest ratio of a crop's sides


def draw_crops(n: int, area: tuple[float, float], flip: bool, rng: torch.Generator) -> Tensor:
    """Windows ``[n, 4]`` (y, x, height, width as shares of the side; mirrored where the width is negative): a random
    share of the area with sides of random ratio, as in Inception's crops (Szegedy et al. 2015)."""
    u = torch.rand(n, 5, generator=rng)
    share = area[0] + (area[1] - area[0]) * u[:, 0]
    ratio = torch.exp((2 * u[:, 1] - 1) * math.log(RATIO))
    h, w = ((share / ratio).sqrt().clamp_max(1), (share * ratio).sqrt().clamp_max(1))
    return torch.stack([u[:, 2] * (1 - h), u[:, 3] * (1 - w), h, mirrored(w, u[:, 4], flip)], 1)


def draw_shifts(n: int, side: int, limit: float, flip: bool, rng: torch.Generator) -> Tensor:
    """Windows ``[n, 4]`` of the whole size, off by whole pixels up to ``limit`` of ``side``."""
    reach = round(limit * side)
    moved = torch.randint(-reach, reach + 1, (n, 2), generator=rng) / side
    one = torch.ones(n)
    return torch.cat([moved, one[:, None], mirrored(one, torch.rand(n, generator=rng), flip)[:, None]], 1)


def mirrored(width: Tensor, u: Tensor, flip: bool) -> Tensor:
    return torch.where(u < 0.5, -width, width) if flip else width


def views(images: Tensor, windows: Tensor) -> Tensor:
    """``images [n, c, s, s]`` seen through ``windows``, stretched to the same size; edges are repeated."""
    side = images.shape[-1]
    rows = weights(windows[:, 0], windows[:, 2], side).to(images)
    columns = weights(windows[:, 1], windows[:, 3], side).to(images)
    return rows[:, None] @ images @ columns[:, None].transpose(-1, -2)


def weights(start: Tensor, length: Tensor, side: int) -> Tensor:
    """Bilinear weights ``[n, side, side]`` of the pixels under each pixel of the view (backwards: negative length).

    >>> weights(torch.tensor([0.5]), torch.tensor([1.0]), 2).tolist()
    [[[0.0, 1.0], [0.0, 1.0]]]
    """
    centres = (torch.arange(side) + 0.5) / side
    along = torch.where(length[:, None] < 0, 1 - centres, centres) * length.abs()[:, None]
    position = ((start[:, None] + along) * side - 0.5).clamp(0, side - 1)
    return (1 - (position[:, :, None] - torch.arange(side)).abs()).clamp_min(0)
