"""From an epoch's order to batches of augmented views. A step's batch is the same whenever it is made."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stages.distill.pixels import Pixels, StreamedPixels
from stages.distill.rows import EpochOrder, Ints, Rows, repeats
from stages.distill.settings import DistillSettings
from stages.distill.views import apply_views, draw_views, mix
from stages.models.inputs import to_unit


@dataclass(frozen=True)
class Batch:
    """``x [n, 3, h, w]`` in [−1, 1]; ``lam [n]`` is the share of the own label where a view mixes two images;
    ``derived [n]`` is 1 for images made from another one."""

    x: Tensor
    labels: Tensor
    partner_labels: Tensor
    lam: Tensor
    derived: Tensor


class Batches:
    """All batches of a run. Those of an epoch differ in size by at most one and use every row of its order."""

    def __init__(self, rows: Rows, order: EpochOrder, pixels: Pixels, settings: DistillSettings, device: torch.device):
        self.rows, self.order, self.pixels, self.settings, self.device = rows, order, pixels, settings, device
        self.steps = max(1, min(round(order.length / settings.batch_size), order.length // 2))
        self.bounds = np.linspace(0, order.length, self.steps + 1).round().astype(np.int64)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Batches ``first`` … ``steps - 1``; streamed images are prepared one batch ahead."""
        order = self.order(epoch)
        again = repeats(order)
        if not isinstance(self.pixels, StreamedPixels):
            for step in range(first, self.steps):
                yield self.make(epoch, step, order, again)
            return
        with ThreadPoolExecutor(1, thread_name_prefix="batch") as pool:
            ahead = pool.submit(self.make, epoch, first, order, again)
            for step in range(first, self.steps):
                ready = ahead
                if step + 1 < self.steps:
                    ahead = pool.submit(self.make, epoch, step + 1, order, again)
                yield ready.result()

    def make(self, epoch: int, step: int, order: Ints, again: np.ndarray) -> Batch:
        """One batch. A view's partner is the sample that follows it in the epoch's order."""
        here = np.arange(self.bounds[step], self.bounds[step + 1])
        following = (here + 1) % len(order)
        x, lam, own, other = self._views(epoch, order, again, here, following)
        own_labels, other_labels = (torch.from_numpy(self.rows.label[r]).to(self.device) for r in (own, other))
        derived = torch.from_numpy(self.rows.derived[own].astype(np.float32)).to(self.device)
        return Batch(x, own_labels, other_labels, lam, derived)

    def _views(
        self, epoch: int, order: Ints, again: np.ndarray, here: Ints, following: Ints
    ) -> tuple[Tensor, Tensor, Ints, Ints]:
        seed, settings = self.settings.seed, self.settings.views
        own, other = order[here], order[following]
        pixels = self.pixels.take(own)
        side = pixels.shape[1]
        views = draw_views(settings, side, seed, epoch, self.rows.ids[own], again[here])
        x = to_unit(apply_views(pixels, views.to(self.device)))
        if views.mixes:
            partner = draw_views(settings, side, seed, epoch, self.rows.ids[other], again[following]).to(self.device)
            partners = to_unit(apply_views(self.pixels.take(other), partner))
            x = mix(x, partners, views.to(self.device))
        return x, views.lam.to(self.device), own, other

    def plain(self, rows: Ints, size: int = 512) -> Iterator[tuple[Ints, Tensor]]:
        """``rows`` unaugmented, as (row numbers, images ``[n, 3, h, w]`` in [−1, 1])."""
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            yield some, to_unit(self.pixels.take(some))
