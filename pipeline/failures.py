"""Quarantine: shards that failed every attempt (``failed/000012.json``), until ``factory run synth --retry-failed``."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from manifests.errors import DataError
from manifests.storage import Storage

FOLDER = "failed"


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
    names = (name.rsplit("/", 1)[-1].removesuffix(".json") for name in storage.list(FOLDER))
    return {int(name) for name in names if name.isdigit()}


def failures(storage: Storage) -> dict[int, Failure]:
    """Every quarantine record. Raises :class:`DataError` naming one that cannot be read."""
    found = {}
    names = [name for name in storage.list(FOLDER) if name.endswith(".json")]
    for name, data in zip(names, storage.read_many(names), strict=True):
        try:
            failure = Failure(**json.loads(data))
        except (ValueError, TypeError) as error:
            raise DataError(f"{storage.path(name)}: no quarantine record ({error}); delete it") from None
        found[failure.shard] = failure
    return dict(sorted(found.items()))


def release(storage: Storage, shards: Iterable[int]) -> None:
    """Take ``shards`` out of quarantine, so that the next run tries them again."""
    for shard in shards:
        storage.delete(_name(shard))
