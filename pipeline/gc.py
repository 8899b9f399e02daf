"""Remove what killed attempts left in a run folder: temporary files and shard files that no done record names (stage 2
has none of those).

Used by ``factory gc``. It holds the folder's lease, so no driver is at work meanwhile. Only names that this program
gives are deleted; whatever else lies in ``tmp/`` and ``shards/`` is somebody's file.
"""

import time
from collections.abc import Callable
from typing import Any

from manifests.info import SHARD_FILE
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
        for name in found["temporary"]:
            storage.drop_temporary(name)
    return found | {"dry_run": False}


def _found(storage: Storage) -> dict[str, Any]:
    done = done_records(storage)
    named = {name for record in done.values() for name in (record.tar, record.table)}
    sizes = storage.sizes("shards")
    orphans = [name for name in sizes if name not in named and SHARD_FILE.fullmatch(name)]
    temporary, foreign = storage.temporary()
    return {
        "run": storage.url,
        "orphans": orphans,
        "temporary": [*temporary],
        "foreign": sorted(sizes.keys() - named - set(orphans)) + [f"tmp/{name}" for name in foreign],
        "outdated_failures": sorted(quarantined(storage) & done.keys()),
        "bytes": sum(sizes[name] for name in orphans) + sum(temporary.values()),
    }
