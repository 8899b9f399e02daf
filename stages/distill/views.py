"""Augmented views: drawn as a pure function of (seed, epoch, sample), applied to a batch of stored pixels at once."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stages.seeds import Ids, mixed, uniform
from stages.settings import AugmentSettings


class Views(NamedTuple):
    """What happens to each of ``n`` images: shift ``[n]`` in pixels, flip ``[n]``, and how it is mixed with a partner.

    ``lam [n]`` is the share that the image itself keeps (1: not mixed); ``box [n, 4]`` is y, x, height, width of what
    its partner replaces (height 0: blended instead). ``crop [n, 4]`` is y, x, height, width of what is resized to the
    whole image, ``color [n, 3]`` the factors of :data:`COLORS`; None: not done.
    """

    dy: Tensor
    dx: Tensor
    flip: Tensor
    lam: Tensor
    box: Tensor
    crop: Tensor | None = None
    color: Tensor | None = None

    def at(self, index: Ids | npt.NDArray[np.int64] | slice) -> "Views":
        """The views of some of the images."""
        return Views._make(part if part is None else part[index] for part in self)

    def to(self, device: torch.device | str) -> "Views":
        return Views._make(part if part is None else part.to(device) for part in self)


COLORS = ("brightness", "contrast", "saturation")
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow's and torchvision's
WIDEST = 4 / 3


def turns(settings: AugmentSettings, epoch: int, repeats: Ids) -> Ids:
    """Which of its views each sample shows; ``repeats`` counts its earlier draws in this epoch.

    Fixed views take turns; others are new in every epoch, and only draws of one epoch need to be told apart.
    """
    return (np.uint64(epoch) + repeats) % np.uint64(settings.num_views) if settings.num_views else repeats


def draw_views(settings: AugmentSettings, side: int, seed: int, epoch: int, ids: Ids, taken: Ids) -> Views:
    """Views for samples ``ids``; ``taken``: see :func:`turns`."""
    when = "fixed" if settings.num_views else str(epoch)

    def draw(purpose: str) -> np.ndarray:
        return uniform(seed, f"{purpose}/{when}", mixed(ids ^ mixed(taken)))

    reach = round(settings.crop * side)
    dy, dx = (np.floor(draw(axis) * (2 * reach + 1)).astype(np.int64) - reach for axis in ("dy", "dx"))
    flip = np.zeros(len(ids), bool)
    if settings.flip:  # alternating: a sample's two sides take turns, the first one random
        since = taken if settings.num_views else np.uint64(epoch) + taken
        flip = (np.floor(uniform(seed, "side", ids) * 2).astype(np.uint64) + since) % 2 == 1
    lam, box = np.ones(len(ids)), np.zeros((len(ids), 4), np.int64)
    if settings.cutmix or settings.mixup:
        kind, share = draw("mix"), draw("lam")
        cut = kind < settings.cutmix
        blend = ~cut & (kind < settings.cutmix + settings.mixup)
        box = np.where(cut[:, None], boxes(share, draw("cy"), draw("cx"), side), 0)
        lam = np.where(blend, share, 1 - box[:, 2] * box[:, 3] / side**2)
    tensors = [torch.from_numpy(array) for array in (dy, dx, flip, lam.astype(np.float32), box)]
    crop = color = None
    if settings.crop_scale[0] < 1:
        area, ratio, top, left = (draw(purpose) for purpose in ("scale", "ratio", "top", "left"))
        crop = torch.from_numpy(crops(settings.crop_scale, area, ratio, top, left, side))
    reaches = [getattr(settings, name) for name in COLORS]
    if any(reaches):
        factors = [1 + (2 * draw(name) - 1) * each for name, each in zip(COLORS, reaches, strict=True)]
        color = torch.from_numpy(np.stack(factors, 1).astype(np.float32))
    return Views._make([*tensors, crop, color])


def crops(
    scale: tuple[float, float], area: np.ndarray, ratio: np.ndarray, top: np.ndarray, left: np.ndarray, side: int
) -> np.ndarray:
    """Boxes of random resized crops (Szegedy et al. 2015) ``[n, 4]`` from numbers in [0, 1): the area is uniform within
    ``scale``, the ratio log-uniform from 3/4 to 4/3 among those whose box fits (torchvision draws until one does)."""
    area = scale[0] + (scale[1] - scale[0]) * area
    widest = np.minimum(np.log(WIDEST), -np.log(area))
    ratio = np.exp((2 * ratio - 1) * widest)
    height, width = (
        np.clip(np.round(side * np.sqrt(each)), 1, side).astype(np.int64) for each in (area / ratio, area * ratio)
    )
    y, x = (np.floor(u * (side - size + 1)).astype(np.int64) for u, size in ((top, height), (left, width)))
    return np.stack([y, x, height, width], 1)


def boxes(lam: np.ndarray, cy: np.ndarray, cx: np.ndarray, side: int) -> np.ndarray:
    """CutMix boxes (Yun et al. 2019) ``[n, 4]``: sides √(1−λ) of the image's, centres in [0, 1), clipped."""
    length = np.round(side * np.sqrt(1 - lam)).astype(np.int64)
    ranges = []
    for center in (cy, cx):
        low = np.floor(center * side).astype(np.int64) - length // 2
        start = np.maximum(low, 0)
        ranges += [start, np.minimum(low + length, side) - start]
    return np.stack([ranges[0], ranges[2], ranges[1], ranges[3]], 1)


