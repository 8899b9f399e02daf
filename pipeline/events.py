"""What happened in a run: events.jsonl, one JSON line each, and the quarantine of shards that failed every attempt.

Kinds: run_started, shard_started, shard_done, shard_failed, shard_quarantined, worker_lost, group_split (done in
micro-batches for want of memory), note, warning, run_finished, run_interrupted, run_failed.

Events inform; correctness rests on done records alone, so a lost tail harms nothing, and an event that cannot be
written stops no run: what comes next says better what is wrong with its folder. (A link in the log's place does.)
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from manifests.checked_json import dump_checked, dump_json, load_as, load_checked, load_json, load_tree
from manifests.errors import DataError, FactoryError, StoreError
from manifests.storage import Storage, numbered
from pipeline.terminal import say

FOLDER = "failed"
"""The quarantine: shards that failed every attempt (``failed/000012.json``), until --retry-failed."""


@dataclass(frozen=True)
class Failure:
    """Why a shard is in quarantine: how often it was tried and what its last attempt said."""

    shard: int
    attempts: int
    error: str
    worker: str = ""
    trace: str = ""


def _name(shard: int) -> str:
    return f"{FOLDER}/{shard:06d}.json"


def quarantine(storage: Storage, failure: Failure) -> None:
    """Record ``failure``; a later record of the same shard replaces it."""
    storage.write(_name(failure.shard), (json.dumps(asdict(failure), indent=1) + "\n").encode())


def quarantined(storage: Storage) -> set[int]:
    """Shards in quarantine, from the folder's listing alone."""
    return set(numbered(storage, FOLDER))


def failures(storage: Storage) -> dict[int, Failure]:
    """Every quarantine record. Raises :class:`DataError` naming one that cannot be read."""
    found = {}
    names = numbered(storage, FOLDER)
    for (shard, name), data in zip(names.items(), storage.read_many(names.values()), strict=True):
        try:
            found[shard] = load_as(Failure, load_tree(data))
            if found[shard].shard != shard:
                raise ValueError(f"it is of shard {found[shard].shard}")
        except ValueError as error:
            raise DataError(f"{storage.path(name)}: no quarantine record ({error}); delete it") from None
    return found


def release(storage: Storage, shards: Iterable[int]) -> None:
    """Take ``shards`` out of quarantine, so that the next run tries them again."""
    for shard in shards:
        storage.delete(_name(shard))


LOCAL = "events.jsonl"
REMOTE = "events"  # object stores cannot append: objects of a driver's own, the last of them rewritten
REWRITE_SECONDS = 5.0
FULL = 1000  # lines after which a driver begins another object, so that what it rewrites stays small
URGENT = frozenset({"run_started", "run_finished", "run_interrupted", "run_failed", "shard_quarantined", "warning"})


class EventLog:
    """Appends events to a run folder; a context manager, since remote logs are buffered.

    ``shards``: of the plan, for a run of stage 1; from then on a :class:`LogSummary` of a long log is kept up to date.
    """

    def __init__(self, storage: Storage, clock: Callable[[], float] = time.time) -> None:
        self.storage, self.clock = storage, clock
        self.shards = 0
        self._unsummed, self._summary_after = 0, SUMMARY_AFTER
        self._lines: list[bytes] = []
        self._stem, self._part = f"{REMOTE}/{int(clock() * 1000):015d}-{os.getpid()}", 0
        self._flushed = 0.0
        self._pending = False
        if storage.is_local:
            _end_torn_line(storage)

    def write(self, kind: str, **fields: Any) -> None:
        """Record one event. Local: on its way to disk at once. Remote: at most ``REWRITE_SECONDS`` late."""
        now = self.clock()
        line = (dump_json({"time": round(now, 3), "kind": kind, **fields}, ensure_ascii=False) + "\n").encode()
        if self.storage.is_local:
            with suppress(StoreError):
                self.storage.append(LOCAL, line)
        else:
            self._lines.append(line)
            self._pending = True
            if kind in URGENT or now - self._flushed >= REWRITE_SECONDS:
                self.flush()
        self._unsummed += len(line)
        if kind == "shard_done" and self._unsummed >= self._summary_after:  # by the driver's loop, not a heartbeat
            self._sum_up()

    def flush(self) -> None:
        """Write buffered events of a remote folder, or keep them for the next time where it fails."""
        if self._pending:
            self._flushed = self.clock()
            with suppress(StoreError):
                self.storage.write(f"{self._stem}-{self._part:05d}.jsonl", b"".join(self._lines))
                self._pending = False
                if len(self._lines) >= FULL:
                    self._lines, self._part = [], self._part + 1

    def _sum_up(self) -> None:
        self._unsummed = 0
        with suppress(FactoryError):
            if self.shards and sum(_sizes(self.storage).values()) >= SUMMARY_AFTER:
                summary = LogSummary.of(self.storage, self.shards).to_json()
                self.storage.write(SUMMARY, summary)
                self._summary_after = max(SUMMARY_AFTER, 8 * len(summary))  # that of many shards is long itself

    def __enter__(self) -> "EventLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()
        if self._unsummed:
            self._sum_up()


