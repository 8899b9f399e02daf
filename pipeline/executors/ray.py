"""Workers as Ray actors: ``factory run synth --workers N [--address auto]``.

Plain actors with Ray's own restarts and retries off, since those repeat a shard that kills its worker for ever: this
pool replaces dead actors, and the driver loop counts attempts. Images never enter the object store.
"""

import logging
import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import floor
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from manifests.errors import FactoryError, UsageError
from pipeline.executors import reaper
from pipeline.executors.pool import Attempt, Finished, Worker, WorkerSpec, attempt, enter, failure, start_error
from pipeline.executors.settings import ExecutorSettings
from pipeline.terminal import say
from stages.progress import OnProgress, ShardProgress

for _name, _value in {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "false",
    "RAY_worker_niceness": "0",  # default 15: any other load on the machine would starve the workers
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # dead workers are reported by the driver, not on stdout
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # `uv run` would upload the working directory, run folder included
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else a FutureWarning; _Actor hides GPUs itself
}.items():
    os.environ.setdefault(_name, _value)  # read when ray is imported


OBJECT_STORE = 80 * 2**20  # Ray's minimum is 75 MiB; records of a few hundred bytes pass through it
START_ATTEMPTS = 3
SAY_SECONDS = 10.0
REPORTS_A_SECOND = 200  # of all workers together
_reaper: "subprocess.Popen[bytes] | None" = None  # of the cluster that this process started
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class _Actor:
    """The process around one worker."""

    def __init__(self, threads: int, hide_gpus: bool, folder: str):
        # Before anything imports torch: OpenMP and CUDA read these once.
        for name in THREAD_VARIABLES:
            os.environ[name] = str(threads)
        if hide_gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        enter(folder)
        self._worker: Worker | None = None

    def start(self, factory: str, kwargs: dict[str, Any]) -> Attempt:
        try:
            self._worker = WorkerSpec(factory, kwargs).build()
        except Exception as error:
            return failure(error)
        return Attempt({"name": f"{socket.gethostname()}:{os.getpid()}"})

    def run(self, shard: int, board: Any, every: float) -> Attempt:
        assert self._worker is not None, "start() comes first"
        due = 0.0

        def report(progress: ShardProgress) -> None:
            nonlocal due
            if (now := time.monotonic()) >= due:
                due = now + every
                board.put.remote(progress)  # nobody waits for it, and nothing depends on it

        return attempt(self._worker, shard, report)


class _Board:
    """The latest report of every shard at work, between the workers and the driver."""

    def __init__(self) -> None:
        self._latest: dict[int, ShardProgress] = {}

    def put(self, progress: ShardProgress) -> None:
        self._latest[progress.shard] = progress

    def take(self) -> list[ShardProgress]:
        latest, self._latest = self._latest, {}
        return list(latest.values())


@dataclass
class _Slot:
    """One place for a worker: the actor in it now, and the call it is busy with."""

    number: int
    actor: Any
    name: str
    since: float
    shard: int | None = None
    ready: bool = False


