"""The one loop of ``factory run synth``: hands out shards, counts attempts, quarantines what keeps failing.

Every decision of a run is made here; pools only run what they are given. A shard is done when its done record exists,
whatever became of the attempt that wrote it, so killing driver or workers at any point costs at most unfinished shards.
"""

import contextlib
import heapq
import os
import signal
import threading
import time
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from manifests.errors import FactoryError, Interrupted
from manifests.shard import committed, done_name, done_record
from manifests.storage import Storage
from pipeline.events import EventLog, Failure, Loud, failures, quarantine, release
from pipeline.executors.pool import STORAGE_ERRORS, Finished, InlinePool, WorkerSpec
from pipeline.executors.settings import ExecutorSettings
from pipeline.lease import Lease
from pipeline.watch import SynthWatch
from stages.progress import OnProgress

if TYPE_CHECKING:
    from pipeline.executors.ray import RayPool


class StopSignals:
    """Ctrl-C for long runs, a context manager: the first SIGINT or SIGTERM sets ``draining``, the second ``stopping``
    and raises ``KeyboardInterrupt`` (both, since an exception raised inside a callback or a finalizer is swallowed).

    Outside the main thread, where Python takes no handlers, it changes nothing.
    """

    def __init__(self, until: str = "after the running shards") -> None:
        self.draining = self.stopping = False
        self._line = f"\nstopping {until}; once more stops at once (either way the same command resumes)\n".encode()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def abort(self) -> None:
        """Raise ``KeyboardInterrupt`` in the main thread as a second signal does; called from another one."""
        if self._previous:
            self.draining = True
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.draining:
            self.stopping = True
            raise KeyboardInterrupt
        self.draining = True
        with contextlib.suppress(OSError):
            os.write(2, self._line)  # not print: the signal may have interrupted one


TICK = 0.5
"""Seconds after which the loop looks at signals, lease and time limits again."""


@dataclass(frozen=True)
class Outcome:
    """What became of the shards asked for. ``failed`` maps those in quarantine to their last error."""

    done: frozenset[int]
    failed: dict[int, str]
    missing: frozenset[int]
    interrupted: bool

    def check(self) -> None:
        """Raises unless every shard is done: :class:`Interrupted` (exit 130) or :class:`FactoryError` (exit 1)."""
        total = len(self.done) + len(self.failed) + len(self.missing)
        if self.interrupted:
            raise Interrupted(f"stopped with {len(self.done)} of {total} shards done; the same command resumes")
        if self.failed:
            shard = min(self.failed)
            raise FactoryError(
                f"{len(self.failed)} of {total} shards failed, e.g. {shard:06d}: {self.failed[shard]}; "
                "try them again with --retry-failed"
            )


def execute(
    spec: WorkerSpec,
    shards: Iterable[int],
    settings: ExecutorSettings,
    events: EventLog | Loud,
    storage: Storage,
    watch: SynthWatch | None = None,
    lease: Lease | None = None,
) -> Outcome:
    """Run every shard of ``shards`` that is neither done nor in quarantine, shown by ``watch``.

    The caller holds ``lease`` on the folder; losing it stops the run. Raises :class:`UsageError` when the cluster
    cannot hold the workers, :class:`FactoryError` when workers cannot start or nothing can be written, both before a
    shard is blamed for it. Ctrl-C does not raise: see :attr:`Outcome.interrupted`.
    """
    wanted = set(shards)
    done = committed(storage) & wanted
    failed = {shard: known.error for shard, known in failures(storage).items() if shard in wanted - done}
    if settings.retry_failed:
        release(storage, failed)
        failed = {}
    todo = sorted(wanted - done - failed.keys(), reverse=True)
    driver = _Driver(settings, events, storage, watch or SynthWatch(), lease, len(wanted), todo, done, failed)
    interrupted = bool(todo) and driver.drive(spec)
    left = frozenset(wanted - done - failed.keys())
    return Outcome(frozenset(done), dict(sorted(failed.items())), left, interrupted and bool(left))


