"""One shard: tar and table written aside, checked, published, then declared done. Used by every worker of stage 1.

A kill at any point leaves either no done record (the shard is made again) or a complete shard. File names contain their
content's hash, so two attempts at one shard never overwrite each other with something different. Kill tests stop the
protocol at one of its :data:`STEPS` (see :func:`fault`).
"""

import hashlib
import os
import signal
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from manifests.checked_json import dump_checked, load_checked
from manifests.dataset import TarInfo, file_name, is_count, is_sha256
from manifests.errors import DataError
from manifests.local import temporary_name
from manifests.schema import (
    EXTENSIONS,
    FORMAT_VERSION,
    MAX_IMAGE,
    MAX_ROW_JSON,
    Row,
    make_key,
    normalize,
    read_table,
    row_json,
    to_table,
    write_options,
)
from manifests.storage import Storage, numbered, writing
from manifests.tars import TarCheck, TarStream

_MAX_RECORD = 1 << 16


@dataclass(frozen=True)
class DoneRecord:
    """The proof that a shard is complete: names, sizes and checksums of its files. No times, so it is reproducible."""

    shard: int
    tar: str
    tar_sha256: str
    tar_bytes: int
    table: str
    table_sha256: str
    rows: int
    kept: int
    fingerprint: str

    def __post_init__(self) -> None:
        self.tar_info()
        if not is_sha256(self.table_sha256) or self.table != file_name(self.shard, self.table_sha256, "parquet"):
            raise ValueError(f"{self.table!r} is not the name of a table with sha256 {self.table_sha256!r}")
        if not is_count(self.kept, self.rows + 1) or not isinstance(self.fingerprint, str):
            raise ValueError(f"kept is {self.kept!r} of {self.rows} rows, fingerprint {self.fingerprint!r}")

    @property
    def report(self) -> dict[str, int]:
        """What events say of a finished shard."""
        return {"rows": self.rows, "kept": self.kept, "bytes": self.tar_bytes}

    def to_json(self) -> bytes:
        return dump_checked(asdict(self))

    @classmethod
    def from_json(cls, data: bytes, where: str) -> "DoneRecord":
        """Raises :class:`DataError` naming ``where`` for anything but a well-formed record."""
        try:
            if len(data) > _MAX_RECORD:
                raise ValueError(f"{len(data)} bytes")
            return cls(**load_checked(data))
        except (ValueError, TypeError) as error:
            raise DataError(f"{where}: damaged done record: {error}") from None

    def tar_info(self) -> TarInfo:
        return TarInfo(self.shard, self.tar, self.tar_sha256, self.tar_bytes, self.rows)


def done_name(shard: int) -> str:
    return f"done/{shard:06d}.json"


def committed(storage: Storage) -> set[int]:
    """Shards with a done record, from the folder's listing alone."""
    return set(numbered(storage, "done"))


def read_record(storage: Storage, name: str, data: bytes | None = None) -> DoneRecord:
    """The record in the file ``name`` (its ``data``, if it was read). A damaged one, or one of another shard, is a
    :class:`DataError`."""
    record = DoneRecord.from_json(storage.read(name) if data is None else data, storage.path(name))
    if done_name(record.shard) != name:
        raise DataError(f"{storage.path(name)}: holds the record of shard {record.shard}")
    return record


def done_record(storage: Storage, shard: int) -> DoneRecord | None:
    """The record of one complete shard, None where it is not complete."""
    name = done_name(shard)
    return read_record(storage, name) if storage.exists(name) else None


def done_records(storage: Storage) -> dict[int, DoneRecord]:
    """Every complete shard, by number, in order."""
    names = [name for name in storage.list("done") if name.endswith(".json")]
    found = [read_record(storage, *file) for file in zip(names, storage.read_many(names), strict=True)]
    return {record.shard: record for record in sorted(found, key=lambda record: record.shard)}


STEPS = (
    "opened",  # temporary tar exists, no sample yet
    "sample",  # first sample written
    "written",  # temporary tar and table closed
    "checked",  # both reopened, counted and hashed
    "tar",  # tar published
    "table",  # table published
    "done",  # done record written
)


def fault(step: str, shard: int) -> None:
    """Die here if ``FACTORY_FAULT`` says so: how kill tests and benchmarks stop a process inside the commit protocol.

    ``STEP:SHARD`` kills this process (SIGKILL, nothing is cleaned up) when ``SHARD`` reaches ``STEP``;
    ``STEP:SHARD:FILE`` does so once, remembered by ``FILE`` (which then holds the process id); ``STEP:SHARD:FILE:stop``
    freezes it there instead (SIGSTOP), so that others can be killed meanwhile; ``@FILE`` reads any of these from a
    file.
    """
    text = os.environ.get("FACTORY_FAULT", "")
    if text.startswith("@"):
        text = Path(text[1:]).read_text()
    chosen_step, chosen_shard, once, how = [*text.split(":", 3), "", "", "", ""][:4]
    if (chosen_step, chosen_shard) != (step, str(shard)) or (once and Path(once).exists()):
        return
    if once:
        Path(once).write_text(str(os.getpid()))
    os.kill(os.getpid(), signal.SIGSTOP if how == "stop" else signal.SIGKILL)


