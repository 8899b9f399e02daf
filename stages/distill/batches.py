"""From an epoch's order to batches of augmented views, over images decoded once or as needed."""

import itertools
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from manifests.errors import DataError, UsageError
from stages.distill.rows import EpochOrder, Ints, Rows, repeats
from stages.distill.runtime import ALONE, Ranks
from stages.distill.streaming import FETCHED_AHEAD, Stream, StreamedPixels
from stages.distill.views import Views, apply_views, draw_views, mix, turns
from stages.models.inputs import to_unit
from stages.settings import DistillSettings

CHUNK = 1024
AT_ONCE = 256 << 20
"""Bytes of decoded images that a network is shown at once, where nothing else bounds them."""
AHEAD = 2
"""Batches prepared before they are needed."""


class Pixels(Protocol):
    """Stored images by row number: decoded once and kept, or decoded as they are needed."""

    def take(self, rows: Ints) -> Tensor:
        """uint8 ``[n, side, side, 3]`` of ``rows``, in that order."""

    def begin(self, order: Ints) -> None:
        """An epoch begins, in this order."""

    def expect(self, rows: Ints) -> None:
        """``rows`` will be taken soon, together."""


class CachedPixels:
    """Every image decoded once, kept as one uint8 tensor on ``device``."""

    def __init__(self, rows: Rows, side: int, device: torch.device, stream: Stream | None = None):
        self.pixels = torch.empty(len(rows), side, side, 3, dtype=torch.uint8)
        source = StreamedPixels(rows, side, torch.device("cpu"), stream, whole=True)
        source.begin(np.arange(len(rows)))
        size = images_at_once(CHUNK, side**2 * 3)
        chunks = [np.arange(start, min(start + size, len(rows))) for start in range(0, len(rows), size)]
        for chunk, following in zip(chunks, [*chunks[1:], None], strict=True):
            if following is not None:
                source.expect(following)
            self.pixels[chunk[0] : chunk[-1] + 1] = source.take(chunk)
        self.pixels = self.pixels.to(device)

    def begin(self, order: Ints) -> None:
        """They are here."""

    def expect(self, rows: Ints) -> None:
        """They are here."""

    def take(self, rows: Ints) -> Tensor:
        return self.pixels.index_select(0, torch.from_numpy(rows).to(self.pixels.device))


