"""Where a run stands, read from its folder alone, so any process on any machine can ask."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

from manifests.errors import DataError
from manifests.manifest_file import ManifestFile
from manifests.merge import MANIFEST
from manifests.shard import committed
from manifests.storage import Storage
from pipeline.events import WINDOW, AttemptError, LogSummary, RunningShard, quarantined
from pipeline.lease import live
from pipeline.outputs import trainings
from pipeline.plan import read_plan
from pipeline.terminal import duration, pairs, plain, size


@dataclass(frozen=True)
class RunStatus:
    """``state``: ``complete``, ``running``, or ``stopped`` (not complete and no driver at work: run the command again).

    ``rows`` and ``bytes`` are of the shards that are done. ``trainings``: of :func:`pipeline.outputs.trainings`.
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
            *(("trained", folder + ("" if done else ", not finished")) for folder, done in self.trainings.items()),
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
    log = LogSummary.of(storage, plan.shards)
    holder = live(storage)
    merged = holder is None and len(done) == plan.shards and _in_manifest(storage) == plan.shards
    rate = _rate(log.times, now, holder is not None)
    rows = [rows for rows, _ in islice(reversed(log.results.values()), WINDOW) if rows]
    left = plan.shards - len(done) - len(failed)
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
        seconds_left=round(left / rate) if rate and holder else None,
        last_errors=log.errors,
        stopped_by=None if holder else log.stopped_by,
        trainings=trainings(storage, plan.fingerprint),
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
