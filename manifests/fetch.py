"""Many ranges of a dataset's files at once, with patience: what fails is tried again while anything still arrives.

A random batch of large images lies in as many places as it has images. One request after another, each of them waits
for the store; together they wait once.
"""

import errno
import queue
import random
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import NamedTuple

from manifests.errors import DataError, FactoryError, StalledError, StoreError, one_line
from manifests.storage import LASTING, Patience, Storage

AT_ONCE, BYTES_AT_ONCE = 64, 64 << 20
"""Requests under way at most, and the bytes that they may bring together (a single one may be larger)."""
PART = 4 << 20
"""Bytes that are asked for at once of a file that is read whole: a finished request is what counts as progress."""
LONGEST_PAUSE = 8.0


class Range(NamedTuple):
    """``size`` bytes of the file ``name`` from ``offset``."""

    name: str
    offset: int
    size: int


def parts(name: str, size: int) -> list[Range]:
    """A whole file of ``size`` bytes."""
    return [Range(name, start, min(PART, size - start)) for start in range(0, size, PART)]


def fetch(storage: Storage, ranges: Iterable[Range], patience: Patience) -> Iterator[tuple[int, bytes | DataError]]:
    """(number, bytes) of each of ``ranges``, as they arrive; in their order where ``storage`` is local.

    A range that cannot be had gives its DataError: the file is missing or ends before it. Raises StoreError where the
    store refuses, StalledError where nothing more arrives. No more is asked for than the caller takes.
    """
    if storage.is_local:
        for number, wanted in enumerate(ranges):
            try:
                yield number, storage.read_range(*wanted)
            except StoreError:
                raise
            except DataError as error:
                yield number, error
        return
    transfer = _Transfer(storage, ranges, patience)
    try:
        yield from transfer
    finally:
        transfer.cancel()


@dataclass
class _Request:
    number: int
    wanted: Range
    attempt: int = 0
    started: float = 0.0
    not_before: float = 0.0


class _Transfer:
    """The requests of one :func:`fetch`: those under way, by future, and those to be tried again."""

    def __init__(self, storage: Storage, ranges: Iterable[Range], patience: Patience) -> None:
        self.storage, self.patience = storage, patience
        self.fresh = (_Request(number, wanted) for number, wanted in enumerate(ranges))
        self.again: deque[_Request] = deque()
        self.under_way: dict[Future[bytes], _Request] = {}
        self.finished: queue.SimpleQueue[Future[bytes]] = queue.SimpleQueue()
        self.reason = "no answer"
        self.share = 1  # of the bounds: a narrow connection brings nothing in time where it brings all at once

    def __iter__(self) -> Iterator[tuple[int, bytes | DataError]]:
        progress, warned = time.monotonic(), False
        while True:
            self._submit()
            if not self.under_way and not self.again:
                return
            try:
                future = self.finished.get(timeout=self._pause())
            except queue.Empty:
                future = None
            request = self.under_way.pop(future, None) if future else None  # None: given up before it ended
            result = self._result(future, request) if future and request else None
            if request and result is not None:
                yield request.number, result
                progress, warned = time.monotonic(), False
                continue
            silent = time.monotonic() - progress
            if silent >= self.patience.stall_seconds:
                raise StalledError(
                    f"{self._waited_for()}: nothing has arrived for {silent:.0f} s ({self.reason}); the same command "
                    "resumes, and stall_seconds says how long to wait"
                )
            if silent >= self.patience.warn_seconds and self.patience.on_wait and not warned:
                warned = True
                left = self.patience.stall_seconds - silent
                self.patience.on_wait(
                    f"waiting for {self._waited_for()}: nothing has arrived for {silent:.0f} s ({self.reason}); this "
                    f"goes on for {left:.0f} s more"
                )
            self._give_up_hung(silent)

    def _submit(self) -> None:
        now = time.monotonic()
        while len(self.under_way) < max(1, AT_ONCE // self.share):
            if self.again and self.again[0].not_before <= now:
                request: _Request | None = self.again.popleft()
            elif self.under_way and self._size() >= BYTES_AT_ONCE // self.share:
                return
            else:
                request = next(self.fresh, None)
            if request is None:
                return
            request.started = now
            future = self.storage.start_range(*request.wanted)
            self.under_way[future] = request
            future.add_done_callback(self.finished.put)

    def _size(self) -> int:
        return sum(request.wanted.size for request in self.under_way.values())

    def _pause(self) -> float:
        """Seconds until there is something to do although nothing arrives."""
        now = time.monotonic()
        return max(0.01, min([0.5, *(request.not_before - now for request in self.again)]))

    def _result(self, future: Future[bytes], request: _Request) -> bytes | DataError | None:
        """What a finished request brought; None where it is tried again."""
        wanted = request.wanted
        path = self.storage.path(wanted.name)
        short = f"{path}: ends inside bytes {wanted.offset}..{wanted.offset + wanted.size}: the file is cut short"
        try:
            data = future.result()
        except (FileNotFoundError, NotADirectoryError):
            return DataError(f"{path}: no such file")
        except IsADirectoryError:
            return DataError(f"{path}: is a folder, expected a file")
        except FactoryError:
            raise
        except CancelledError:
            self.reason = "cancelled"
        except LASTING as error:
            raise StoreError(f"{path}: cannot read: {one_line(error)}") from error
        except Exception as error:
            self.reason = one_line(error)
            if getattr(error, "errno", None) == errno.EINVAL and "range" in self.reason.lower():
                return DataError(short)  # it begins behind the end
        else:
            if len(data) == wanted.size:
                return data
            self.reason = f"{len(data)} of {wanted.size} bytes arrived"
            if request.attempt >= 2:
                return DataError(short)
        self._try_again(request)
        return None

    def _try_again(self, request: _Request) -> None:
        pause = min(0.2 * 2**request.attempt, LONGEST_PAUSE) * random.uniform(0.5, 1.5)
        request.attempt += 1
        request.not_before = time.monotonic() + pause
        self.again.append(request)

    def _give_up_hung(self, silent: float) -> None:
        """Ask once more for what has been under way for long: of several connections a single one may hang. Where all
        are as slow, for less at once."""
        longest = self.patience.stall_seconds / 3
        now = time.monotonic()
        hung = [future for future, request in self.under_way.items() if now - request.started > longest]
        for future in hung:
            self._try_again(self.under_way.pop(future))
            future.cancel()
        if hung and silent > longest:
            self.share *= 4

    def _waited_for(self) -> str:
        waiting = [*self.under_way.values(), *self.again]
        first = min(waiting, key=lambda request: request.number).wanted
        more = f" and {len(waiting) - 1} more requests" if len(waiting) > 1 else ""
        return f"{self.storage.path(first.name)}, {first.size} bytes from {first.offset}{more}"

    def cancel(self) -> None:
        for future in self.under_way:
            future.cancel()
