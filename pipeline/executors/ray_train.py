"""Stage 2 on several workers: ``factory run distill --workers N [--address auto]``, through Ray Train.

Ray Train places the workers, joins them in a process group and starts all of them again when one is lost. What they do
is the stage's own (:mod:`stages.distill.runtime`): they go on from its checkpoint, and its first rank writes the files.
The driver and the first rank leave word for each other at a mailbox, an actor between them.
"""

import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import ray.train
import ray.train.torch

from manifests.errors import FactoryError, Interrupted
from manifests.storage import Storage
from pipeline.executors.pool import enter, start_error
from pipeline.executors.ray import Waiting, actor_options, here, reason  # first: it sets what ray reads when imported
from pipeline.executors.settings import ExecutorSettings

for _name, _value in {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths keep their meaning
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # an actor more; the stage writes its own checkpoints
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",  # not 60: nodes may have to come first, and imports take long
}.items():
    os.environ.setdefault(_name, _value)  # read when ray.train is imported


TICK = 0.3
"""Seconds between two looks at the mailbox, from either side."""


class Mailbox:
    """What was messages and not yet read, how far the run is, how it ended, and whether it is asked to stop."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, dict[str, Any]]] = []
        self.reached: tuple[float, float, str] | None = None
        self.outcome: dict[str, Any] | None = None
        self.stopping = False

    def post(self, kind: str, fields: dict[str, Any]) -> None:
        self.messages.append((kind, fields))

    def lost(self, error: str) -> None:
        if self.outcome is None:  # otherwise it was this worker's own doing
            self.post("worker_lost", {"error": error})

    def reach(self, reached: tuple[float, float, str] | None) -> bool:
        self.reached = reached or self.reached
        return self.stopping

    def end(self, outcome: dict[str, Any]) -> None:
        self.outcome = self.outcome or outcome

    def ended(self) -> bool:
        return self.outcome is not None

    def read(self, stopping: bool) -> tuple[list[tuple[str, dict[str, Any]]], Any, dict[str, Any] | None]:
        self.stopping, messages, self.messages = stopping, self.messages, []
        return messages, self.reached, self.outcome


class _Losses(ray.train.UserCallback):
    """Tells of lost workers; Ray Train calls it in its controller."""

    def __init__(self, mailbox: Any):
        self.mailbox = mailbox

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        self.mailbox.lost.remote(_first(worker_exceptions))


class _Caller:
    """The first rank's way to the mailbox: events at once, progress and the question whether to stop now and then."""

    def __init__(self, mailbox: Any):
        self.mailbox, self.reached, self.stopping, self.asked = mailbox, None, False, 0.0

    def on_event(self, kind: str, **fields: Any) -> None:
        self.mailbox.post.remote(kind, fields)

    def on_progress(self, done: float, total: float, note: str) -> None:
        self.reached = (done, total, note)  # type: ignore[assignment]

    def should_stop(self) -> bool:
        if time.monotonic() - self.asked > TICK:
            self.stopping, self.asked = ray.get(self.mailbox.reach.remote(self.reached)), time.monotonic()
        return self.stopping


def work(job: dict[str, Any]) -> None:
    """What Ray Train runs in every worker: one rank of the training."""
    import torch

    from stages.distill.run import prepare, train_students
    from stages.distill.runtime import Callbacks, Ranks
    from stages.settings import DistillSettings, ModelSettings

    enter(job["folder"])
    mailbox = job["mailbox"]
    try:
        if ray.get(mailbox.ended.remote()):
            return  # started again after an error that trying again does not mend
    except ray.exceptions.RayActorError:
        return  # the driver has left
    ranks = Ranks.joined(ray.train.torch.get_device() if job["gpu"] else torch.device("cpu"))
    name = f"{socket.gethostname()}:{os.getpid()}"
    mailbox.post.remote("worker_started", {"rank": ranks.rank, "worker": name, "device": str(ranks.device)})
    caller = _Caller(mailbox) if ranks.first else None
    try:
        teacher = ModelSettings.model_validate(job["teacher"]) if job["teacher"] else None
        prepared = prepare(DistillSettings.model_validate(job["settings"]), job["sources"], teacher, ranks)
        callbacks = Callbacks(caller.on_event, caller.on_progress, caller.should_stop) if caller else Callbacks()
        out = Storage(job["out"])
        out.hold()
        result = train_students(prepared, out, job["test_data"], callbacks)
    except FactoryError as error:
        ray.get(mailbox.end.remote({"error": str(error), "exit_code": error.exit_code}))
        if isinstance(error, Interrupted):
            return  # and so do all, at the same step
        raise
    if caller and result:
        ray.get([mailbox.reach.remote(caller.reached), mailbox.end.remote({"results": result.to_dict()})])


