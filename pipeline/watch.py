"""What can be seen of a run while it goes on: the reports of all workers as one line of progress, for terminals, logs,
``factory status`` and loggers; a growing contact sheet of stage 1. All of it is the driver's, and none of it changes
what is made; what cannot be written is left out, since a run must not end for it.
"""

import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from manifests.checked_json import dump_json, load_as, load_tree
from manifests.errors import DataError, StoreError
from manifests.merge import load_shard_table
from manifests.order import spread
from manifests.reader import Manifest
from manifests.shard import done_record
from manifests.storage import Storage
from pipeline.inspect import contact_sheet, png, samples
from pipeline.terminal import OnProgress, Pace, plain
from stages.progress import Log, ShardProgress

PROGRESS, SHEET = "progress.json", "sheet.png"
SECONDS, SECONDS_REMOTE = {PROGRESS: 2.0, SHEET: 30.0}, {PROGRESS: 15.0, SHEET: 300.0}
"""Between two versions of a file: objects of a store cost a request each."""
SUMS = ("rows", "kept", "judged", "agrees", "confidence")
PER_CLASS, PER_SHARD, ROWS = 12, 2, 24
"""Of the growing sheet: images of a class, those of them that a shard adds, classes."""


def _seconds(storage: Storage, name: str) -> float:
    return (SECONDS if storage.is_local else SECONDS_REMOTE)[name]


@dataclass(frozen=True)
class Reached:
    """Where a run stood at ``time`` (seconds since 1970): ``done`` of ``total`` shards or steps, and the line that
    people saw."""

    time: float
    done: float
    total: float
    seconds_left: float | None
    note: str


def read_reached(storage: Storage) -> Reached | None:
    """What the driver of the run in ``storage`` left last; None where there is nothing to be read."""
    try:
        return load_as(Reached, load_tree(storage.read(PROGRESS))) if storage.exists(PROGRESS) else None
    except (DataError, ValueError):
        return None


class Recorder:
    """Passes progress on to ``shown`` and keeps it in the run's :data:`PROGRESS`."""

    def __init__(self, storage: Storage, shown: OnProgress) -> None:
        self._storage, self._shown, self._pace = storage, shown, Pace()
        self._next = 0.0

    def __call__(self, done: float, total: float, note: str) -> None:
        self._shown(done, total, note)
        left, now = self._pace.left(done, total), time.monotonic()
        if now < self._next:
            return
        self._next = now + _seconds(self._storage, PROGRESS)
        reached = Reached(round(time.time(), 1), done, total, None if left is None else round(left, 1), note)
        with suppress(StoreError):
            self._storage.write(PROGRESS, dump_json(asdict(reached)).encode())

    def finish(self) -> None:
        """The run is complete: where it stood says nothing any more."""
        with suppress(StoreError, DataError):
            self._storage.delete(PROGRESS)


