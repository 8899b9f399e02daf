"""``factory rebuild``: tables, done records and ``m.parquet`` again from the tars alone.

Every sample's row lies beside it in its tar and every tar's name holds the start of its checksum, so with the same
version of Arrow the rebuilt files equal the lost ones byte for byte.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from manifests.dataset import DATASET, DatasetInfo, file_name
from manifests.errors import DataError, LinkError
from manifests.merge import MANIFEST, merge
from manifests.reader import Manifest
from manifests.schema import to_table
from manifests.shard import DoneRecord, committed, done_name, make_record, publish, write_shard_table
from manifests.storage import Storage, writing
from manifests.tars import tar_rows

_TAR = re.compile(r"^shards/([0-9]{6,8})-[0-9a-f]{12}\.tar$", re.ASCII)


@dataclass(frozen=True)
class Rebuilt:
    """What came of it: the merged dataset, and for every shard that has no intact tar what is wrong with it."""

    info: DatasetInfo
    damaged: dict[int, str]


def rebuild(storage: Storage, info: DatasetInfo | None = None) -> Rebuilt:
    """Write tables, done records and manifest from the tars in ``shards/``.

    ``info`` describes the dataset; without it the existing manifest or ``dataset.json`` must still be readable. A shard
    without an intact tar, or with several of which none is known to be the dataset's, loses its done record, so that
    the next ``factory run synth`` makes it again. Raises :class:`DataError` where there is nothing to rebuild from.
    """
    known = info or _known(storage)
    listed = {tar.shard: tar.name for tar in known.tars}
    tars: dict[int, list[str]] = {}
    for name in storage.list("shards"):
        if match := _TAR.match(name):
            tars.setdefault(int(match[1]), []).append(name)
    whole, damaged = [], {}
    for shard in sorted({*tars, *listed} | committed(storage)):
        winner = _winner(storage, shard) or listed.get(shard)
        try:
            _rebuild_shard(storage, shard, tars.get(shard, []), winner, known.fingerprint)
            whole.append(shard)
        except LinkError:  # no fault of the shard: its done record stays
            raise
        except DataError as error:
            storage.delete(done_name(shard))
            damaged[shard] = str(error)
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


def _winner(storage: Storage, shard: int) -> str | None:
    """The tar that the done record names."""
    try:
        return DoneRecord.from_json(storage.read(done_name(shard)), done_name(shard)).tar
    except DataError:
        return None


def _rebuild_shard(storage: Storage, shard: int, names: list[str], winner: str | None, fingerprint: str) -> None:
    """Table and done record from ``winner`` if it is intact, else from the only intact tar of ``names``.

    A killed attempt, or one at an earlier plan, may have left another tar. A tar does not tell its plan, but the table
    beside it does: its name follows from rows and ``fingerprint``. Raises DataError where nothing decides, and where
    there is no tar.
    """
    if not names:
        raise DataError(f"{storage.url}: the tar of shard {shard} is missing")
    with TemporaryDirectory(prefix="rebuild-", dir=storage.scratch()) as folder:
        intact: list[tuple[DoneRecord, Path]] = []
        flaws = []
        for name in sorted(names, key=lambda name: name != winner):
            path = Path(folder) / f"{len(intact)}.parquet"
            try:
                intact.append((_read_tar(storage, shard, name, path, fingerprint), path))
            except DataError as error:
                flaws.append(str(error))
            if name == winner and intact:
                break
        own = [(record, path) for record, path in intact if storage.exists(record.table)]
        if not intact:
            raise DataError("; ".join(flaws))
        if len(intact) > 1 and not own:
            found = ", ".join(record.tar for record, _ in intact)
            raise DataError(
                f"{storage.url}: shard {shard} has {len(intact)} intact tars and none is known to be it: {found}"
            )
        record, path = (own or intact)[0]
        publish(storage, path, record.table)
    storage.write(done_name(shard), record.to_json())


def _read_tar(storage: Storage, shard: int, name: str, table: Path, fingerprint: str) -> DoneRecord:
    """The done record of an intact tar, whose table is written to ``table``."""
    rows, sha256, size = tar_rows(storage, name, shard)
    if name != file_name(shard, sha256, "tar"):
        raise DataError(f"{storage.path(name)}: altered: its sha256 begins with {sha256[:12]}")
    with writing(table):
        write_shard_table(to_table(rows), table, shard, fingerprint)
    return make_record(shard, sha256, size, table, rows, fingerprint)