def train_on_ray(
    job: dict[str, Any],
    place: ExecutorSettings,
    on_event: Callable[..., None],
    on_progress: Callable[[float, float, str], None],
    should_stop: Callable[[], bool],
) -> dict[str, Any]:
    """Run ``job`` (arguments of :func:`work`) with ``place.workers`` workers of the connected cluster; its results.

    Raises what the training raised, UsageError where the cluster cannot hold the workers, FactoryError where they did
    not start in time, were lost more often than ``place.attempts`` allows, or the mailbox was lost.
    """
    options = actor_options(place, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    each = {"CPU": options["num_cpus"], "GPU": options["num_gpus"], "memory": options.get("memory", 0)}
    actor: Any = ray.remote(Mailbox)
    mailbox = actor.options(num_cpus=0, scheduling_strategy=here()).remote()
    callbacks: list[Any] = [_Losses(mailbox)]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        trainer = ray.train.torch.TorchTrainer(
            work,
            train_loop_config=job | {"mailbox": mailbox, "gpu": options["num_gpus"] > 0, "folder": os.getcwd()},
            scaling_config=ray.train.ScalingConfig(
                num_workers=place.workers,
                use_gpu=options["num_gpus"] > 0,
                resources_per_worker={name: amount for name, amount in each.items() if amount},
            ),
            run_config=ray.train.RunConfig(
                name="distill",
                storage_path=scratch,  # Ray's own notes; nothing of the run's
                failure_config=ray.train.FailureConfig(max_failures=place.attempts - 1),
                callbacks=callbacks,
            ),
        )
        fit = _Fit(trainer)
        try:
            return _follow(fit, mailbox, place, on_event, on_progress, should_stop)
        finally:
            ray.kill(mailbox)  # without it a first rank that still trains stops


class _Fit(threading.Thread):
    """``trainer.fit()`` beside the driver's main thread, which keeps Ctrl-C."""

    def __init__(self, trainer: Any):
        super().__init__(name="ray-train", daemon=True)
        self.trainer, self.error = trainer, ""
        self.start()

    def run(self) -> None:
        try:
            self.trainer.fit()
        except Exception as error:
            failures = getattr(error, "worker_failures", None)
            self.error = _first(failures) if failures else reason(error)


def _follow(
    fit: _Fit,
    mailbox: Any,
    place: ExecutorSettings,
    on_event: Callable[..., None],
    on_progress: Callable[[float, float, str], None],
    should_stop: Callable[[], bool],
) -> dict[str, Any]:
    begun, waiting = False, Waiting(place)
    while True:
        running = fit.is_alive()
        stopping = should_stop()
        try:
            messages, reached, outcome = ray.get(mailbox.read.remote(stopping))
        except ray.exceptions.RayActorError as error:
            raise FactoryError(f"lost touch with the workers: {reason(error)}; the same command resumes") from error
        for kind, fields in messages:
            on_event(kind, **fields)
            if kind == "worker_started":
                begun = True
            elif kind == "worker_lost":  # all start again, where there are still nodes for them
                begun, waiting = False, Waiting(place)
        if reached:
            on_progress(*reached)
        if not begun and stopping:
            raise Interrupted("interrupted before the workers started; the same command resumes")
        if not begun:
            waiting.look(f"not all of the {place.workers} workers are")
        if not running or (outcome and "error" in outcome):  # Ray Train may still try again, in vain
            break
        fit.join(TICK)
    if outcome is None:
        raise FactoryError(f"the workers were lost {place.attempts} times ({fit.error}); the same command resumes")
    if "error" in outcome:
        raise start_error(outcome["error"], outcome["exit_code"])
    results: dict[str, Any] = outcome["results"]
    return results


def _first(failures: dict[int, Exception]) -> str:
    """The failure that came first: where a worker is lost, the others lose their connection to it."""
    cut = {rank for rank, error in failures.items() if "by peer" in str(error)}
    rank = min(failures, key=lambda rank: (rank in cut, rank))
    if rank in cut:
        return f"worker {rank} lost its connection to another one (killed, out of memory, or its machine is gone)"
    return f"worker {rank}: {reason(failures[rank])}"
