"""Where runs stand, read from their folders alone, so any process on any machine can ask: a run of stage 1 or 2, or a
folder of such runs (rounds, a demo)."""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

from manifests.errors import DataError
from manifests.manifest_file import ManifestFile
from manifests.merge import MANIFEST
from manifests.shard import committed
from manifests.storage import Storage
from pipeline.events import WINDOW, AttemptError, LogSummary, RunningShard, quarantined, read_events
from pipeline.lease import live
from pipeline.outputs import RESULTS, RUN, trainings
from pipeline.plan import PLAN, read_plan
from pipeline.terminal import duration, pairs, plain, share, size
from pipeline.watch import SHEET, Reached, read_reached


@dataclass(frozen=True)
class RunStatus:
    """``state``: ``complete``, ``running``, or ``stopped`` (not complete and no driver at work: run the command again).

    ``rows`` and ``bytes`` are of the shards that are done. ``trainings``: of :func:`pipeline.outputs.trainings`.
    ``reached``: what the driver said last, within a shard, too; ``sheet``: the contact sheet that grows with the run.
    """

    run: str
    state: str
    recipe: str
    shards: int
    done: int
    failed: list[int]
    missing: int
    running: list[RunningShard]
    driver: str | None
    rows: int
    bytes: int
    shards_per_hour: float | None
    images_per_second: float | None
    seconds_left: int | None
    last_errors: list[AttemptError]
    stopped_by: str | None
    trainings: dict[str, bool]
    reached: Reached | None = None
    sheet: str | None = None

    def lines(self, now: float | None = None) -> Iterator[str]:
        now = time.time() if now is None else now
        failed = f", {len(self.failed)} failed" if self.failed else ""
        yield f"{plain(self.run)}: {self.state}, {self.done} of {self.shards} shards done{failed}"
        speed = f", {self.images_per_second:.3g} images/s" if self.images_per_second else ""
        yield from pairs(
            9,
            ("driver", self.driver),
            *(("running", f"shard {r.shard:06d} on {r.worker} for {duration(now - r.since)}") for r in self.running),
            ("made", f"{self.rows} images, {size(self.bytes)}{speed}" if self.rows else None),
            ("at", _at(self.reached) if self.state == "running" else None),
            ("left", f"about {duration(self.seconds_left)}" if self.seconds_left else None),
            ("sheet", self.sheet),
            *(("failed", f"shard {n:06d}; factory run synth … --retry-failed tries it again") for n in self.failed),
            ("stopped", self.stopped_by),
            *(("trained", folder + ("" if done else ", not finished")) for folder, done in self.trainings.items()),
            *(
                ("error", f"{duration(now - e.time)} ago, shard {e.shard}, attempt {e.attempt}: {e.error}")
                for e in self.last_errors
            ),
        )


@dataclass(frozen=True)
class TrainingStatus:
    """A run of stage 2. ``students``: the metrics of each one's last epoch; ``parked``: why some take no further part.
    ``state`` as of :class:`RunStatus`."""

    run: str
    state: str
    driver: str | None
    reached: Reached | None
    seconds_left: int | None
    students: dict[str, dict[str, float]]
    parked: dict[str, str]

    def lines(self) -> Iterator[str]:
        yield f"{plain(self.run)}: {self.state}, stage 2"
        yield from pairs(
            9,
            ("driver", self.driver),
            ("at", _at(self.reached) if self.state != "complete" else None),
            ("left", f"about {duration(self.seconds_left)}" if self.seconds_left else None),
            *(("student", f"{name}: {_scores(metrics)}") for name, metrics in self.students.items()),
            *(("parked", f"{name}: {reason}") for name, reason in self.parked.items()),
        )


@dataclass(frozen=True)
class FolderStatus:
    """The runs in a folder, such as the rounds of ``factory run rounds``. ``state``: running where one of them is,
    complete where all are."""

    folder: str
    state: str
    runs: list[RunStatus | TrainingStatus]

    def lines(self) -> Iterator[str]:
        yield f"{plain(self.folder)}: {self.state}, {len(self.runs)} runs"
        for each in self.runs:
            lines = list(each.lines())
            yield from lines if each.state == "running" else lines[:1]


def _at(reached: Reached | None) -> str | None:
    return None if reached is None else f"{reached.done:.4g} of {reached.total:g}: {reached.note}"


def _scores(metrics: dict[str, float]) -> str:
    parts = [f"epoch {metrics['epoch']:g}"] if "epoch" in metrics else []
    parts += [f"loss {metrics['loss']:.3g}"] if "loss" in metrics else []
    names = {"val_agreement": "agreement", "test_accuracy": "test"}
    return ", ".join([*parts, *(f"{shown} {share(metrics[name])}" for name, shown in names.items() if name in metrics)])


