"""Stored images as uint8 tensors: decoded once and kept, or decoded as they are needed."""

from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from manifests.errors import DataError
from manifests.images import decode
from stages.distill.rows import Ints, Rows

CHUNK = 1024
AT_ONCE = 256 << 20
"""Bytes of decoded images that a network is shown at once, where nothing else bounds them."""


class Pixels(Protocol):
    """Images by row number."""

    def take(self, rows: Ints) -> Tensor:
        """uint8 ``[n, side, side, 3]`` of ``rows``, in that order."""


class CachedPixels:
    """Every image decoded once, kept as one uint8 tensor on ``device``."""

    def __init__(self, rows: Rows, side: int, device: torch.device):
        self.pixels = torch.empty(len(rows), side, side, 3, dtype=torch.uint8)
        for start in range(0, len(rows), CHUNK):
            some = np.arange(start, min(start + CHUNK, len(rows)))
            for row, data in zip(some.tolist(), rows.read(some), strict=True):
                self.pixels[row] = torch.from_numpy(_checked(rows, row, data, side).copy())
        self.pixels = self.pixels.to(device)

    def take(self, rows: Ints) -> Tensor:
        return self.pixels.index_select(0, torch.from_numpy(rows).to(self.pixels.device))


class StreamedPixels:
    """Nothing kept: images are read and decoded, in ``threads`` threads, whenever they are asked for."""

    def __init__(self, rows: Rows, side: int, device: torch.device, threads: int = 2):
        self.rows, self.side, self.device = rows, side, device
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def take(self, rows: Ints) -> Tensor:
        encoded = zip(rows.tolist(), self.rows.read(rows), strict=True)
        images = self._pool.map(lambda pair: _checked(self.rows, pair[0], pair[1], self.side), encoded)
        return torch.from_numpy(np.stack(list(images))).to(self.device)


def images_at_once(most: int, size: int) -> int:
    """How many images of ``size`` bytes, decoded, a network is shown at once: ``most``, fewer where they are large."""
    return min(most, max(1, AT_ONCE // size))


def open_pixels(rows: Rows, memory_gb: float, device: torch.device) -> Pixels:
    """Cached where all images fit ``memory_gb``, else streamed. Raises DataError for images of unequal size."""
    side = rows.selections[0].manifest.info.image_size
    for selection in rows.selections:
        if selection.manifest.info.image_size != side:
            raise DataError(
                f"{selection.manifest.url}: images of {selection.manifest.info.image_size} pixels, "
                f"but {rows.selections[0].manifest.url} has {side}; distil from manifests of one size"
            )
    fits = len(rows) * side * side * 3 <= memory_gb * 1e9
    return CachedPixels(rows, side, device) if fits else StreamedPixels(rows, side, device)


def _checked(rows: Rows, row: int, data: bytes, side: int) -> np.ndarray:
    try:
        return decode(data, side)
    except ValueError as error:
        raise DataError(f"{rows.name(row)}: {error}") from None