class Loud:
    """An event log that also tells people what went wrong, as it happens."""

    def __init__(self, log: EventLog) -> None:
        self.log = log
        self._split = False

    def write(self, kind: str, **fields: Any) -> None:
        """Record one event; failures and warnings go to stderr too."""
        self.log.write(kind, **fields)
        if kind in ("warning", "note"):
            say(str(fields["message"]))
        elif kind == "group_split" and not self._split:  # once: usually every group is as large
            self._split = True
            say(f"out of memory: group {fields.get('group')} was done in micro-batches of {fields.get('micro_batch')}")
        elif kind == "worker_lost" and "shard" not in fields:
            say(f"{fields['error']}; all workers start again from the last checkpoint")
        elif kind in ("shard_failed", "worker_lost", "shard_quarantined"):
            say(f"{kind.replace('_', ' ')}: shard {fields.get('shard')}: {fields.get('error')}")


NUMBERS = ("time", "shard", "attempt", "rows", "kept", "bytes", "seconds")
"""Fields that are numbers of 64 bits wherever they occur; a line in which they are not is no event."""


def read_events(storage: Storage) -> Iterator[dict[str, Any]]:
    """Every event of a run folder in the order of writing, in constant memory: a log may have any length. A torn last
    line (a killed driver) is passed over, like any other that is no event."""
    return _events(storage, _sizes(storage), {})


def _sizes(storage: Storage) -> dict[str, int]:
    """Bytes of each file of the log that holds something, in the order of writing."""
    remote = {name: size for name, size in storage.sizes(REMOTE).items() if name.endswith(".jsonl")}
    return {name: size for name, size in {LOCAL: storage.size(LOCAL) or 0, **remote}.items() if size}


def _events(storage: Storage, sizes: dict[str, int], covered: dict[str, int]) -> Iterator[dict[str, Any]]:
    """What follows the first ``covered`` bytes of each file."""
    for name, size in sizes.items():
        if size > (start := covered.get(name, 0)):
            for line in storage.lines(name, start, size):
                if (event := _parse(line)) is not None:
                    yield event


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        event = load_json(line)
    except ValueError:
        return None
    if not isinstance(event, dict) or not isinstance(event.get("kind"), str) or event.get("time") is None:
        return None
    numbers = [value for name in NUMBERS if (value := event.get(name)) is not None]
    return event if all(isinstance(number, int | float) and abs(number) < 2**63 for number in numbers) else None


def _end_torn_line(storage: Storage) -> None:
    """A driver killed mid-write leaves half a line: end it, so that the next event stands on its own."""
    size = storage.size(LOCAL)
    with suppress(StoreError):
        if size and storage.read_range(LOCAL, size - 1, 1) != b"\n":
            storage.append(LOCAL, b"\n")


SUMMARY = "events.summary.json"
SUMMARY_AFTER = 1 << 20
"""Bytes of a log that a reader may have to go through; a driver sums up what is more."""
LAST_ERRORS = 3
WINDOW = 20
"""Shards over which the rate is taken: long enough to be steady, short enough to follow a changed pool."""
_TAIL = 4096
_Number = Annotated[float, Field(gt=-(2**63), lt=2**63, allow_inf_nan=False)]
_Count = Annotated[int, Field(gt=-(2**63), lt=2**63)]


