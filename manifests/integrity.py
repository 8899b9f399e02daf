"""Is everything a dataset claims true (``factory verify``), and what is lost again from its tars (``factory rebuild``)?

Both read every tar with :class:`manifests.tars.TarCheck`. :func:`verify` changes nothing: plan, done records, tars,
tables and manifest must agree. :func:`rebuild` needs the tars alone: every sample's row lies beside it in its tar and
every tar's name holds the start of its checksum, so with the same version of Arrow the rebuilt files equal the lost
ones byte for byte.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa

from manifests.checked_json import load_checked
from manifests.dataset import DATASET, MANIFEST, MAX_SHARD, DatasetInfo, TarInfo, file_name
from manifests.errors import DataError, LinkError
from manifests.manifest_file import ManifestFile
from manifests.merge import load_shard_table, merge
from manifests.reader import manifest_url
from manifests.schema import SCHEMA, SCORED, Row, make_key, to_table
from manifests.shard import (
    DoneRecord,
    committed,
    done_name,
    done_record,
    make_record,
    publish,
    read_record,
    write_shard_table,
)
from manifests.storage import Storage, split, writing
from manifests.tars import TarCheck


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: ``where`` names shard and sample or the file, ``what`` says what is wrong with it."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def verify(url: str | os.PathLike[str], deep: bool = True) -> list[Problem]:
    """Every problem of a dataset, given its folder or manifest; [] where it is whole.

    ``deep`` reads every byte and names the samples that are damaged; without it, names and sizes only. Raises
    :class:`DataError` only where there is no dataset at all.
    """
    storage, name = split(manifest_url(url))
    if not any(storage.exists(file) for file in (name, "plan.json")) and not storage.list("done"):
        raise DataError(f"{storage.url}: no dataset here (no {name}, plan.json or done records)")
    return [*_Verification(storage, name, deep).problems]


class _Verification:
    """All checks of one dataset, in order; :attr:`problems` is what they found."""

    def __init__(self, storage: Storage, name: str, deep: bool) -> None:
        self.storage, self.name, self.deep = storage, name, deep
        self.problems: dict[Problem, None] = {}  # in order, each once: many shards may meet the same one
        self.records: dict[int, DoneRecord] = {}
        self.manifest: ManifestFile | None = None
        for record in storage.list("done"):
            with self.noted(record):
                found = read_record(storage, record)
                self.records[found.shard] = found
        fingerprint = self.check_plan()
        with self.noted(name):
            self.manifest = ManifestFile(storage, name)
        info = self.manifest.info if self.manifest else None
        if info and fingerprint not in (None, info.fingerprint):
            self.note(name, f"made by another plan ({info.fingerprint[:12]})")
        self.check_descriptions(info)
        self.check_shards({tar.shard: tar for tar in info.tars} if info else {})

    def note(self, where: str, what: str) -> None:
        self.problems[Problem(where, what)] = None

    @contextmanager
    def noted(self, where: str) -> Iterator[None]:
        """A :class:`DataError` within is a problem of ``where``."""
        try:
            yield
        except DataError as error:
            self.note(where, str(error).removeprefix(f"{self.storage.path(where)}: "))

    def check_plan(self) -> str | None:
        """The plan's fingerprint, None without a readable plan."""
        if not self.storage.exists("plan.json"):
            return None
        try:
            plan = load_checked(self.storage.read("plan.json"))
            fingerprint, shards = plan["fingerprint"], int(plan["shards"])
        except (ValueError, KeyError, TypeError) as error:
            self.note("plan.json", f"damaged: {error}")
            return None
        missing = [shard for shard in range(min(shards, MAX_SHARD)) if shard not in self.records]
        if missing:
            some = ", ".join(map(str, missing[:5])) + (", …" if len(missing) > 5 else "")
            self.note("plan.json", f"{len(missing)} of {shards} shards are not done: {some}")
        for shard, record in self.records.items():
            if record.fingerprint != fingerprint:
                self.note(done_name(shard), f"made by another plan ({record.fingerprint[:12]})")
        return fingerprint

    def check_descriptions(self, info: DatasetInfo | None) -> None:
        """``dataset.json`` and the teacher's copy."""
        if self.storage.exists(DATASET):
            with self.noted(DATASET):
                described = DatasetInfo.from_json(self.storage.read(DATASET), self.storage.path(DATASET))
                if info and described.fingerprint != info.fingerprint:
                    self.note(DATASET, f"made by another plan ({described.fingerprint[:12]})")
        path = info.teacher.get("path") if info else None
        if info and self.deep and isinstance(path, str):
            with self.noted(path):
                if hashlib.sha256(self.storage.read(path, most=None)).hexdigest() != info.teacher.get("sha256"):
                    self.note(path, "was altered: its sha256 differs from the manifest's")

    def check_shards(self, listed: dict[int, TarInfo]) -> None:
        sizes = self.storage.sizes("shards")
        for shard in sorted({*self.records, *listed}):
            record = self.records.get(shard)
            tar = record.tar_info() if record else listed[shard]
            if record and self.manifest and listed.get(shard) != tar:
                self.note(self.name, f"shard {shard} is {'another tar' if shard in listed else 'not in it'}")
            table: pa.Table | None = None
            if record and not self.deep and record.table not in sizes:
                self.note(f"shard {shard}", f"{record.table} is missing")
            if record and self.deep:
                with self.noted(f"shard {shard}"):
                    table = load_shard_table(self.storage, record)
            if table is not None and listed.get(shard) == tar:
                self.check_rows(shard, table)
            if tar.name not in sizes:
                self.note(f"shard {shard}", f"{tar.name} is missing")
                continue
            if sizes[tar.name] != tar.bytes:
                self.note(f"shard {shard}", f"{tar.name} has {sizes[tar.name]} bytes, expected {tar.bytes}")
            if self.deep:
                self.check_tar(tar, table)

    def check_tar(self, tar: TarInfo, table: pa.Table | None) -> None:
        """Every sample against its row in the shard's ``table``, or in the manifest, or else its own JSON."""
        free: frozenset[str] = frozenset()
        if table is None and self.manifest:
            free = _free(self.manifest)
            with self.noted(self.name):
                table = self.manifest.shard_rows(tar.shard)
        rows: list[Row] | None = None
        try:
            rows = table.to_pylist() if table is not None else None
        except UnicodeDecodeError:
            self.note(f"shard {tar.shard}", "its rows hold text that is not UTF-8")
        with self.storage.open(tar.name) as file:
            check = TarCheck(file, tar.shard, rows, free, tar.bytes)
            flaws = [Problem(sample.where, sample.flaw) for sample in check if sample.flaw]
        if not flaws and check.samples != tar.rows:
            flaws = [Problem(f"shard {tar.shard}", f"{tar.name} holds {check.samples} samples, expected {tar.rows}")]
        self.problems |= dict.fromkeys(flaws)
        if check.sha256 != tar.sha256:
            intact = "" if flaws else ", though its samples are intact"
            self.note(f"shard {tar.shard}", f"{tar.name} was altered: its sha256 differs{intact}")

    def check_rows(self, shard: int, table: pa.Table) -> None:
        """The manifest's rows of a shard against its ``table``."""
        assert self.manifest is not None
        with self.noted(self.name):
            compared = [name for name in SCHEMA.names if name not in _free(self.manifest)]
            rows = self.manifest.shard_rows(shard)
            for name in compared:
                ours, theirs = table[name].combine_chunks(), rows[name].combine_chunks()
                if not theirs.equals(ours):
                    index = next(index for index in range(len(ours)) if theirs[index] != ours[index])
                    which = f"shard {shard}, sample {make_key(shard, index)}"
                    self.note(self.name, f"differs from the shards: column {name!r} of {which}")
                    break


