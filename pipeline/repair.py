"""A lost or damaged index comes back from the tars. Used by ``factory rebuild``."""

from typing import Any

from manifests.errors import DataError
from manifests.merge import MANIFEST
from manifests.rebuild import rebuild
from manifests.storage import Storage
from pipeline.lease import Lease
from pipeline.progress import say


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
