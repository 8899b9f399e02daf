"""What every pool of workers shares, and the pool of one worker in this process. Imports no Ray."""

import errno
import importlib
import os
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol

from manifests.errors import DataError, FactoryError, Interrupted, StoreError, UsageError
from pipeline.executors.settings import ExecutorSettings
from stages.progress import OnProgress

STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}
"""No later shard would fare better: the run stops instead of filling the quarantine."""


class Worker(Protocol):
    """Makes and commits one shard at a time. ``run`` returns a small JSON-able report."""

    def run(self, shard: int, on_progress: OnProgress | None = None) -> dict[str, Any]: ...


@dataclass(frozen=True)
class WorkerSpec:
    """``factory`` is ``module:function``; called with ``kwargs`` (JSON-able) it returns a worker, in any process.

    ``local`` are arguments for a worker in this process, which others do without: what the driver has read already.
    """

    factory: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    local: dict[str, Any] = field(default_factory=dict)

    def build(self) -> Worker:
        module, _, function = self.factory.partition(":")
        return getattr(importlib.import_module(module), function)(**self.kwargs, **self.local)


@dataclass(frozen=True)
class Attempt:
    """What became of a shard or of a worker's start, as it crosses processes. ``error``: one line, ``trace``: the end
    of the traceback; ``exit_code``: of a :class:`FactoryError`."""

    report: dict[str, Any] | None = None
    error: str | None = None
    trace: str = ""
    exit_code: int | None = None
    stops_run: bool = False
    store_failed: bool = False
    poisoned: bool = False  # the worker's process is of no more use


@dataclass(frozen=True, kw_only=True)
class Finished(Attempt):
    """The end of one attempt at ``shard``."""

    shard: int
    worker: str
    worker_lost: bool = False


def enter(folder: str) -> None:
    """Let relative paths mean here what they mean to the driver, where this machine has the driver's ``folder``."""
    if os.path.isdir(folder):
        os.chdir(folder)


def attempt(worker: Worker, shard: int, on_progress: OnProgress | None = None) -> Attempt:
    """Run one shard; what it raises becomes a plain record, so that no exception has to cross a process."""
    try:
        return Attempt(worker.run(shard, on_progress))
    except Exception as error:
        return failure(error)


def failure(error: Exception) -> Attempt:
    """``error`` and what it means for run and worker."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    line = " ".join(str(error).split())
    return Attempt(
        error=(line if isinstance(error, FactoryError) else f"{type(error).__name__}: {line}")[:2000],
        trace="".join(traceback.format_exception(error))[-4000:],
        exit_code=error.exit_code if isinstance(error, FactoryError) else None,
        stops_run=getattr(error, "stops_run", False)
        or any(isinstance(e, OSError) and e.errno in STORAGE_ERRORS for e in chain),
        store_failed=any(isinstance(e, StoreError) for e in chain),
        # after such an error every later CUDA call of the process fails too, unless cuBLAS only found no memory
        poisoned=type(error).__name__ == "AcceleratorError"
        or ("CUDA error" in line and "CUBLAS_STATUS_ALLOC_FAILED" not in line),
    )


def start_error(error: str | None, exit_code: int | None) -> FactoryError:
    """The exception to raise for a worker that could not be built."""
    kinds = {kind.exit_code: kind for kind in (FactoryError, UsageError, DataError, Interrupted)}
    return kinds[exit_code](error) if exit_code is not None else FactoryError(f"workers cannot start: {error}")


NAME = "inline"


class _Overdue(BaseException):
    """Raised inside a shard at its time limit; no ``except Exception`` of a worker swallows it."""


class InlinePool:
    """One worker in this process: runs the submitted shard inside :meth:`wait`.

    The time limit is a timer signal: it ends Python code and interruptible sleeps in the main thread, not a call that
    hangs inside a library. Ray workers are killed from outside and have no such gap.
    """

    def __init__(self, spec: WorkerSpec, settings: ExecutorSettings, on_progress: OnProgress | None = None):
        self._spec, self._settings, self._on_progress = spec, settings, on_progress
        self._shard: int | None = None
        self._worker: Worker | None = self._build()

    def _build(self) -> Worker:
        try:
            return self._spec.build()
        except Exception as error:
            record = failure(error)
            raise start_error(record.error, record.exit_code) from error

    def free(self) -> bool:
        """Whether :meth:`submit` would take a shard now."""
        return self._shard is None

    def submit(self, shard: int) -> str:
        """Give ``shard`` to a free worker; returns the worker's name."""
        self._shard = shard
        return NAME

    def wait(self, timeout: float) -> list[Finished]:
        """Attempts that ended, after at most about ``timeout`` seconds where workers run elsewhere."""
        shard, self._shard = self._shard, None
        if shard is None:
            time.sleep(timeout)
            return []
        self._worker = self._worker or self._build()
        try:
            with _time_limit(self._settings.time_limit):
                record = attempt(self._worker, shard, self._on_progress)
        except _Overdue:
            self._worker = None  # stopped anywhere: its state is not to be trusted
            record = Attempt(error=f"no result after the time limit of {self._settings.time_limit:g} s")
        finished = Finished(shard=shard, worker=NAME, **vars(record))
        if finished.poisoned:
            raise FactoryError(
                f"shard {shard:06d}: {finished.error}; the GPU needs a new process: the same command resumes"
            )
        return [finished]

    def close(self) -> None:
        """Stop every worker at once."""
        self._worker = None


@contextmanager
def _time_limit(seconds: float | None) -> Iterator[None]:
    """Raises :class:`_Overdue` in the main thread after ``seconds``; does nothing elsewhere or without a limit."""
    if not seconds or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise _Overdue

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
