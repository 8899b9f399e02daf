"""Where a run stands, read from its folder alone, so any process on any machine can ask."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from manifests.errors import DataError
from manifests.manifest_file import ManifestFile
from manifests.merge import MANIFEST
from manifests.shard import committed
from manifests.storage import Storage
from pipeline.events import quarantined, read_events
from pipeline.lease import live
from pipeline.plan import read_plan
from pipeline.terminal import duration, pairs, plain, size

LAST_ERRORS = 3
WINDOW = 20  # shards over which the rate is taken: long enough to be steady, short enough to follow a changed pool


@dataclass(frozen=True)
class RunningShard:
    shard: int
    worker: str | None
    since: float


@dataclass(frozen=True)
class AttemptError:
    time: float
    shard: int | None
    attempt: int | None
    error: str | None


@dataclass(frozen=True)
class RunStatus:
    """``state``: ``complete``, ``running``, or ``stopped`` (not complete and no driver at work: run the command again).

    ``rows`` and ``bytes`` are of the shards that are done.
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
            ("left", f"about {duration(self.seconds_left)}" if self.seconds_left else None),
            *(("failed", f"shard {n:06d}; factory run synth … --retry-failed tries it again") for n in self.failed),
            ("stopped", self.stopped_by),
            *(
                ("error", f"{duration(now - e.time)} ago, shard {e.shard}, attempt {e.attempt}: {e.error}")
                for e in self.last_errors
            ),
        )


def status(storage: Storage, now: float | None = None) -> RunStatus:
    """Counts, rate, time left and last errors of a run. Raises DataError where ``storage`` holds no run."""
    now = time.time() if now is None else now
    plan = read_plan(storage)
    done = {shard for shard in committed(storage) if shard < plan.shards}
    failed = {shard for shard in quarantined(storage) if shard < plan.shards} - done
    events = read_events(storage)
    holder = live(storage)
    merged = holder is None and len(done) == plan.shards and _in_manifest(storage) == plan.shards
    running = _running(events, done) if holder else {}
    rate = _rate(events, now, holder is not None)
    left = plan.shards - len(done) - len(failed)
    return RunStatus(
        run=storage.url,
        state="running" if holder else "complete" if merged else "stopped",
        recipe=str(plan.recipe.get("name", "")),
        shards=plan.shards,
        done=len(done),
        failed=sorted(failed),
        missing=left,
        running=[RunningShard(shard, event.get("worker"), event["time"]) for shard, event in running.items()],
        driver=str(holder) if holder else None,
        rows=_total(events, "rows"),
        bytes=_total(events, "bytes"),
        shards_per_hour=round(rate * 3600, 3) if rate else None,
        images_per_second=_images(events, rate),
        seconds_left=round(left / rate) if rate and holder else None,
        last_errors=[
            AttemptError(event["time"], event.get("shard"), event.get("attempt"), event.get("error"))
            for event in [event for event in events if event["kind"] == "shard_failed"][-LAST_ERRORS:]
        ],
        stopped_by=_stopped_by(events) if not holder else None,
    )


def _in_manifest(storage: Storage) -> int:
    """Shards that the manifest names, from its footer alone; 0 where there is none to be read."""
    try:
        return len(ManifestFile(storage, MANIFEST).info.tars)
    except DataError:
        return 0


def _running(events: Sequence[dict[str, Any]], done: set[int]) -> dict[int, dict[str, Any]]:
    """Shards of the latest run that were started and have not ended."""
    running: dict[int, dict[str, Any]] = {}
    for event in events:
        if event["kind"] == "run_started":
            running = {}
        elif event["kind"] == "shard_started":
            running[event["shard"]] = event
        elif event["kind"] in ("shard_done", "shard_failed", "shard_quarantined"):
            running.pop(event["shard"], None)
    return {shard: event for shard, event in sorted(running.items()) if shard not in done}


def _rate(events: Sequence[dict[str, Any]], now: float, alive: bool) -> float | None:
    """Shards per second over the last ``WINDOW`` shards of the latest run; a driver at work that has been without a
    result for longer than ever before counts as slower."""
    begun = max((i for i, event in enumerate(events) if event["kind"] == "run_started"), default=None)
    if begun is None:
        return None
    ended = [event["time"] for event in events[begun:] if event["kind"] == "shard_done"]
    if not ended:
        return None
    times = [events[begun]["time"], *ended][-(WINDOW + 1) :]
    gap = max(later - earlier for earlier, later in pairwise(times))
    end = now if alive and now - times[-1] > gap else times[-1]
    return (len(times) - 1) / (end - times[0]) if end > times[0] else None


def _total(events: Sequence[dict[str, Any]], field: str) -> int:
    """Sum over shards, each counted once however often it was reported."""
    latest = {e.get("shard"): e.get(field) or 0 for e in events if e["kind"] == "shard_done"}
    return sum(latest.values())


def _images(events: Sequence[dict[str, Any]], rate: float | None) -> float | None:
    rows = [event["rows"] for event in events if event["kind"] == "shard_done" and event.get("rows")]
    return round(rate * sum(rows[-WINDOW:]) / len(rows[-WINDOW:]), 4) if rows and rate else None


def _stopped_by(events: Sequence[dict[str, Any]]) -> str | None:
    """Why the latest run ended early."""
    ends = [e for e in events if e["kind"] in ("run_started", "run_finished", "run_interrupted", "run_failed")]
    if not ends or ends[-1]["kind"] not in ("run_interrupted", "run_failed"):
        return None
    return str(ends[-1].get("error") or "interrupted")
