"""What happened in a run: events.jsonl, one JSON line each, and the quarantine of shards that failed every attempt.

Kinds: run_started, shard_started, shard_done, shard_failed, shard_quarantined, worker_lost, group_split (done in
micro-batches for want of memory), note, warning, run_finished, run_interrupted, run_failed.

Events inform; correctness rests on done records alone, so a lost tail harms nothing, and an event that cannot be
written stops no run: what comes next says better what is wrong with its folder. (A link in the log's place does.)
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from manifests.checked_json import dump_json, load_as, load_json, load_tree
from manifests.errors import DataError, StoreError
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
    """Appends events to a run folder; a context manager, since remote logs are buffered."""

    def __init__(self, storage: Storage, clock: Callable[[], float] = time.time) -> None:
        self.storage, self.clock = storage, clock
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
            return
        self._lines.append(line)
        self._pending = True
        if kind in URGENT or now - self._flushed >= REWRITE_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write buffered events of a remote folder, or keep them for the next time where it fails."""
        if self._pending:
            self._flushed = self.clock()
            with suppress(StoreError):
                self.storage.write(f"{self._stem}-{self._part:05d}.jsonl", b"".join(self._lines))
                self._pending = False
                if len(self._lines) >= FULL:
                    self._lines, self._part = [], self._part + 1

    def __enter__(self) -> "EventLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()


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
    names = [LOCAL] if storage.exists(LOCAL) else []
    names += [name for name in storage.list(REMOTE) if name.endswith(".jsonl")]
    for name in names:
        for line in storage.lines(name):
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
