"""Metrics to TensorBoard or Weights & Biases while training: off unless asked for with ``track``."""

import hashlib
from collections.abc import Iterable
from typing import Any, Protocol

from manifests.errors import UsageError
from manifests.storage import Storage

FOLDER = "tensorboard"


class Tracker(Protocol):
    """Takes the numbers of an epoch."""

    def log(self, student: str, step: int, values: dict[str, float]) -> None:
        """One student's line of metrics.jsonl, flat."""

    def close(self) -> None:
        """Everything is on its way."""


class TensorBoard:
    """Event files in OUT/tensorboard/STUDENT. A resumed run replaces what it does again."""

    def __init__(self, storage: Storage, step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UsageError("track: tensorboard needs pip install 'dfkd-factory[tensorboard]'") from None
        if not storage.is_local:
            raise UsageError(f"track: tensorboard writes to a local folder only, not {storage.url}")
        self._open = lambda student: SummaryWriter(storage.folder(f"{FOLDER}/{student}"), purge_step=step + 1)
        self._writers: dict[str, Any] = {}

    def log(self, student: str, step: int, values: dict[str, float]) -> None:
        writer = self._writers.setdefault(student, None) or self._open(student)
        self._writers[student] = writer
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


class WandB:
    """One Weights & Biases run for the run folder; names are STUDENT/metric. Resumes the run of the same folder."""

    def __init__(self, storage: Storage, config: dict[str, Any]):
        try:
            import wandb
        except ImportError:
            raise UsageError("track: wandb needs pip install 'dfkd-factory[wandb]'") from None
        number = hashlib.sha256(storage.url.encode()).hexdigest()[:16]
        self._run = wandb.init(project="dfkd-factory", name=storage.url, id=number, resume="allow", config=config)

    def log(self, student: str, step: int, values: dict[str, float]) -> None:
        self._run.log({f"{student}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        self._run.finish()


def open_trackers(names: Iterable[str], storage: Storage, config: dict[str, Any], step: int) -> list[Tracker]:
    """Those of ``names``; ``step``: where the run stands. Raises UsageError where one cannot work."""
    trackers: list[Tracker] = []
    for name in names:
        trackers.append(TensorBoard(storage, step) if name == "tensorboard" else WandB(storage, config))
    return trackers


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested numbers under slashed names.

    >>> flat({"epoch": 1, "held_out": {"agreement": 0.5}})
    {'epoch': 1.0, 'held_out/agreement': 0.5}
    """
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}/")
        else:
            found[prefix + name] = float(value)
    return found
