"""What a run says of itself while it goes on: how far a shard is and how sure the teacher is, and metrics for
TensorBoard, Weights & Biases and MLflow. Both stages use it; nothing here changes what they compute. Imports no torch.
"""

import math
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from manifests.errors import UsageError
from manifests.storage import Storage

REPORT_SECONDS = 1.0
"""Between two reports of one worker: a denoising step may take milliseconds or minutes."""


@dataclass(frozen=True)
class ShardProgress:
    """Where an attempt at ``shard`` stands: ``share`` of its work, 0 to 1, and ``step`` of the ``steps`` of the present
    group.

    ``rows``: images so far, of which ``kept`` pass the filters. Of those at the end of their trajectories, ``judged``:
    in how many the teacher ``agrees`` with the class asked for, and the sum of its ``confidence``. ``guided``: its mean
    probability of the class asked for in the group's present predictions, known while guidance runs.
    """

    shard: int
    share: float = 0.0
    step: int = 0
    steps: int = 0
    rows: int = 0
    kept: int = 0
    judged: int = 0
    agrees: int = 0
    confidence: float = 0.0
    guided: float | None = None


OnProgress = Callable[[ShardProgress], object]


class ShardWatch:
    """Counts the steps and groups of a shard for ``on_progress``: every group, and steps at most once in
    :data:`REPORT_SECONDS`. ``steps``: of a group, over all phases of its method."""

    def __init__(self, shard: int, groups: int, steps: int, on_progress: OnProgress | None) -> None:
        self._at = ShardProgress(shard, steps=steps)
        self._groups, self._done, self._on_progress = groups, 0, on_progress
        self._next = 0.0

    @property
    def judgment(self) -> dict[str, float]:
        """How many images the teacher has judged, its agreement with the classes asked for, its mean confidence."""
        at = self._at
        if not at.judged:
            return {}
        agreement, confidence = at.agrees / at.judged, at.confidence / at.judged
        return {"judged": at.judged, "agreement": round(agreement, 4), "confidence": round(confidence, 4)}

    def begin_group(self) -> None:
        """A group begins, or begins again in smaller parts."""
        self._at = replace(self._at, share=self._done / self._groups, step=0, guided=None)

    def step(self, confidence: Callable[[], float | None] = lambda: None) -> None:
        """One more step is done. ``confidence`` is asked only for what is reported: on a GPU it waits for the step."""
        at = self._at
        share = min(1.0, (at.step + 1) / (at.steps + 1))  # decoding and judging count as a step more
        self._at = replace(at, step=at.step + 1, share=(self._done + share) / self._groups)
        if self._on_progress and (now := time.monotonic()) >= self._next:
            self._next = now + REPORT_SECONDS
            sure = confidence()
            self._at = replace(self._at, guided=sure if sure is not None and math.isfinite(sure) else None)
            self._on_progress(self._at)

    def end_group(self, rows: Sequence[Mapping[str, Any]] = ()) -> None:
        """A group is done, and the teacher has judged its ``rows``."""
        self._done += 1
        finals = [row for row in rows if not row["timestep"]] or rows
        self._at = replace(
            self._at,
            share=self._done / self._groups,
            rows=self._at.rows + len(rows),
            judged=self._at.judged + len(finals),
            agrees=self._at.agrees + sum(row["teacher_label"] == row["label"] for row in finals),
            kept=self._at.kept + sum(bool(row["kept"]) for row in rows),
            confidence=self._at.confidence + sum(row["confidence"] for row in finals),
        )
        if self._on_progress:
            self._on_progress(self._at)


Log = Callable[[str, int, Mapping[str, float]], object]
"""Takes (curve, step, its metrics); the curve is a student's name, or stage 1's."""
TENSORBOARD = "tensorboard"


@contextmanager
def loggers(names: Sequence[str], storage: Storage, title: str, config: Mapping[str, Any], step: int) -> Iterator[Log]:
    """Everything in ``names`` at once, for the run in ``storage`` that goes on after ``step``.

    A run is known by an id that lies in its folder, whatever path a container gives to that: resumed, it continues its
    curves. ``title`` names it for people. Raises UsageError where a package is missing or the folder cannot be used.
    """
    with ExitStack() as stack:
        opened = [stack.enter_context(LOGGERS[name](storage, title, config, step)) for name in names]

        def log(curve: str, at: int, metrics: Mapping[str, float]) -> None:
            for each in opened:
                each(curve, at, metrics)

        yield log


@contextmanager
def tensorboard(storage: Storage, title: str, config: Mapping[str, Any], step: int) -> Iterator[Log]:
    """Event files in RUN/tensorboard/CURVE. A resumed run replaces what it does again."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise _not_installed("tensorboard") from None
    if not storage.is_local:
        raise UsageError(f"loggers: tensorboard writes to a local folder only, not {storage.url}")
    writers: dict[str, Any] = {}
    with ExitStack() as stack:

        def log(curve: str, at: int, metrics: Mapping[str, float]) -> None:
            if curve not in writers:
                folder = storage.folder(f"{TENSORBOARD}/{curve}")
                writers[curve] = stack.enter_context(SummaryWriter(folder, purge_step=step + 1))
            for name, value in metrics.items():
                writers[curve].add_scalar(name, value, at)
            writers[curve].flush()

        yield log


@contextmanager
def wandb(storage: Storage, title: str, config: Mapping[str, Any], step: int) -> Iterator[Log]:
    """One Weights & Biases run; metrics are CURVE/metric."""
    try:
        import wandb
    except ImportError:
        raise _not_installed("wandb") from None
    number = _id(storage, "wandb", lambda: uuid.uuid4().hex[:16])
    remote = wandb.init(project="dfkd-factory", name=title, id=number, resume="allow", config=dict(config))
    try:
        yield lambda curve, at, metrics: remote.log({f"{curve}/{k}": v for k, v in metrics.items()}, step=at)
    finally:
        remote.finish()


@contextmanager
def mlflow(storage: Storage, title: str, config: Mapping[str, Any], step: int) -> Iterator[Log]:
    """One run of MLflow, at the tracking server that MLFLOW_TRACKING_URI names; metrics are CURVE/metric."""
    try:
        import mlflow
    except ImportError:
        raise _not_installed("mlflow") from None
    client = mlflow.MlflowClient()

    def begin() -> str:
        found = client.get_experiment_by_name("dfkd-factory")
        where = found.experiment_id if found else client.create_experiment("dfkd-factory")
        begun: str = client.create_run(where, run_name=title).info.run_id
        client.log_dict(begun, dict(config), "settings.json")
        return begun

    number = _id(storage, "mlflow", begin)

    def log(curve: str, at: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            client.log_metric(number, f"{curve}/{name}", value, step=at)

    client.update_run(number, status="RUNNING")
    yield log
    client.set_terminated(number)


LOGGERS = {"tensorboard": tensorboard, "wandb": wandb, "mlflow": mlflow}


def _id(storage: Storage, service: str, begin: Callable[[], str]) -> str:
    """The run's id at ``service``, in its folder; the first time ``begin`` makes it."""
    name = f"{service}-id.txt"
    if not storage.exists(name):
        storage.create(name, begin().encode())
    return storage.read(name).decode("ascii", "replace")


def _not_installed(name: str) -> UsageError:
    return UsageError(f"loggers: {name} needs pip install 'dfkd-factory[{name}]'")