def images_at_once(most: int, size: int) -> int:
    """How many images of ``size`` bytes, decoded, a network is shown at once: ``most``, fewer where they are large."""
    return min(most, max(1, AT_ONCE // size))


def open_pixels(rows: Rows, memory_gb: float, device: torch.device, stream: Stream | None = None) -> Pixels:
    """Cached where all images fit ``memory_gb``, else streamed. Raises DataError for images of unequal size."""
    side = rows.selections[0].info.image_size
    for selection in rows.selections:
        if selection.info.image_size != side:
            raise DataError(
                f"{selection.url}: images of {selection.info.image_size} pixels, "
                f"but {rows.selections[0].url} has {side}; distill from manifests of one size"
            )
    fits = len(rows) * side * side * 3 <= memory_gb * 1e9
    return (CachedPixels if fits else StreamedPixels)(rows, side, device, stream)


@dataclass(frozen=True)
class Batch:
    """``x [n, 3, h, w]`` in [−1, 1]; ``lam [n]`` is the share of the own label where a view mixes two images;
    ``derived [n]`` is 1 for images made from another one; ``rows [n]`` and ``turns [n]``: which view of which row.
    Where several processes share a batch, these are the part of one; the whole batch has ``count`` images,
    ``derived_count`` of them derived.
    """

    x: Tensor
    labels: Tensor
    partner_labels: Tensor
    lam: Tensor
    derived: Tensor
    rows: Ints
    turns: Ints
    count: int
    derived_count: int

    @property
    def share(self) -> float:
        """This part of the whole batch, 0 … 1."""
        return len(self.rows) / self.count


@dataclass(frozen=True)
class _Epoch:
    """Everything about an epoch but its pixels, drawn at once: the rows in order, their views."""

    number: int
    order: Ints
    turns: Ints
    views: Views
    mixes: bool


def batch_bounds(length: int, batch_size: int) -> Ints:
    """Where the batches of an epoch begin and end: they differ in size by at most one and use every image.

    >>> batch_bounds(10, 4).tolist()
    [0, 5, 10]
    """
    steps = max(1, min(round(length / batch_size), length // 2))
    return np.linspace(0, length, steps + 1).round().astype(np.int64)


def check_parts(length: int, batch_size: int, workers: int) -> None:
    """Raises UsageError where a batch of an epoch of ``length`` images is too small to be shared by ``workers``."""
    least = int(np.diff(batch_bounds(length, batch_size)).min())
    if workers > 1 and least < 2 * workers:
        raise UsageError(
            f"batches of {least} images (of {length} in all) cannot be shared by {workers} workers: each needs 2 or "
            "more; lower --workers or raise --batch-size"
        )


class Batches:
    """All batches of a run, or the parts of one process among ``ranks``: the same images in the same order."""

    def __init__(
        self,
        rows: Rows,
        order: EpochOrder,
        pixels: Pixels,
        settings: DistillSettings,
        device: torch.device,
        ranks: Ranks = ALONE,
    ):
        self.rows, self.order, self.pixels, self.settings, self.device = rows, order, pixels, settings, device
        self.ranks = ranks
        self.side = rows.selections[0].info.image_size
        self.bounds = batch_bounds(order.length, settings.batch_size)
        self.steps = len(self.bounds) - 1
        self._labels = torch.from_numpy(rows.label).to(device)
        self._derived = torch.from_numpy(rows.derived.astype(np.float32)).to(device)
        self._epochs: dict[int, _Epoch] = {}

    def stream(self, first: int, stop: int) -> Generator[Batch]:
        """Batches of the steps ``first`` … ``stop - 1`` of the run, prepared ``AHEAD`` of their use in one thread."""
        unannounced = iter(range(first, stop))

        def make(step: int) -> Batch:
            for later in itertools.islice(unannounced, FETCHED_AHEAD if step == first else 1):
                epoch, _, seen = self._part(later)
                self.pixels.expect(epoch.order[seen])
            return self.make(step)

        with ThreadPoolExecutor(1, thread_name_prefix="batch") as pool:
            waiting: deque[Future[Batch]] = deque()
            for step in range(first, stop + AHEAD):
                if step < stop:
                    waiting.append(pool.submit(make, step))
                if step >= first + AHEAD and waiting:
                    yield waiting.popleft().result()

    def make(self, step: int) -> Batch:
        """The batch of one step of the run. A view's partner is the sample that follows it in the epoch's order."""
        epoch, whole, here = self._part(step)
        views = epoch.views.at(here).to(self.device)
        x = to_unit(apply_views(self.pixels.take(epoch.order[here]), views))
        following = epoch.order[(here + 1) % len(epoch.order)]
        if epoch.mixes:
            here, following, views = here[:-1], following[:-1], views.at(slice(-1))
            x = mix(x[:-1], x[1:], views)
        rows = epoch.order[here]
        index, other = (torch.from_numpy(each).to(self.device) for each in (rows, following))
        labels, partners = self._labels[index], self._labels[other]
        derived = int(self.rows.derived[epoch.order[whole]].sum())
        return Batch(x, labels, partners, views.lam, self._derived[index], rows, epoch.turns[here], len(whole), derived)

    def _part(self, step: int) -> tuple[_Epoch, Ints, Ints]:
        """The epoch of a step; where in its order the batch lies, and what this process sees of it: its part, and the
        partner of the last view where views are mixed."""
        number, place = divmod(step, self.steps)
        if number not in self._epochs:
            self._epochs = {each: epoch for each, epoch in self._epochs.items() if each == number - 1}
            self._epochs[number] = self._drawn(number)
            self.pixels.begin(self._epochs[number].order[self.bounds[place] :])
        epoch = self._epochs[number]
        whole = np.arange(self.bounds[place], self.bounds[place + 1])
        here = whole[self.ranks.part(len(whole))]
        if epoch.mixes:
            here = np.append(here, (here[-1] + 1) % len(epoch.order))
        return epoch, whole, here

    def _drawn(self, number: int) -> _Epoch:
        settings, order = self.settings, self.order(number)
        taken = turns(settings.augment, number, repeats(order))
        views = draw_views(settings.augment, self.side, settings.seed, number, self.rows.ids[order], taken)
        return _Epoch(number, order, taken.astype(np.int64), views, views.mixes)

    def fixed(self, rows: Ints, turn: int) -> Tensor:
        """View number ``turn`` of ``rows`` where views are fixed, ``[n, 3, h, w]`` in [−1, 1]."""
        taken = np.full(len(rows), turn, np.uint64)
        views = draw_views(self.settings.augment, self.side, self.settings.seed, 0, self.rows.ids[rows], taken)
        return to_unit(apply_views(self.pixels.take(rows), views.to(self.device)))

    def chunk(self, most: int = 512) -> int:
        """How many images to look at at once outside of training: ``most``, fewer where they are large."""
        return images_at_once(most, 3 * self.side**2)

    def plain(self, rows: Ints) -> Iterator[tuple[Ints, Tensor]]:
        """``rows`` unaugmented, as (row numbers, images ``[n, 3, h, w]`` in [−1, 1])."""
        size = self.chunk()
        for start in range(0, len(rows), size):
            chunk = rows[start : start + size]
            yield chunk, to_unit(self.pixels.take(chunk))
