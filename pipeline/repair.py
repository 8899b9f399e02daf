"""``factory gc`` removes what killed attempts left; ``factory rebuild`` makes a lost index again from the tars."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from manifests.dataset import SHARD_FILE
from manifests.errors import DataError
from manifests.integrity import rebuild
from manifests.merge import MANIFEST
from manifests.shard import done_records
from manifests.storage import Storage
from pipeline.events import quarantined, release
from pipeline.lease import Lease, current
from pipeline.plan import PLAN, read_plan
from pipeline.terminal import plain, say, size

GRACE_SECONDS = 30.0
"""After a driver was killed its actors may take this long to end; one of them may be about to commit."""


@dataclass(frozen=True)
class Leftovers:
    """What killed attempts left in a run folder: shard files that no done record names (``orphans``, in stage 1),
    ``temporary`` files, quarantine records of shards that are done. ``foreign`` files are somebody else's."""

    run: str
    orphans: list[str]
    temporary: list[str]
    foreign: list[str]
    outdated_failures: list[int]
    bytes: int
    dry_run: bool = False

    def lines(self) -> Iterator[str]:
        verb = "would remove" if self.dry_run else "removed"
        yield (
            f"{verb} {len(self.orphans)} unreferenced shard files and {len(self.temporary)} temporary ones, "
            f"{size(self.bytes)}"
        )
        yield from (f"left alone, not made by this program: {plain(name)}" for name in self.foreign)


def collect(storage: Storage, dry_run: bool = False, sleep: Callable[[float], None] = time.sleep) -> Leftovers:
    """Delete leftovers of the run in ``storage``, holding its lease; returns what was (or would be) removed.

    Only names that this program gives are deleted. Raises DataError where ``storage`` holds no run, FactoryError while
    a driver is at work.
    """
    if storage.exists(PLAN) or current(storage) is None:  # stage 2 has no plan; a lease tells that it worked here
        read_plan(storage)
    if dry_run:
        return replace(leftovers(storage), dry_run=True)
    with Lease(storage, on_line=say) as lease:
        before = leftovers(storage)
        if lease.after_crash and before.orphans:
            say(f"the last driver was killed: waiting {GRACE_SECONDS:g} s for its workers to end")
            sleep(GRACE_SECONDS)
        found = leftovers(storage)
        found = replace(found, orphans=sorted(set(found.orphans) & set(before.orphans)))
        for name in found.orphans:
            storage.delete(name)
        release(storage, found.outdated_failures)
        for name in found.temporary:
            storage.drop_temporary(name)
    return found


def leftovers(storage: Storage) -> Leftovers:
    """What lies in a run folder beside its data."""
    done = done_records(storage)
    named = {name for record in done.values() for name in (record.tar, record.table)}
    sizes = storage.sizes("shards")
    orphans = [name for name in sizes if name not in named and SHARD_FILE.fullmatch(name)]
    temporary, foreign = storage.temporary()
    return Leftovers(
        run=storage.url,
        orphans=orphans,
        temporary=[*temporary],
        foreign=sorted(sizes.keys() - named - set(orphans)) + [f"tmp/{name}" for name in foreign],
        outdated_failures=sorted(quarantined(storage) & done.keys()),
        bytes=sum(sizes[name] for name in orphans) + sum(temporary.values()),
    )


@dataclass(frozen=True)
class RebuildResult:
    """``damaged``: why a shard has to be made again, by its number."""

    run: str
    manifest: str
    shards: int
    rows: int
    damaged: dict[int, str]

    def lines(self) -> Iterator[str]:
        yield f"{self.rows} rows of {self.shards} shards: {plain(self.manifest)}"
        for shard, reason in self.damaged.items():
            yield f"shard {shard:06d} has to be made again (factory run synth): {plain(reason)}"


def rebuild_run(url: str) -> RebuildResult:
    """Tables, done records and manifest of a run folder from its tars.

    The dataset's description comes from the manifest while that can be read, else from ``dataset.json``: neither the
    prior nor the teacher is looked for.
    """
    storage = Storage(url)
    if not storage.list("shards"):
        raise DataError(f"{storage.url}: nothing to rebuild from: no tars in shards/")
    with Lease(storage, on_line=say):
        rebuilt = rebuild(storage)
    info = rebuilt.info
    return RebuildResult(storage.url, storage.path(MANIFEST), len(info.tars), info.rows, dict(rebuilt.damaged))