class ShardWriter:
    """Collects the samples of one shard; nothing becomes visible before :meth:`commit`.

    Use as a context manager: leaving without a commit, by an exception or not, discards everything.
    """

    def __init__(self, storage: Storage, shard: int, fingerprint: str) -> None:
        self.storage, self.shard, self.fingerprint = storage, shard, fingerprint
        self._rows: list[Row] = []
        stem = f"{shard:06d}"
        self._tar_path = storage.scratch() / temporary_name(stem, ".tar")
        self._table_path = storage.scratch() / temporary_name(stem, ".parquet")
        with writing(self._tar_path):
            self._file = open(self._tar_path, "wb")  # noqa: SIM115 - closed by commit or __exit__
        self._tar = TarStream(self._file)
        fault("opened", shard)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # a full disk fails once more here, and must not stay full
            self._file.close()
        self._tar_path.unlink(missing_ok=True)
        self._table_path.unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, row: Mapping[str, Any], image: bytes, extension: str = "png") -> str:
        """Append a sample and return its key.

        ``row`` holds every column but key, shard, offset, size and xxh3; missing nullable columns are null. Raises
        ``ValueError`` for an unknown column, a wrong type or a missing required value.
        """
        key = make_key(self.shard, len(self._rows))
        if extension not in EXTENSIONS:
            raise ValueError(f"extension {extension!r}: expected one of {', '.join(EXTENSIONS)}")
        if len(image) > MAX_IMAGE:
            raise ValueError(f"{key}: image of {len(image)} bytes, at most {MAX_IMAGE} are stored")
        digest = xxhash.xxh3_128_digest(image)
        full = normalize({**row, "key": key, "shard": self.shard, "offset": 0, "size": len(image), "xxh3": digest})
        text = row_json(full)
        if len(text) > MAX_ROW_JSON:
            raise ValueError(f"{key}: row of {len(text)} bytes, at most {MAX_ROW_JSON} are stored")
        with writing(self._tar_path):
            full["offset"] = self._tar.add_sample(full, extension, image, text)
        self._rows.append(full)
        if len(self._rows) == 1:
            fault("sample", self.shard)
        return key

    def commit(self) -> DoneRecord:
        """Close, reopen, check, publish; the done record last. Returns the record that won if attempts raced."""
        table = to_table(self._rows)
        with writing(self._tar_path):
            self._tar.close()
            self._file.close()
            write_shard_table(table, self._table_path, self.shard, self.fingerprint)
        fault("written", self.shard)
        record = self._checked(table)
        fault("checked", self.shard)
        publish(self.storage, self._tar_path, record.tar)
        fault("tar", self.shard)
        publish(self.storage, self._table_path, record.table)
        fault("table", self.shard)
        winner = declare_done(self.storage, record)
        fault("done", self.shard)
        return winner

    def _checked(self, table: pa.Table) -> DoneRecord:
        """Read back what reached the disk: a full disk or a failing one must not become a done record."""
        where = f"shard {self.shard}, as written"
        if not read_table(self._table_path.read_bytes(), where).equals(table):
            raise DataError(f"{where}: the table reads back differently")
        with open(self._tar_path, "rb") as file:
            check = TarCheck(file, self.shard, self._rows)
            for sample in check:
                if sample.flaw:
                    raise DataError(f"{sample.where}, as written: {sample.flaw}")
        return make_record(self.shard, check.sha256, check.bytes, self._table_path, self._rows, self.fingerprint)


def write_shard_table(table: pa.Table, path: Path, shard: int, fingerprint: str) -> None:
    """A shard's table with constant metadata, so equal rows give equal bytes."""
    own = {"format_version": str(FORMAT_VERSION), "fingerprint": fingerprint, "shard": str(shard)}
    tagged = table.replace_schema_metadata({f"factory.{name}": value for name, value in own.items()})
    pq.write_table(tagged, path, row_group_size=1 << 17, **write_options())


def make_record(
    shard: int, tar_sha256: str, tar_bytes: int, table_path: Path, rows: list[Row], fingerprint: str
) -> DoneRecord:
    """The done record of a finished tar and a finished local table."""
    with open(table_path, "rb") as file:
        table_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return DoneRecord(
        shard=shard,
        tar=file_name(shard, tar_sha256, "tar"),
        tar_sha256=tar_sha256,
        tar_bytes=tar_bytes,
        table=file_name(shard, table_sha256, "parquet"),
        table_sha256=table_sha256,
        rows=len(rows),
        kept=sum(row["kept"] for row in rows),
        fingerprint=fingerprint,
    )


def publish(storage: Storage, path: Path, name: str) -> None:
    """Move a finished local file to ``name`` and see that all of it arrived."""
    size = path.stat().st_size
    storage.put_file(path, name)
    if storage.size(name) != size:
        raise DataError(f"{storage.path(name)}: {storage.size(name)} bytes arrived of {size}")


def declare_done(storage: Storage, record: DoneRecord) -> DoneRecord:
    """Write the done record unless another attempt did; the record that counts."""
    name = done_name(record.shard)
    if storage.create(name, record.to_json()):
        return record
    winner = read_record(storage, name)
    if winner.fingerprint != record.fingerprint:
        raise DataError(f"{storage.path(name)}: made by another plan ({winner.fingerprint[:12]}): use another folder")
    for ours, theirs in ((record.tar, winner.tar), (record.table, winner.table)):
        if ours != theirs:
            storage.delete(ours)
    return winner