def apply_views(pixels: Tensor, views: Views) -> Tensor:
    """Everything but mixing, of uint8 ``[n, h, w, 3]``; the result is float (0 … 255) where it is cropped or colored.

    Every sum is elementwise or of integers: an image's view is the same bits in any batch.
    """
    pixels = _shifted(pixels, views)
    if views.crop is not None:
        pixels = resized_crop(pixels, views.crop)
    return pixels if views.color is None else color_jitter(pixels, views.color)


def _shifted(pixels: Tensor, views: Views) -> Tensor:
    """Shift (edges reflected) and flip in one gather."""
    n, h, w, _ = pixels.shape
    device = pixels.device
    rows = _reflected(torch.arange(h, device=device) + views.dy[:, None], h)
    columns = torch.arange(w, device=device).expand(n, w)
    columns = torch.where(views.flip[:, None], w - 1 - columns, columns)
    columns = _reflected(columns + views.dx[:, None], w)
    first = torch.arange(n, device=device)[:, None, None] * (h * w)
    flat = (first + rows[:, :, None] * w + columns[:, None, :]).flatten()
    return pixels.reshape(-1, 3).index_select(0, flat).view(n, h, w, 3)


def resized_crop(pixels: Tensor, crop: Tensor) -> Tensor:
    """Boxes ``[n, 4]`` of ``[n, h, w, 3]``, resized to float ``[n, h, w, 3]`` (bilinear, as ``F.interpolate`` of each
    box alone; a box is never larger than its image, so nothing has to be averaged)."""
    for dim in (1, 2):
        start, length = crop[:, dim - 1, None], crop[:, dim + 1, None]
        size, shape = pixels.shape[dim], [-1, 1, 1, 1]
        shape[dim] = size
        place = ((torch.arange(size, device=pixels.device) + 0.5) * length / size - 0.5).clamp_min(0)
        low = place.floor().long().minimum(length - 1)
        high = (low + 1).minimum(length - 1)
        a, b = (pixels.gather(dim, (start + each).view(shape).expand(pixels.shape)).float() for each in (low, high))
        pixels = a + (place - low).view(shape) * (b - a)
    return pixels


def color_jitter(pixels: Tensor, factors: Tensor) -> Tensor:
    """Brightness, contrast and saturation, in this order, of ``[n, h, w, 3]`` in 0 … 255: blended by ``factors [n, 3]``
    with black, the image's mean gray (of whole numbers, as Pillow's) and each pixel's gray, then clamped."""

    def blended(x: Tensor, other: Tensor | float, factor: Tensor) -> Tensor:
        factor = factor[:, None, None, None]
        return (factor * x + (1 - factor) * other).clamp(0, 255)

    x = blended(pixels.float(), 0.0, factors[:, 0])
    mean = _gray(x).round().long().sum((1, 2, 3), keepdim=True) / (x.shape[1] * x.shape[2])
    x = blended(x, mean, factors[:, 1])
    return blended(x, _gray(x), factors[:, 2])


def _gray(x: Tensor) -> Tensor:
    red, green, blue = (weight * x[..., channel, None] for channel, weight in enumerate(LUMA))
    return red + green + blue


def mix(images: Tensor, partners: Tensor, views: Views) -> Tensor:
    """``[n, 3, h, w]`` images in which each partner's box is pasted, or its share 1 − λ blended in."""
    h, w = images.shape[-2:]
    y, x, height, width = (views.box[:, i, None] for i in range(4))
    rows, columns = torch.arange(h, device=images.device), torch.arange(w, device=images.device)
    inside_y, inside_x = (rows >= y) & (rows < y + height), (columns >= x) & (columns < x + width)
    outside = 1 - (inside_y[:, None, :, None] & inside_x[:, None, None, :]).float()
    keep = torch.where(height[:, :, None, None] > 0, outside, views.lam[:, None, None, None])
    return keep * images + (1 - keep) * partners


def _reflected(index: Tensor, size: int) -> Tensor:
    index = index.abs()
    return torch.where(index >= size, 2 * (size - 1) - index, index)
