"""Stored images by row: decoded once and kept, or fetched, decoded and forgotten, batches ahead of their use."""

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from manifests.errors import DataError
from manifests.images import decode
from manifests.storage import Patience
from manifests.tar_cache import TarCache
from stages.distill.rows import Ints, Rows
from stages.distill.runtime import ALONE, Ranks
from stages.settings import DistillSettings

FETCHED_AHEAD, BYTES_AHEAD = 4, 512 << 20
"""Batches whose files are fetched before they are decoded, beside those that are ready, and their bytes at most."""
CHUNK, AT_ONCE = 1024, 256 << 20
"""Images decoded together, and their bytes at most, where nothing else bounds them."""
SAME_LINE_SECONDS = 5.0


def decode_threads() -> int:
    """One for each core that this process may use; processes of one machine that train as one share its cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def images_at_once(most: int, size: int) -> int:
    """How many images of ``size`` bytes, decoded, a network is shown at once: ``most``, fewer where they are large."""
    return min(most, max(1, AT_ONCE // size))


class Pixels:
    """Stored images by row number: decoded once and kept on ``device`` where all fit ``memory_gb``, else read and
    decoded as they are needed, on all cores. Raises DataError for manifests whose images differ in size.

    What :meth:`expect` announces is fetched meanwhile, ``FETCHED_AHEAD`` announcements at most.
    """

    def __init__(self, rows: Rows, memory_gb: float, device: torch.device, stream: "Stream | None" = None):
        self.rows, self.device, self.side = rows, device, rows.selections[0].info.image_size
        for selection in rows.selections:
            if selection.info.image_size != self.side:
                raise DataError(
                    f"{selection.url}: images of {selection.info.image_size} pixels, "
                    f"but {rows.selections[0].url} has {self.side}; distill from manifests of one size"
                )
        self._stream = stream
        self._decoders = ThreadPoolExecutor(decode_threads(), thread_name_prefix="decode")
        self._fetchers = ThreadPoolExecutor(FETCHED_AHEAD, thread_name_prefix="fetch")
        self._fetched: OrderedDict[bytes, Future[list[bytes]]] = OrderedDict()
        self._filling = len(rows) * self.side**2 * 3 <= memory_gb * 1e9
        self._kept: Tensor | None = None
        if self._filling:
            self._kept = self._all().to(device)

    def begin(self, order: Ints) -> None:
        """An epoch begins, in this order."""
        if self._stream and self._kept is None:
            self._stream.begin(order)

    def expect(self, rows: Ints) -> None:
        """``rows`` will be taken soon, together."""
        if self._kept is not None or self.rows.size[rows].sum() > BYTES_AHEAD // FETCHED_AHEAD:
            return
        while len(self._fetched) >= FETCHED_AHEAD:  # announced and never taken
            self._fetched.popitem(last=False)[1].cancel()
        self._fetched[rows.tobytes()] = self._fetchers.submit(self._read, rows)

    def take(self, rows: Ints) -> Tensor:
        """uint8 ``[n, side, side, 3]`` of ``rows``, in that order."""
        if self._kept is None:
            return self._decoded(rows).to(self.device)
        return self._kept.index_select(0, torch.from_numpy(rows).to(self.device))

    def _all(self) -> Tensor:
        """Every image, in the order of the rows."""
        every = np.arange(len(self.rows))
        kept = torch.empty(len(every), self.side, self.side, 3, dtype=torch.uint8)
        self.begin(every)
        chunks = np.array_split(every, -(-len(every) // images_at_once(CHUNK, self.side**2 * 3)))
        for number, chunk in enumerate(chunks):
            for following in chunks[number + 1 : number + 2]:
                self.expect(following)
            kept[chunk[0] : chunk[-1] + 1] = self._decoded(chunk)
        return kept

    def _decoded(self, rows: Ints) -> Tensor:
        def pixels(row: int, data: bytes) -> np.ndarray:
            try:
                return decode(data, self.side)
            except ValueError as error:
                raise DataError(f"{self.rows.name(row)}: {error}") from None

        fetched = self._fetched.pop(rows.tobytes(), None)
        encoded = fetched.result() if fetched else self._read(rows)
        return torch.from_numpy(np.stack(list(self._decoders.map(pixels, rows.tolist(), encoded))))

    def _read(self, rows: Ints) -> list[bytes]:
        if self._stream and self._filling:  # in the order of the rows it is better to wait for a tar
            self._stream.wait(rows)
        return self.rows.read(rows)


class Stream:
    """How the images of a run arrive: the patience with its stores, and its cache of tars. A context manager.

    ``on_line`` gets lines for people. Of several ``ranks`` that read all tars each begins to fetch at another one, so
    that processes that share a cache fetch each tar once, and together.
    """

    def __init__(self, rows: Rows, settings: DistillSettings, on_line: Callable[[str], object], ranks: Ranks = ALONE):
        self.rows, self._on_line, self._ranks = rows, on_line, ranks if settings.partitions == 1 else ALONE
        self._said, self._lock = float("-inf"), threading.Lock()
        self.patience = Patience(settings.stall_seconds, self._on_wait)
        self.cache: TarCache | None = None
        remote = [selection for selection in rows.selections if not selection.storage.is_local]
        if settings.cache_dir and remote:
            self.cache = TarCache(settings.cache_dir, settings.cache_gb * 1e9, self.patience, on_line)
        for selection in remote:
            selection.file.patience, selection.file.cache = self.patience, self.cache

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        if self.cache:
            self.cache.close()

    def begin(self, order: Ints) -> None:
        """Fetch the tars of ``order`` that are missing, in the order of their first use."""
        if self.cache:
            tars = [
                (self.rows.selections[number].storage, self.rows.selections[number].info.tars[tar])
                for number, tar in self.rows.tars(order)
                if not self.rows.selections[number].storage.is_local
            ]
            own = self._ranks.part(len(tars))
            self.cache.want([*tars[own.start :], *tars[: own.start]])

    def wait(self, rows: Ints) -> None:
        """Until the tars of ``rows`` are in the cache, if they will be: they are wanted as a whole."""
        if self.cache:
            self.cache.wait(self.rows.selections[number].info.tars[tar] for number, tar in self.rows.tars(rows))

    def _on_wait(self, line: str) -> None:
        """Threads that wait for one store all say so; once is enough."""
        with self._lock:
            if time.monotonic() - self._said < SAME_LINE_SECONDS:
                return
            self._said = time.monotonic()
        self._on_line(line)
