"""What every pool of workers shares: how a worker is built, what an attempt returns, and the pool's protocol."""

import errno
import importlib
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from manifests.errors import DataError, FactoryError, Interrupted, StoreError, UsageError

STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}
"""No later shard would fare better: the run stops instead of filling the quarantine."""

OnGroup = Callable[[int, int], None]


class Worker(Protocol):
    """Makes and commits one shard at a time. ``run`` returns a small JSON-able report."""

    def run(self, shard: int, on_group: OnGroup | None = None) -> dict[str, Any]: ...


@dataclass(frozen=True)
class WorkerSpec:
    """``factory`` is ``module:function``; called with ``kwargs`` (JSON-able) it returns a worker, in any process."""

    factory: str
    kwargs: dict[str, Any] = field(default_factory=dict)

    def build(self) -> Worker:
        module, _, function = self.factory.partition(":")
        return getattr(importlib.import_module(module), function)(**self.kwargs)


@dataclass(frozen=True)
class Finished:
    """The end of one attempt. Exactly one of ``report`` and ``error`` is set."""

    shard: int
    worker: str
    report: dict[str, Any] | None = None
    error: str | None = None
    trace: str = ""
    stops_run: bool = False
    store_failed: bool = False
    worker_lost: bool = False


class Pool(Protocol):
    """Workers behind the driver loop, each with at most one shard in flight."""

    def free(self) -> int:
        """How many shards :meth:`submit` would take now."""

    def submit(self, shard: int) -> str:
        """Give ``shard`` to a free worker; returns the worker's name."""

    def wait(self, timeout: float) -> list[Finished]:
        """Attempts that ended, after at most about ``timeout`` seconds where workers run elsewhere."""

    def close(self) -> None:
        """Stop every worker at once."""


def enter(folder: str) -> None:
    """Let relative paths mean here what they mean to the driver, where this machine has the driver's ``folder``."""
    if os.path.isdir(folder):
        os.chdir(folder)


def attempt(worker: Worker, shard: int, on_group: OnGroup | None = None) -> dict[str, Any]:
    """Run one shard; what it raises becomes a plain record, so that no exception has to cross a process."""
    try:
        return {"report": worker.run(shard, on_group)}
    except Exception as error:
        return failure(error)


def failure(error: Exception) -> dict[str, Any]:
    """``error`` as a record: one line, the traceback's tail, and what it means for run and worker."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    line = " ".join(str(error).split())
    return {
        "error": line[:2000] if isinstance(error, FactoryError) else f"{type(error).__name__}: {line}"[:2000],
        "trace": "".join(traceback.format_exception(error))[-4000:],
        "exit_code": error.exit_code if isinstance(error, FactoryError) else None,
        "stops_run": getattr(error, "stops_run", False)
        or any(isinstance(e, OSError) and e.errno in STORAGE_ERRORS for e in chain),
        "store_failed": any(isinstance(e, StoreError) for e in chain),
        # after such an error every later CUDA call of the process fails too, unless cuBLAS only found no memory
        "poisoned": type(error).__name__ == "AcceleratorError"
        or ("CUDA error" in line and "CUBLAS_STATUS_ALLOC_FAILED" not in line),
    }


def start_error(record: dict[str, Any]) -> FactoryError:
    """The exception to raise for a worker that could not be built."""
    kinds = {kind.exit_code: kind for kind in (UsageError, DataError, Interrupted)}
    if record["exit_code"] is not None:
        return kinds.get(record["exit_code"], FactoryError)(record["error"])
    return FactoryError(f"workers cannot start: {record['error']}")