@dataclass(frozen=True)
class RunningShard:
    shard: int
    worker: str | None
    since: _Number


@dataclass(frozen=True)
class AttemptError:
    time: _Number
    shard: int | None
    attempt: int | None
    error: str | None


@dataclass
class LogSummary:
    """What the events of a run of stage 1 come to, added one by one; its memory depends on the plan, not on the log.

    ``results``: rows and bytes of each shard, the last of each; of the latest run: ``times`` of its last results,
    shards ``running``, and what it was ``stopped_by``. ``covered``: bytes of each file of the log that it holds;
    ``tail``: the sha256 of the last of them, by which a replaced log is noticed.
    """

    results: dict[int, tuple[_Count, _Count]] = field(default_factory=dict)
    errors: list[AttemptError] = field(default_factory=list)
    times: list[_Number] = field(default_factory=list)
    running: dict[int, RunningShard] = field(default_factory=dict)
    stopped_by: str | None = None
    covered: dict[str, int] = field(default_factory=dict)
    tail: str = ""

    @classmethod
    def of(cls, storage: Storage, shards: int) -> "LogSummary":
        """Of the log in ``storage``: a driver's summary, where there is one, and what came after it. Nothing is
        written."""
        sizes = _sizes(storage)
        summary = _stored(storage, sizes) or cls()
        for event in _events(storage, sizes, summary.covered):
            summary.add(event, shards)
        summary.covered, summary.tail = sizes, _tail(storage, sizes)
        summary.results = {shard: found for shard, found in summary.results.items() if 0 <= shard < shards}
        summary.running = {shard: found for shard, found in summary.running.items() if 0 <= shard < shards}
        return summary

    def to_json(self) -> bytes:
        return dump_checked(TypeAdapter(LogSummary).dump_python(self, mode="json"))

    def add(self, event: dict[str, Any], shards: int) -> None:
        kind, time, shard = event["kind"], event["time"], event.get("shard")
        if kind == "run_started":
            self.times, self.running, self.stopped_by = [], {}, None
        if kind in ("run_started", "shard_done"):
            self.times = [*self.times[-WINDOW:], time]
        if kind == "shard_failed":
            shard, attempt = _whole(shard), _whole(event.get("attempt"))
            error = AttemptError(time, shard, attempt, _text(event.get("error")))
            self.errors = [*self.errors, error][-LAST_ERRORS:]
        elif kind in ("run_interrupted", "run_failed"):
            self.stopped_by = _text(event.get("error")) or "interrupted"
        if not isinstance(shard, int) or not 0 <= shard < shards:
            return
        if kind == "shard_done":
            self.results.pop(shard, None)  # the latest last
            self.results[shard] = (int(event.get("rows") or 0), int(event.get("bytes") or 0))
        if kind == "shard_started":
            self.running[shard] = RunningShard(shard, _text(event.get("worker")), time)
        elif kind in ("shard_done", "shard_failed", "shard_quarantined"):
            self.running.pop(shard, None)


def _stored(storage: Storage, sizes: dict[str, int]) -> LogSummary | None:
    """The summary that a driver left, if it is of the first part of this log."""
    if not storage.exists(SUMMARY):
        return None
    try:
        summary = load_as(LogSummary, load_checked(storage.read(SUMMARY)))
    except (ValueError, DataError):
        return None
    covered = summary.covered
    begins_alike = all(0 < size <= sizes.get(name, 0) for name, size in covered.items())
    return summary if covered and begins_alike and _tail(storage, covered) == summary.tail else None


def _tail(storage: Storage, sizes: dict[str, int]) -> str:
    """The sha256 of the last bytes of a log of these files."""
    name, size = [*sizes.items()][-1] if sizes else ("", 0)
    last = storage.read_range(name, max(0, size - _TAIL), min(size, _TAIL)) if size else b""
    return hashlib.sha256(last).hexdigest()


def _text(value: Any) -> str | None:
    return None if value is None else str(value)[:2000]


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) else None
