"""``factory manifest rebuild``: tables, done records and ``m.parquet`` again from the tars alone.

Every sample's row lies beside it in its tar and every tar's name holds the start of its checksum, so with the same
version of Arrow the rebuilt files equal the lost ones byte for byte.
"""

import re
import uuid
from dataclasses import dataclass

from manifests.errors import DataError
from manifests.info import DATASET, DatasetInfo, file_name
from manifests.inspection import tar_rows
from manifests.merge import MANIFEST, merge
from manifests.reader import Manifest
from manifests.schema import to_table
from manifests.shard import DoneRecord, done_name, make_record, publish, write_shard_table
from manifests.storage import Storage, writing

_TAR = re.compile(r"^shards/([0-9]{6,8})-[0-9a-f]{12}\.tar$", re.ASCII)


@dataclass(frozen=True)
class Rebuilt:
    """What came of it: the merged dataset, and for every shard that has no intact tar what is wrong with it."""

    info: DatasetInfo
    damaged: dict[int, str]


def rebuild(storage: Storage, info: DatasetInfo | None = None) -> Rebuilt:
    """Write tables, done records and manifest from the tars in ``shards/``.

    ``info`` describes the dataset; without it the existing manifest or ``dataset.json`` must still be readable. A shard
    without an intact tar loses its done record, so that the next ``factory run synth`` makes it again. Raises
    :class:`DataError` where there is nothing to rebuild from.
    """
    known = info or _known(storage)
    tars: dict[int, list[str]] = {}
    for name in storage.list("shards"):
        if match := _TAR.match(name):
            tars.setdefault(int(match[1]), []).append(name)
    whole, damaged = [], {}
    for shard, names in sorted(tars.items()):
        flaws = []
        for name in _preferred(storage, shard, names):
            try:
                _rebuild_shard(storage, shard, name, known.fingerprint)
                whole.append(shard)
                break
            except DataError as error:
                flaws.append(str(error))
        else:
            storage.delete(done_name(shard))
            damaged[shard] = "; ".join(flaws)
    if not whole:
        reason = next(iter(damaged.values()), "no tars in shards/")
        raise DataError(f"{storage.url}: nothing to rebuild from: {reason}")
    return Rebuilt(merge(storage, known, whole), damaged)


def _known(storage: Storage) -> DatasetInfo:
    try:
        return Manifest.open(storage.path(MANIFEST), skip_bad=True).info
    except DataError as error:
        if not storage.exists(DATASET):
            raise DataError(f"{error}; without it {DATASET} is needed") from None
    return DatasetInfo.from_json(storage.read(DATASET), storage.path(DATASET))


def _preferred(storage: Storage, shard: int, names: list[str]) -> list[str]:
    """The tar that the done record names first: a killed attempt may have left another one."""
    try:
        winner = DoneRecord.from_json(storage.read(done_name(shard)), done_name(shard)).tar
    except DataError:
        return names
    return sorted(names, key=lambda name: name != winner)


def _rebuild_shard(storage: Storage, shard: int, name: str, fingerprint: str) -> None:
    rows, sha256, size = tar_rows(storage, name, shard)
    if name != file_name(shard, sha256, "tar"):
        raise DataError(f"{storage.path(name)}: altered: its sha256 begins with {sha256[:12]}")
    path = storage.scratch() / f"rebuild-{uuid.uuid4().hex}.parquet"
    try:
        with writing(path):
            write_shard_table(to_table(rows), path, shard, fingerprint)
        record = make_record(shard, sha256, size, path, rows, fingerprint)
        publish(storage, path, record.table)
    finally:
        path.unlink(missing_ok=True)
    storage.write(done_name(shard), record.to_json())