class RayPool:
    """Called as :class:`pipeline.executors.pool.InlinePool`; each worker has at most one shard in flight."""

    def __init__(self, spec: WorkerSpec, settings: ExecutorSettings, on_progress: OnProgress = lambda progress: None):
        self._spec, self._settings, self._on_progress = spec, settings, on_progress
        self._idle: list[_Slot] = []
        self._calls: dict[Any, _Slot] = {}  # object reference → slot whose call it is
        self._failed_starts = 0
        self._board: Any = None
        self._owns_ray = connect(settings)
        try:
            self._options = actor_options(settings, [n["Resources"] for n in ray.nodes() if n["Alive"]])
            self._waiting = Waiting(settings)
            actor: Any = ray.remote(_Board)
            self._board = actor.options(num_cpus=0, scheduling_strategy=here()).remote()
            self._taking = self._board.take.remote()
            for number in range(settings.workers):
                self._spawn(number)
        except BaseException:
            self.close()
            raise

    def free(self) -> bool:
        return bool(self._idle)

    def submit(self, shard: int) -> str:
        slot = self._idle.pop(0)
        slot.shard, slot.since = shard, time.monotonic()
        every = len(self._calls) / REPORTS_A_SECOND
        self._calls[slot.actor.run.remote(shard, self._board, every)] = slot
        return slot.name

    def wait(self, timeout: float) -> list[Finished]:
        if not self._calls:
            time.sleep(timeout)
            return []
        ready, _ = ray.wait(list(self._calls), num_returns=1, timeout=timeout)
        ended = [self._answer(reference) for reference in ready]
        limit, now = self._settings.time_limit, time.monotonic()
        for reference, slot in list(self._calls.items()):
            if limit is not None and slot.shard is not None and now - slot.since > limit:
                del self._calls[reference]
                ended.append(
                    self._lost(slot, f"worker {slot.name} killed: no result after the time limit of {limit:g} s")
                )
        self._check_starts()
        self._pass_reports_on()
        return [finished for finished in ended if finished is not None]

    def _pass_reports_on(self) -> None:
        """Give the driver what has arrived at the board; a board that is slow or lost holds nothing up."""
        if self._taking is None or not ray.wait([self._taking], timeout=0)[0]:
            return
        try:
            at_work = {slot.shard for slot in self._calls.values()}
            for progress in ray.get(self._taking):
                if progress.shard in at_work:
                    self._on_progress(progress)
            self._taking = self._board.take.remote()
        except ray.exceptions.RayError:
            self._taking = None

    def close(self) -> None:
        if self._board is not None:
            ray.kill(self._board, no_restart=True)
        for slot in [*self._idle, *self._calls.values()]:
            ray.kill(slot.actor, no_restart=True)
        self._idle, self._calls = [], {}
        if self._owns_ray:
            disconnect()

    def _spawn(self, number: int) -> None:
        threads, hide = self._settings.threads, not self._options["num_gpus"]
        actor: Any = ray.remote(_Actor).options(**self._options).remote(threads, hide, os.getcwd())
        slot = _Slot(number, actor, f"w{number}", time.monotonic())
        self._calls[actor.start.remote(self._spec.factory, self._spec.kwargs)] = slot

    def _replace(self, slot: _Slot) -> None:
        ray.kill(slot.actor, no_restart=True)
        self._spawn(slot.number)

    def _answer(self, reference: Any) -> Finished | None:
        slot = self._calls.pop(reference)
        try:
            record: Attempt = ray.get(reference)
        except ray.exceptions.RayError as error:
            return self._lost(slot, f"worker {slot.name} died: {reason(error)}")
        if slot.shard is None:
            if record.report is None:
                self._start_failed(slot, record)
                return None
            self._failed_starts = 0
            slot.ready, slot.name = True, f"w{slot.number}@{record.report['name']}"
            self._idle.append(slot)
            return None
        finished = Finished(shard=slot.shard, worker=slot.name, worker_lost=record.poisoned, **vars(record))
        slot.shard = None
        if finished.poisoned:
            self._replace(slot)
        else:
            self._idle.append(slot)
        return finished

    def _start_failed(self, slot: _Slot, record: Attempt) -> None:
        self._failed_starts += 1
        if record.exit_code is not None or record.stops_run or self._failed_starts >= START_ATTEMPTS:
            raise start_error(record.error, record.exit_code)
        self._replace(slot)

    def _lost(self, slot: _Slot, error: str) -> Finished | None:
        if slot.shard is None:
            self._start_failed(slot, Attempt(error=error))
            return None
        self._replace(slot)
        return Finished(shard=slot.shard, worker=slot.name, error=error, worker_lost=True)

    def _check_starts(self) -> None:
        if self._idle or any(slot.ready for slot in self._calls.values()):
            self._waiting = Waiting(self._settings)
        else:
            self._waiting.look("no worker is")