def _free(manifest: ManifestFile) -> frozenset[str]:
    """Columns of a manifest that need not be those of its tars."""
    return SCORED if manifest.info.rescored is not None else frozenset()


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
        winner = listed.get(shard)
        with suppress(DataError):
            record = done_record(storage, shard)
            winner = record.tar if record else winner
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
        return ManifestFile(storage, MANIFEST).info
    except DataError as error:
        if not storage.exists(DATASET):
            raise DataError(f"{error}; without it {DATASET} is needed") from None
    return DatasetInfo.from_json(storage.read(DATASET), storage.path(DATASET))


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
    """The done record of an intact tar, whose table is written to ``table``. Raises DataError at the first flaw."""
    rows = []
    with storage.open(name) as file:
        check = TarCheck(file, shard)
        for sample in check:
            if sample.flaw:
                raise DataError(f"{storage.path(name)}: {sample.where}: {sample.flaw}")
            rows.append(sample.row)
    if name != file_name(shard, check.sha256, "tar"):
        raise DataError(f"{storage.path(name)}: altered: its sha256 begins with {check.sha256[:12]}")
    with writing(table):
        write_shard_table(to_table(rows), table, shard, fingerprint)
    return make_record(shard, check.sha256, check.bytes, table, rows, fingerprint)