def status(storage: Storage, now: float | None = None) -> RunStatus | TrainingStatus | FolderStatus:
    """Where the run, or the runs, in ``storage`` stand. Raises DataError where it holds none."""
    now = time.time() if now is None else now
    if storage.exists(PLAN):
        return run_status(storage, now)
    if storage.exists(RUN):
        return training_status(storage, now)
    places = [storage.folder(name) for name in _runs_in(storage)]
    runs = [found for place in places if not isinstance(found := status(Storage(place), now), FolderStatus)]
    if not runs:
        read_plan(storage)  # raises, and says what is missing
    states = {each.state for each in runs}
    state = "running" if "running" in states else "complete" if states == {"complete"} else "stopped"
    return FolderStatus(storage.url, state, runs)


MOST_RUNS = 1000


def _runs_in(storage: Storage) -> list[str]:
    """Folders of runs below a local folder: its own, and a ``distill`` in each of them."""
    if not storage.is_local or not os.path.isdir(storage.url):
        return []
    names = sorted(entry.name for entry in os.scandir(storage.url) if entry.is_dir(follow_symlinks=False))[:MOST_RUNS]
    both = [place for name in names for place in (name, f"{name}/distill")]
    return [name for name in both if storage.exists(f"{name}/{PLAN}") or storage.exists(f"{name}/{RUN}")]


def training_status(storage: Storage, now: float) -> TrainingStatus:
    """Where a run of stage 2 stands, from its events and what its driver said last."""
    students: dict[str, dict[str, float]] = {}
    parked: dict[str, str] = {}
    for event in read_events(storage):
        if event["kind"] == "run_started":
            parked.clear()
        if event["kind"] == "epoch_done" and isinstance(found := event.get("students"), dict):
            for name, metrics in found.items():
                if isinstance(metrics, dict):
                    students[name] = {k: v for k, v in metrics.items() if isinstance(v, int | float)}
        elif event["kind"] == "student_parked":
            parked[str(event.get("student"))] = str(event.get("reason"))[:2000]
    holder, reached = live(storage), read_reached(storage)
    return TrainingStatus(
        run=storage.url,
        state="running" if holder else "complete" if storage.exists(RESULTS) else "stopped",
        driver=str(holder) if holder else None,
        reached=reached,
        seconds_left=_left(reached, now) if holder else None,
        students=students,
        parked=parked,
    )


def _left(reached: Reached | None, now: float) -> int | None:
    """Seconds left by now, of what the driver reckoned then."""
    if reached is None or reached.seconds_left is None:
        return None
    return max(1, round(reached.seconds_left - (now - reached.time)))


def run_status(storage: Storage, now: float) -> RunStatus:
    """Counts, rate, time left and last errors of a run of stage 1."""
    plan = read_plan(storage)
    done = {shard for shard in committed(storage) if shard < plan.shards}
    failed = {shard for shard in quarantined(storage) if shard < plan.shards} - done
    log = LogSummary.of(storage, plan.shards)
    holder = live(storage)
    merged = holder is None and len(done) == plan.shards and _in_manifest(storage) == plan.shards
    rate = _rate(log.times, now, holder is not None)
    rows = [rows for rows, _ in islice(reversed(log.results.values()), WINDOW) if rows]
    left = plan.shards - len(done) - len(failed)
    reached = read_reached(storage)
    return RunStatus(
        run=storage.url,
        state="running" if holder else "complete" if merged else "stopped",
        recipe=str(plan.recipe.get("name", "")),
        shards=plan.shards,
        done=len(done),
        failed=sorted(failed),
        missing=left,
        running=[log.running[shard] for shard in sorted(log.running.keys() - done)] if holder else [],
        driver=str(holder) if holder else None,
        rows=sum(rows for rows, _ in log.results.values()),
        bytes=sum(size for _, size in log.results.values()),
        shards_per_hour=round(rate * 3600, 3) if rate else None,
        images_per_second=round(rate * sum(rows) / len(rows), 4) if rate and rows else None,
        seconds_left=(_left(reached, now) or (round(left / rate) if rate else None)) if holder else None,
        last_errors=log.errors,
        stopped_by=None if holder else log.stopped_by,
        trainings=trainings(storage, plan.fingerprint),
        reached=reached if holder else None,
        sheet=storage.path(SHEET) if storage.exists(SHEET) else None,
    )


def _in_manifest(storage: Storage) -> int:
    """Shards that the manifest names, from its footer alone; 0 where there is none to be read."""
    try:
        return len(ManifestFile(storage, MANIFEST).info.tars)
    except DataError:
        return 0


def _rate(times: Sequence[float], now: float, alive: bool) -> float | None:
    """Shards per second over the last ``WINDOW`` shards of the latest run; a driver at work that has been without a
    result for longer than ever before counts as slower."""
    if len(times) < 2:
        return None
    gap = max(later - earlier for earlier, later in pairwise(times))
    end = now if alive and now - times[-1] > gap else times[-1]
    return (len(times) - 1) / (end - times[0]) if end > times[0] else None