def here() -> NodeAffinitySchedulingStrategy:
    """Places an actor on the driver's machine, so that no other node's loss takes it along."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


class Waiting:
    """A wait for workers to be ready, from now on: a line every :data:`SAY_SECONDS`, and an end."""

    def __init__(self, settings: ExecutorSettings) -> None:
        self._limit = settings.start_limit
        self._since = time.monotonic()
        self._said = self._since

    def look(self, who: str) -> None:
        """To be called now and then while ``who`` ("no worker is") ready. Raises FactoryError at the limit."""
        now = time.monotonic()
        if now - self._since <= self._limit and now - self._said < SAY_SECONDS:
            return
        free = ", ".join(f"{name} {amount:g}" for name, amount in sorted(ray.available_resources().items()))
        line = f"{who} ready after {now - self._since:.0f} s; free in the cluster: {free or 'nothing'}"
        if now - self._since > self._limit:
            raise FactoryError(line)
        self._said = now
        say(f"waiting: {line}; this goes on for {self._since + self._limit - now:.0f} s more")


def connect(settings: ExecutorSettings) -> bool:
    """Join the cluster asked for, or start one on this machine; True if it was started here (and is ours to stop)."""
    if ray.is_initialized():
        return False
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = settings.address
    if address in (None, "auto"):
        address = os.environ.get("RAY_ADDRESS") or address
    if address:
        _probe(address)
        try:
            ray.init(address, **quiet)
        except (ConnectionError, RuntimeError) as error:
            why = " ".join(str(error).split())
            raise UsageError(
                f"no Ray cluster at {address!r} ({why}): start one with `ray start --head`; "
                "one that asks for tokens needs RAY_AUTH_MODE=token here"
            ) from None
        return True
    global _reaper
    cpus = max(os.cpu_count() or 1, settings.workers * settings.threads)  # crowding this machine is the user's choice
    try:
        with reaper.watched() as _reaper:
            ray.init("local", num_cpus=cpus, object_store_memory=OBJECT_STORE, include_dashboard=False, **quiet)
    except Exception as error:  # a plain Exception where the machine is too busy for Ray's 30 seconds
        raise FactoryError(f"Ray does not start on this machine: {reason(error)}; the same command resumes") from error
    return True


def disconnect() -> None:
    """Leave the cluster; one that was started here ends."""
    global _reaper
    ray.shutdown()
    if _reaper is not None and _reaper.stdin is not None:
        _reaper.stdin.close()
        _reaper.wait()
    _reaper = None


@contextmanager
def cluster(settings: ExecutorSettings) -> Iterator[None]:
    """Connected to the cluster asked for, and everything of ours in it stopped afterwards."""
    ours = connect(settings)
    try:
        yield
    finally:
        if ours:
            disconnect()


def _probe(address: str) -> None:
    """Ray tries a dead HOST:PORT for minutes; this takes seconds. Raises :class:`UsageError`."""
    if address == "auto" or "://" in address:
        return
    host, _, port = address.rpartition(":")
    if not host or not re.fullmatch("[0-9]{1,5}", port, re.ASCII) or int(port) > 65535:
        raise UsageError(f"--address {address!r}: expected auto or HOST:PORT, e.g. 10.0.0.5:6379")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise UsageError(f"no Ray cluster at {address} ({error}): start one with `ray start --head`") from None


def actor_options(settings: ExecutorSettings, nodes: list[dict[str, float]]) -> dict[str, Any]:
    """What each actor reserves, given the resources of each node. Raises :class:`UsageError` if they do not all fit."""
    gpus = settings.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if any(node.get("GPU", 0) for node in nodes) else 0.0
    need = {"CPU": float(settings.threads), "GPU": gpus, "memory": (settings.memory_per_worker or 0) * 2**30}
    fit = sum(
        min(floor(node.get(name, 0) / amount + 1e-9) for name, amount in need.items() if amount) for node in nodes
    )
    if fit < settings.workers:
        takes = ["threads", *(["GPUs (--device cpu: none)"] if gpus else []), *(["memory"] if need["memory"] else [])]
        raise UsageError(
            f"{settings.workers} workers with {_amounts(need)} each were asked for, the cluster holds {fit} such "
            f"(its nodes: {'; '.join(_amounts(node) for node in nodes) or 'none'}): lower --workers "
            f"or each one's {' or '.join(takes)}"
        )
    options: dict[str, Any] = {"num_cpus": settings.threads, "num_gpus": gpus, "max_restarts": 0, "max_task_retries": 0}
    if need["memory"]:
        options["memory"] = need["memory"]
    return options


def _amounts(resources: dict[str, float]) -> str:
    parts = [f"{resources[name]:g} {name}" for name in ("CPU", "GPU") if resources.get(name)]
    if resources.get("memory"):
        parts.append(f"{resources['memory'] / 2**30:.3g} GiB")
    return ", ".join(parts) or "nothing"


def reason(error: Exception) -> str:
    """The telling part of Ray's many lines about a dead actor."""
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return "its machine ran out of memory: lower --workers, or raise --memory-per-worker of run synth"
    text = " ".join(str(error).split())
    if "connection error code" in text:
        return "its process ended without a word (killed, out of memory, or crashed in native code)"
    return (text or type(error).__name__)[:300]
