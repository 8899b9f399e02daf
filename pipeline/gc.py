"""Remove what killed attempts left in a run folder: temporary files and shard files that no done record names (stage 2
has none of those).

Used by ``factory gc``. It holds the folder's lease, so no driver is at work meanwhile.
"""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from manifests.shard import done_records
from manifests.storage import Storage
from pipeline.failures import quarantined, release
from pipeline.lease import Lease, current
from pipeline.plan import PLAN, read_plan
from pipeline.progress import say

GRACE_SECONDS = 30.0
"""After a driver was killed its actors may take this long to end; one of them may be about to commit."""


def collect(storage: Storage, dry_run: bool = False, sleep: Callable[[float], None] = time.sleep) -> dict[str, Any]:
    """Delete leftovers of the run in ``storage``; returns what was (or would be) removed. JSON-able.

    Raises DataError where ``storage`` holds no run, FactoryError while a driver is at work.
    """
    if storage.exists(PLAN) or current(storage) is None:  # stage 2 has no plan; a lease tells that it worked here
        read_plan(storage)
    if dry_run:
        return _found(storage) | {"dry_run": True}
    with Lease(storage, on_line=say) as lease:
        before = _found(storage)
        if lease.after_crash and before["orphans"]:
            say(f"the last driver was killed: waiting {GRACE_SECONDS:g} s for its workers to end")
            sleep(GRACE_SECONDS)
        found = _found(storage)
        found["orphans"] = sorted(set(found["orphans"]) & set(before["orphans"]))
        for name in found["orphans"]:
            storage.delete(name)
        release(storage, found["outdated_failures"])
        for path in _temporary(storage):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return found | {"dry_run": False}


def _found(storage: Storage) -> dict[str, Any]:
    done = done_records(storage)
    named = {name for record in done.values() for name in (record.tar, record.table)}
    sizes = storage.sizes("shards")
    orphans = sorted(set(sizes) - named)
    return {
        "run": storage.url,
        "orphans": orphans,
        "temporary": [path.name for path in _temporary(storage)],
        "outdated_failures": sorted(quarantined(storage) & done.keys()),
        "bytes": sum(sizes[name] for name in orphans) + sum(_bytes(path) for path in _temporary(storage)),
    }


def _temporary(storage: Storage) -> list[Path]:
    """Entries of ``tmp/``; remote folders have none, since unfinished uploads are invisible there."""
    folder = Path(storage.path("tmp"))
    return sorted(folder.iterdir()) if storage.is_local and folder.is_dir() else []


def _bytes(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
