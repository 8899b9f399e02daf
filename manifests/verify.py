"""``factory verify``: is everything a dataset claims true? Plan, done records, tars, tables, manifest, teacher agree.

Nothing is changed. ``deep`` reads every byte and names the samples that are damaged; without it, names and sizes only.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from manifests.checked_json import load_checked
from manifests.dataset import DATASET, DatasetInfo, TarInfo
from manifests.errors import DataError
from manifests.merge import load_shard_table
from manifests.reader import Manifest, manifest_url
from manifests.schema import SCHEMA, SCORED
from manifests.shard import DoneRecord, done_name
from manifests.storage import Storage, split
from manifests.tars import tar_flaws


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: ``where`` names shard and sample or the file, ``what`` says what is wrong with it."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def verify(url: str | os.PathLike[str], deep: bool = True) -> list[Problem]:
    """Every problem of a dataset, given its folder or manifest; [] where it is whole.

    Raises :class:`DataError` only where there is no dataset at all.
    """
    storage, name = split(manifest_url(url))
    return [*_Check(storage, name, deep).problems()]


class _Check:
    def __init__(self, storage: Storage, name: str, deep: bool) -> None:
        self.storage, self.name, self.deep = storage, name, deep
        self.records: dict[int, DoneRecord] = {}
        self.tables: dict[int, DoneRecord] = {}
        self.fingerprint: str | None = None

    def problems(self) -> Iterator[Problem]:
        if not any(self.storage.exists(name) for name in (self.name, "plan.json")) and not self.storage.list("done"):
            raise DataError(f"{self.storage.url}: no dataset here (no {self.name}, plan.json or done records)")
        yield from self._plan()
        yield from self._manifest_and_shards()

    def _plan(self) -> Iterator[Problem]:
        for name in self.storage.list("done"):
            try:
                record = DoneRecord.from_json(self.storage.read(name), name)
                if done_name(record.shard) != name:
                    raise DataError(f"{name}: holds the record of shard {record.shard}")
                self.records[record.shard] = record
            except DataError as error:
                yield Problem(name, str(error).removeprefix(f"{name}: "))
        if not self.storage.exists("plan.json"):
            return
        try:
            plan = load_checked(self.storage.read("plan.json"))
            self.fingerprint, shards = plan["fingerprint"], int(plan["shards"])
        except (ValueError, KeyError, TypeError) as error:
            yield Problem("plan.json", f"damaged: {error}")
            return
        missing = [shard for shard in range(min(shards, 1 << 24)) if shard not in self.records]
        if missing:
            some = ", ".join(map(str, missing[:5])) + (", …" if len(missing) > 5 else "")
            yield Problem("plan.json", f"{len(missing)} of {shards} shards are not done: {some}")
        for shard, record in self.records.items():
            if record.fingerprint != self.fingerprint:
                yield Problem(done_name(shard), f"made by another plan ({record.fingerprint[:12]})")

    def _companions(self, info: DatasetInfo | None) -> Iterator[Problem]:
        """``dataset.json`` and the teacher's copy."""
        if self.storage.exists(DATASET):
            try:
                described = DatasetInfo.from_json(self.storage.read(DATASET), DATASET)
                if info is not None and described.fingerprint != info.fingerprint:
                    raise DataError(f"{DATASET}: made by another plan ({described.fingerprint[:12]})")
            except DataError as error:
                yield Problem(DATASET, str(error).removeprefix(f"{DATASET}: "))
        path = info.teacher.get("path") if info else None
        if info is not None and self.deep and isinstance(path, str):
            try:
                if hashlib.sha256(self.storage.read(path)).hexdigest() != info.teacher.get("sha256"):
                    yield Problem(path, "was altered: its sha256 differs from the manifest's")
            except DataError as error:
                yield Problem(path, str(error).removeprefix(f"{self.storage.path(path)}: "))

    def _manifest_and_shards(self) -> Iterator[Problem]:
        manifest: Manifest | None = None
        try:
            manifest = Manifest.open(self.storage.path(self.name), skip_bad=True)
        except DataError as error:
            yield Problem(self.name, str(error).removeprefix(f"{self.storage.path(self.name)}: "))
        if manifest is not None and self.fingerprint not in (None, manifest.info.fingerprint):
            yield Problem(self.name, f"made by another plan ({manifest.info.fingerprint[:12]})")
        yield from self._companions(manifest.info if manifest else None)
        listed = {tar.shard: tar for tar in manifest.info.tars} if manifest else {}
        sizes = self.storage.sizes("shards")
        for shard in sorted({*self.records, *listed}):
            record = self.records.get(shard)
            tar = record.tar_info() if record else listed[shard]
            if record and manifest and listed.get(shard) != tar:
                yield Problem(self.name, f"shard {shard} is {'another tar' if shard in listed else 'not in it'}")
            table: pa.Table | None = None
            free: frozenset[str] = frozenset()
            if record:
                try:
                    table = self._table(record, sizes)
                except DataError as error:
                    yield Problem(f"shard {shard}", str(error))
            if manifest is not None and table is None and self.deep:
                table, free = _rows_of(manifest, shard), _free(manifest)
            yield from self._tar(tar, table, sizes, free)
        if manifest is not None and self.deep:
            yield from self._same_rows(manifest)

    def _table(self, record: DoneRecord, sizes: dict[str, int]) -> pa.Table | None:
        if not self.deep:
            if record.table not in sizes:
                raise DataError(f"{record.table} is missing")
            return None
        table = load_shard_table(self.storage, record)
        self.tables[record.shard] = record
        return table

    def _tar(
        self, tar: TarInfo, table: pa.Table | None, sizes: dict[str, int], free: frozenset[str]
    ) -> Iterator[Problem]:
        if tar.name not in sizes:
            yield Problem(f"shard {tar.shard}", f"{tar.name} is missing")
            return
        if sizes[tar.name] != tar.bytes:
            yield Problem(f"shard {tar.shard}", f"{tar.name} has {sizes[tar.name]} bytes, expected {tar.bytes}")
        if self.deep:
            try:
                rows: list[dict[str, Any]] | None = table.to_pylist() if table is not None else None
            except UnicodeDecodeError:
                yield Problem(f"shard {tar.shard}", "its rows hold text that is not UTF-8")
                rows = None
            yield from (Problem(where, what) for where, what in tar_flaws(self.storage, tar, rows, free))

    def _same_rows(self, manifest: Manifest) -> Iterator[Problem]:
        """The manifest's rows against the tables of its shards, group by group, as far as all tables are sound."""
        shards = [tar.shard for tar in manifest.info.tars]
        if any(shard not in self.tables for shard in shards):
            return
        held = SCHEMA.empty_table()
        pending = iter(shards)
        compared = [name for name in SCHEMA.names if name not in _free(manifest)]
        for group in range(manifest.num_groups):
            try:
                theirs = manifest.group(group)
            except DataError as error:
                yield Problem(self.name, str(error).removeprefix(f"{manifest.url}: "))
                return
            while held.num_rows < theirs.num_rows:
                shard = next(pending, None)
                if shard is None:
                    yield Problem(self.name, "holds more rows than its shards' tables")
                    return
                held = pa.concat_tables([held, load_shard_table(self.storage, self.tables[shard])])
            ours, held = held.slice(0, theirs.num_rows), held.slice(theirs.num_rows)
            ours, theirs = ours.select(compared).combine_chunks(), theirs.select(compared)
            if not theirs.equals(ours.cast(theirs.schema)):
                yield Problem(self.name, f"differs from the shards: {_first_difference(ours, theirs)}")


def _free(manifest: Manifest) -> frozenset[str]:
    """Columns of a manifest that need not be those of its tars."""
    return SCORED if manifest.info.rescored is not None else frozenset()


def _rows_of(manifest: Manifest, shard: int) -> pa.Table | None:
    """A shard's rows from the manifest, None where they cannot be read."""
    try:
        return manifest.shard_rows(shard)
    except DataError:
        return None


def _first_difference(ours: pa.Table, theirs: pa.Table) -> str:
    for name in theirs.column_names:
        if not theirs[name].equals(ours[name].cast(theirs[name].type)):
            for index in range(theirs.num_rows):
                if theirs[name][index] != ours[name].cast(theirs[name].type)[index]:
                    where = ours.slice(index, 1).select(["shard", "key"]).to_pylist()[0]
                    return f"column {name!r} of shard {where['shard']}, sample {where['key']}"
    return "its rows"
