"""From an epoch's order to batches of augmented views."""

import itertools
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from manifests.errors import UsageError
from stages.distill.rows import EpochOrder, Ints, Rows, repeats
from stages.distill.runtime import ALONE, Ranks
from stages.distill.streaming import FETCHED_AHEAD, Pixels, images_at_once
from stages.distill.views import Views, apply_views, draw_views, mix, turns
from stages.models.inputs import to_unit
from stages.settings import DistillSettings

AHEAD = 2
"""Batches prepared before they are needed."""


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


def localize(order: Ints, home: Ints, bounds: Ints, partitions: int) -> Ints:
    """The same ``order``, rearranged so that part p of ``partitions`` of every batch comes from partition p alone.

    A partition is a range of ``home``, the place of each row in storage; the ranges hold as many images as the parts of
    the batches have room for, and images of one partition keep their order. As the order does, the result depends on
    nothing but its arguments: how many processes share the batches changes only who reads what.

    >>> localize(np.array([3, 0, 2, 1]), np.arange(4), np.array([0, 2, 4]), 2).tolist()
    [0, 3, 1, 2]
    """
    sizes = np.repeat(np.diff(bounds), np.diff(bounds))
    within = np.arange(len(order)) - np.repeat(bounds[:-1], np.diff(bounds))
    part = (partitions * (within + 1) - 1) // sizes  # as Ranks.part divides a batch
    owner = np.empty_like(part)
    owner[np.argsort(home[order], kind="stable")] = np.sort(part)
    out = np.empty_like(order)
    out[np.argsort(part, kind="stable")] = order[np.argsort(owner, kind="stable")]
    return out


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
        self._mixes = settings.augment.cutmix + settings.augment.mixup > 0
        self._labels = torch.from_numpy(rows.label).to(device)
        self._derived = torch.from_numpy(rows.derived.astype(np.float32)).to(device)
        self._epochs: dict[int, tuple[Ints, Ints, Views]] = {}  # order, turns and views of each

    def stream(self, first: int, stop: int) -> Generator[Batch]:
        """Batches of the steps ``first`` … ``stop - 1`` of the run, prepared ``AHEAD`` of their use in one thread."""
        unannounced = iter(range(first, stop))

        def make(step: int) -> Batch:
            for later in itertools.islice(unannounced, FETCHED_AHEAD if step == first else 1):
                (order, *_), _, seen = self._part(later)
                self.pixels.expect(order[seen])
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
        (order, taken, every), whole, here = self._part(step)
        views = every.at(here).to(self.device)
        x = to_unit(apply_views(self.pixels.take(order[here]), views))
        following = order[(here + 1) % len(order)]
        if self._mixes:
            here, following, views = here[:-1], following[:-1], views.at(slice(-1))
            x = mix(x[:-1], x[1:], views)
        rows = order[here]
        index, other = (torch.from_numpy(each).to(self.device) for each in (rows, following))
        labels, partners = self._labels[index], self._labels[other]
        derived = int(self.rows.derived[order[whole]].sum())
        return Batch(x, labels, partners, views.lam, self._derived[index], rows, taken[here], len(whole), derived)

    def _part(self, step: int) -> tuple[tuple[Ints, Ints, Views], Ints, Ints]:
        """The epoch of a step; where in its order the batch lies, and what this process sees of it: its part, and the
        partner of the last view where views are mixed."""
        number, place = divmod(step, self.steps)
        if number not in self._epochs:  # what is announced may lie in the next one
            self._epochs = {each: epoch for each, epoch in self._epochs.items() if each == number - 1}
            self._epochs[number] = self._drawn(number)
            self.pixels.begin(self._epochs[number][0][self._read_from(place)])
        epoch = self._epochs[number]
        whole = np.arange(self.bounds[place], self.bounds[place + 1])
        here = whole[self.ranks.part(len(whole))]
        if self._mixes:
            here = np.append(here, (here[-1] + 1) % len(epoch[0]))
        return epoch, whole, here

    def _read_from(self, place: int) -> Ints:
        """Where in an epoch's order this process reads from batch ``place`` on: in its own parts if the order is
        partitioned; else anywhere, sooner or later, for the next epoch gives it others."""
        if self.settings.partitions == 1:
            return np.arange(self.bounds[place], self.bounds[-1])
        batches = [np.arange(*pair) for pair in itertools.pairwise(self.bounds[place:])]
        return np.concatenate([batch[self.ranks.part(len(batch))] for batch in batches])

    def _drawn(self, number: int) -> tuple[Ints, Ints, Views]:
        settings, order = self.settings, self.order(number)
        if settings.partitions > 1:
            order = localize(order, self.rows.place, self.bounds, settings.partitions)
        taken = turns(settings.augment, number, repeats(order))
        views = draw_views(settings.augment, self.side, settings.seed, number, self.rows.ids[order], taken)
        return order, taken.astype(np.int64), views

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
