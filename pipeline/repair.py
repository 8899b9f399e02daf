"""``factory gc`` removes what killed attempts left; ``factory rebuild`` makes a lost index again from the tars."""

import time
from collections.abc import Callable
from typing import Any

from manifests.dataset import SHARD_FILE
from manifests.errors import DataError
from manifests.integrity import rebuild
from manifests.merge import MANIFEST
from manifests.shard import done_records
from manifests.storage import Storage
from pipeline.events import quarantined, release
from pipeline.lease import Lease, current
from pipeline.plan import PLAN, read_plan
from pipeline.terminal import say

# Remove what killed attempts left in a run folder: temporary files and shard files that no done record names (stage 2
# has none of those).
#
# Used by ``factory gc``. It holds the folder's lease, so no driver is at work meanwhile. Only names that this program
# gives are deleted; whatever else lies in ``tmp/`` and ``shards/`` is somebody's file.


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


def rebuild_run(url: str) -> dict[str, Any]:
    """Tables, done records and manifest of a run folder from its tars; ``damaged`` tells what has to be made again.

    The dataset's description comes from the manifest while that can be read, else from ``dataset.json``: neither the
    prior nor the teacher is looked for.
    """
    storage = Storage(url)
    if not storage.list("shards"):
        raise DataError(f"{storage.url}: nothing to rebuild from: no tars in shards/")
    with Lease(storage, on_line=say):
        rebuilt = rebuild(storage)
    return {
        "run": storage.url,
        "manifest": storage.path(MANIFEST),
        "shards": len(rebuilt.info.tars),
        "rows": rebuilt.info.rows,
        "damaged": {str(shard): reason for shard, reason in rebuilt.damaged.items()},
    }