@dataclass
class _Driver:
    """The loop and its state: a few bytes for each shard of the plan, records only for shards in flight or failed."""

    settings: ExecutorSettings
    events: EventLog | Loud
    storage: Storage
    watch: SynthWatch
    lease: Lease | None
    total: int
    todo: list[int]  # the next one last
    done: set[int]
    failed: dict[int, str]
    running: dict[int, float] = field(default_factory=dict)  # shard → time handed out
    attempts: dict[int, int] = field(default_factory=dict)
    retries: list[tuple[float, int]] = field(default_factory=list)  # heap of (not before, shard)
    failed_in_a_row: int = 0

    def drive(self, spec: WorkerSpec) -> bool:
        """Start the workers, run the loop, stop the workers. True if a signal cut the run short."""
        self.watch.begin(len(self.done), self.total)
        try:
            with (
                closing(_open_pool(spec, self.settings, self.watch.report)) as pool,
                StopSignals() as signals,  # after the pool: starting Ray installs a handler of its own
            ):
                if self.lease is not None:
                    self.lease.on_lost = signals.abort  # a shard in this process may take long
                self._loop(pool, signals)
            return signals.draining
        except KeyboardInterrupt:
            if self.lease is not None:
                self.lease.check()
            return True
        except OSError as error:
            if error.errno in STORAGE_ERRORS:
                raise FactoryError(f"cannot write to {self.storage.url}: {error}; the same command resumes") from error
            raise

    def _loop(self, pool: "InlinePool | RayPool", signals: StopSignals) -> None:
        self._show()
        while self.running or ((self.todo or self.retries) and not signals.draining):
            if signals.stopping:
                raise KeyboardInterrupt
            if self.lease is not None:
                self.lease.check()
            while not signals.draining and pool.free() and (shard := self.next(time.monotonic())) is not None:
                self.attempts[shard] = self.attempts.get(shard, 0) + 1
                self.running[shard] = time.monotonic()
                worker = pool.submit(shard)
                self.events.write("shard_started", shard=shard, attempt=self.attempts[shard], worker=worker)
            for finished in pool.wait(TICK):
                self._finish(finished)
            self._show()

    def next(self, now: float) -> int | None:
        """A retry that is due goes first, so that a poison shard is known early; then the plan's order."""
        if self.retries and self.retries[0][0] <= now:
            return heapq.heappop(self.retries)[1]
        return self.todo.pop() if self.todo else None

    def _finish(self, end: Finished) -> None:
        shard = end.shard
        seconds = round(time.monotonic() - self.running.pop(shard), 3)
        if end.worker_lost:
            self.events.write("worker_lost", worker=end.worker, shard=shard, error=end.error)
        report = end.report
        if report is None and (record := done_record(self.storage, shard)) is not None:
            # its worker died between commit and answer
            report = record.report
        if report is not None:
            self.attempts.pop(shard, None)
            self.done.add(shard)
            self.failed_in_a_row = 0
            for message in report.pop("warnings", ()):
                self.events.write("warning", shard=shard, message=f"shard {shard:06d}: {message}")
            for group, size in report.pop("splits", {}).items():
                self.events.write("group_split", shard=shard, group=int(group), micro_batch=size, worker=end.worker)
            self.events.write("shard_done", **{"seconds": seconds, **report, "shard": shard, "worker": end.worker})
            self.watch.finished(shard, report, len(self.done))
            return
        self.watch.lost(shard)
        self._fail(end)

    def _fail(self, end: Finished) -> None:
        shard, error = end.shard, end.error or "no report"
        attempts = self.attempts[shard]
        self.storage.exists(done_name(shard))  # GoneError: the shard is not to blame
        self.events.write("shard_failed", shard=shard, attempt=attempts, error=error, worker=end.worker)
        if end.stops_run or (end.store_failed and attempts >= self.settings.attempts):  # no fault of the shard
            raise FactoryError(f"shard {shard:06d}: {error}; mend that and give the same command, it resumes")
        if attempts < self.settings.attempts:
            heapq.heappush(self.retries, (time.monotonic() + self.settings.retry_delay * attempts, shard))
            return
        quarantine(self.storage, Failure(shard, attempts, error, end.worker, end.trace))
        self.events.write("shard_quarantined", shard=shard, attempts=attempts, error=error)
        self.failed[shard] = error
        self.failed_in_a_row += 1
        if self.failed_in_a_row >= self.settings.stop_after:
            raise FactoryError(
                f"{self.failed_in_a_row} shards in a row failed {attempts} times each, the last with: {error}; "
                "when that is mended, run again with --retry-failed"
            )

    def _show(self) -> None:
        self.watch.counts(len(self.done), self.total, len(self.running), len(self.failed))


def _open_pool(spec: WorkerSpec, settings: ExecutorSettings, on_progress: OnProgress) -> "InlinePool | RayPool":
    if settings.inline:
        return InlinePool(spec, settings, on_progress)
    from pipeline.executors.ray import RayPool  # here: one worker must do without Ray's start-up time

    return RayPool(spec, settings, on_progress)
