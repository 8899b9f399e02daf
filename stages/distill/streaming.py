"""Images that do not fit the memory: fetched, decoded and forgotten, batches ahead of their use."""

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
from manifests.fetch import Patience
from manifests.images import decode
from manifests.tar_cache import TarCache
from stages.distill.rows import Ints, Rows
from stages.distill.runtime import ALONE, Ranks
from stages.settings import DistillSettings

FETCHED_AHEAD, BYTES_AHEAD = 4, 512 << 20
"""Batches whose files are fetched before they are decoded, beside those that are ready, and their bytes at most."""
SAME_LINE_SECONDS = 5.0


def decode_threads() -> int:
    """One for each core that this process may use; processes of one machine that train as one share its cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def checked(rows: Rows, row: int, data: bytes, side: int) -> np.ndarray:
    """uint8 ``[side, side, 3]`` of one stored image. Raises DataError naming it where it is none."""
    try:
        return decode(data, side)
    except ValueError as error:
        raise DataError(f"{rows.name(row)}: {error}") from None


class StreamedPixels:
    """Nothing kept: images are read and decoded, on all cores, whenever they are asked for.

    What :meth:`expect` announces is fetched meanwhile, ``FETCHED_AHEAD`` announcements at most. ``whole``: in the order
    of the rows, so that it is better to wait for a tar than to read its images one by one.
    """

    def __init__(
        self, rows: Rows, side: int, device: torch.device, stream: "Stream | None" = None, whole: bool = False
    ):
        self.rows, self.side, self.device, self.stream, self.whole = rows, side, device, stream, whole
        self._decoders = ThreadPoolExecutor(decode_threads(), thread_name_prefix="decode")
        self._fetchers = ThreadPoolExecutor(FETCHED_AHEAD, thread_name_prefix="fetch")
        self._fetched: OrderedDict[bytes, Future[list[bytes]]] = OrderedDict()

    def begin(self, order: Ints) -> None:
        """An epoch begins, in this order."""
        if self.stream:
            self.stream.begin(order)

    def expect(self, rows: Ints) -> None:
        """``rows`` will be taken soon, together."""
        while len(self._fetched) >= FETCHED_AHEAD:  # announced and never taken
            self._fetched.popitem(last=False)[1].cancel()
        if self.rows.size[rows].sum() > BYTES_AHEAD // FETCHED_AHEAD:
            return
        self._fetched[rows.tobytes()] = self._fetchers.submit(self._read, rows)

    def _read(self, rows: Ints) -> list[bytes]:
        if self.stream and self.whole:
            self.stream.wait(rows)
        return self.rows.read(rows)

    def take(self, rows: Ints) -> Tensor:
        """uint8 ``[n, side, side, 3]`` of ``rows``, in that order."""
        fetched = self._fetched.pop(rows.tobytes(), None)
        encoded = zip(rows.tolist(), fetched.result() if fetched else self._read(rows), strict=True)
        images = self._decoders.map(lambda pair: checked(self.rows, pair[0], pair[1], self.side), encoded)
        return torch.from_numpy(np.stack(list(images))).to(self.device)


class Stream:
    """How the images of a run arrive: the patience with its stores, and its cache of tars. A context manager.

    ``on_line`` gets lines for people. Of several ``ranks`` each begins to fetch at another tar, so that processes
    that share a cache fetch each tar once, and together.
    """

    def __init__(self, rows: Rows, settings: DistillSettings, on_line: Callable[[str], object], ranks: Ranks = ALONE):
        self.rows, self._on_line, self._ranks = rows, on_line, ranks
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
