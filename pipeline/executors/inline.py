"""One worker in this process: ``factory run synth`` without ``--workers``. Imports no Ray."""

import signal
import threading
from types import FrameType

from manifests.errors import FactoryError
from pipeline.executors.settings import ExecutorSettings
from pipeline.executors.worker import Finished, OnGroup, Worker, WorkerSpec, attempt, failure, start_error

NAME = "inline"


class _Overdue(BaseException):
    """Raised inside a shard at its time limit; no ``except Exception`` of a worker swallows it."""


class InlinePool:
    """Runs the submitted shard inside :meth:`wait`.

    The time limit is a timer signal: it ends Python code and interruptible sleeps in the main thread, not a call that
    hangs inside a library. Ray workers are killed from outside and have no such gap.
    """

    def __init__(self, spec: WorkerSpec, settings: ExecutorSettings, on_group: OnGroup | None = None):
        self._spec, self._settings, self._on_group = spec, settings, on_group
        self._shard: int | None = None
        self._worker: Worker | None = self._build()

    def _build(self) -> Worker:
        try:
            return self._spec.build()
        except FactoryError:
            raise
        except Exception as error:
            raise start_error(failure(error)) from error

    def free(self) -> int:
        return 1 if self._shard is None else 0

    def submit(self, shard: int) -> str:
        self._shard = shard
        return NAME

    def wait(self, timeout: float) -> list[Finished]:
        shard = self._shard
        if shard is None:
            threading.Event().wait(timeout)
            return []
        if self._worker is None:
            self._worker = self._build()
        try:
            with _Timer(self._settings.time_limit):
                record = attempt(self._worker, shard, self._on_group)
        except _Overdue:
            self._worker = None  # stopped anywhere: its state is not to be trusted
            record = {"error": f"no result after the time limit of {self._settings.time_limit:g} s"}
        finally:
            self._shard = None
        poisoned = record.pop("poisoned", False)
        record.pop("exit_code", None)
        finished = Finished(shard, NAME, **record)
        if poisoned:
            raise FactoryError(
                f"shard {shard:06d}: {finished.error}; the GPU needs a new process: the same command resumes"
            )
        return [finished]

    def close(self) -> None:
        self._worker = None


class _Timer:
    """Raises :class:`_Overdue` in the main thread after ``seconds``; does nothing elsewhere or without a limit."""

    def __init__(self, seconds: float | None):
        main = threading.current_thread() is threading.main_thread()
        self._seconds = seconds if main and hasattr(signal, "setitimer") else None

    def __enter__(self) -> None:
        if self._seconds:
            self._previous = signal.signal(signal.SIGALRM, self._ring)
            signal.setitimer(signal.ITIMER_REAL, self._seconds)

    def __exit__(self, *_: object) -> None:
        if self._seconds:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._previous)

    @staticmethod
    def _ring(number: int, frame: FrameType | None) -> None:
        raise _Overdue