class SynthWatch:
    """Stage 1 as seen by its driver. ``images``: that a shard makes."""

    def __init__(
        self,
        shown: OnProgress = lambda done, total, note: None,
        images: int = 0,
        log: Log = lambda curve, step, metrics: None,
        on_shard: Callable[[int], object] = lambda shard: None,
    ) -> None:
        self._shown, self._images, self._log, self._on_shard = shown, images, log, on_shard
        self._running: dict[int, ShardProgress] = {}
        self._finished = ShardProgress(-1)  # sums over the shards that this run has finished
        self._done, self._total, self._workers, self._failed = 0, 0, 0, 0
        self._pace = Pace()

    def begin(self, done: int, total: int) -> None:
        """Workers start."""
        self._pace.speed(done)
        self._shown(done, total, f"{done * self._images} images, loading models")

    def counts(self, done: int, total: int, running: int, failed: int) -> None:
        """How many shards are done, planned, handed out, in quarantine; shown."""
        self._done, self._total, self._workers, self._failed = done, total, running, failed
        self._show()

    def report(self, progress: ShardProgress) -> None:
        """What a worker says of its shard; shown."""
        self._running[progress.shard] = progress
        self._show()

    def lost(self, shard: int) -> None:
        """An attempt failed: what it made is no part of the dataset."""
        self._running.pop(shard, None)

    def finished(self, shard: int, report: dict[str, Any], done: int) -> None:
        """``shard`` is done, the ``done``-th of all."""
        self._running.pop(shard, None)
        rows, sums = report.get("rows") or 0, self._finished
        if judged := report.get("judged"):
            self._finished = ShardProgress(
                -1,
                rows=sums.rows + rows,
                kept=sums.kept + (report.get("kept") or 0),
                judged=sums.judged + judged,
                agrees=sums.agrees + round(report["agreement"] * judged),
                confidence=sums.confidence + report["confidence"] * judged,
            )
        self._on_shard(shard)
        means: dict[str, float] = {name: report[name] for name in ("agreement", "confidence") if name in report}
        kept = {"kept": (report.get("kept") or 0) / rows} if rows else {}
        speed = {"images_per_second": self._pace.speed(done) * rows}
        self._log("synth", done, {"images": done * (self._images or rows), **means, **kept, **speed})

    def _show(self) -> None:
        """``1250 images, 2.4/s, agreement 93%, confidence 87%, kept 95%, step 12/20 (58% sure), 4 running``."""
        at = list(self._running.values())
        done = self._done + sum(progress.share for progress in at)
        images, speed = self._done * self._images + sum(progress.rows for progress in at), self._pace.speed(done)
        parts = [f"{images} images"]
        if speed * self._images > 0:
            parts.append(f"{speed * self._images:.3g}/s")
        total = {name: sum(getattr(each, name) for each in (self._finished, *at)) for name in SUMS}
        if total["judged"]:
            agreement, confidence = total["agrees"] / total["judged"], total["confidence"] / total["judged"]
            kept = total["kept"] / total["rows"]
            parts.append(f"agreement {agreement:.0%}, confidence {confidence:.0%}, kept {kept:.0%}")
        if at and (first := min(at, key=lambda progress: progress.shard)).step:
            sure = [progress.guided for progress in at if progress.guided is not None]
            guided = f" ({sum(sure) / len(sure):.0%} sure)" if sure else ""
            parts.append(f"step {first.step}/{first.steps}{guided}")
        if self._workers > 1:
            parts.append(f"{self._workers} running")
        if self._failed:
            parts.append(f"{self._failed} failed")
        self._shown(done, self._total, ", ".join(parts))


class GrowingSheet:
    """A contact sheet of the latest images, one row for each class (evenly chosen ones of many), rewritten now and then
    in the run folder as shards are finished. ``done``: shards of earlier runs to begin with."""

    def __init__(self, storage: Storage, class_names: Sequence[str], done: Sequence[int] = ()) -> None:
        self._storage, self._names = storage, class_names
        self._labels = {*spread(np.arange(len(class_names)), ROWS).tolist()}
        self._images: dict[int, deque[bytes]] = defaultdict(lambda: deque(maxlen=PER_CLASS))
        self._earlier: list[int] = spread(np.array(sorted(done), np.int64), PER_CLASS // PER_SHARD).tolist()
        self._next = 0.0

    def add(self, shard: int) -> None:
        """``shard`` is done: show of it, too, if the last version is old enough."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + _seconds(self._storage, SHEET)
        earlier, self._earlier = self._earlier, []
        with suppress(StoreError, DataError):
            for each in (*earlier, shard):
                self._read(each)
            rows = [(plain(self._names[label]), list(self._images[label])) for label in sorted(self._images)]
            if rows:
                self._storage.write(SHEET, png(contact_sheet(rows)))

    def _read(self, shard: int) -> None:
        record = done_record(self._storage, shard)
        if record is None:
            return
        table = load_shard_table(self._storage, record).select(["label", "kept", "timestep", "offset", "size"])
        taken: dict[int, int] = defaultdict(int)
        for row in table.to_pylist():
            label = row["label"]
            if label in self._labels and row["kept"] and not row["timestep"] and taken[label] < PER_SHARD:
                taken[label] += 1
                self._images[label].append(self._storage.read_range(record.tar, row["offset"], row["size"]))


def final_sheet(storage: Storage, manifest: Manifest) -> str | None:
    """Replace the growing sheet by one of images from the whole dataset; its file, None where there is none."""
    with suppress(StoreError, DataError):
        if rows := samples(manifest, columns=PER_CLASS):
            storage.write(SHEET, png(contact_sheet(rows)), beside=True)
            return storage.path(SHEET)
    return None
