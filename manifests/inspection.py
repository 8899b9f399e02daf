"""Looks at one tar closely: its checksum, its structure, and every sample against the rows that describe it.

``factory verify`` compares with known rows; rebuilding reads the rows out of the tar.
"""

import hashlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import xxhash

from manifests.errors import DataError
from manifests.info import TarInfo
from manifests.schema import parse_row, row_json
from manifests.storage import Storage
from manifests.tars import Sample, walk


class HashingStream:
    """A binary stream that remembers sha256 and length of what was read from it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest, self.bytes = file, hashlib.sha256(), 0

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._digest.update(data)
        self.bytes += len(data)
        return data

    def finish(self) -> str:
        """Read what is left; the sha256 of everything."""
        while self.read(1 << 20):
            pass
        return self._digest.hexdigest()


def sample_row(sample: Sample, shard: int, index: int, where: str) -> dict[str, Any]:
    """The full row of a sample from its own JSON, with its place. Raises :class:`DataError` where the two disagree."""
    try:
        row = parse_row(sample.row)
    except DataError as error:
        raise DataError(f"{where}, sample {sample.key}: {error}") from None
    if row["key"] != sample.key or row["shard"] != shard or int(sample.key.partition("-")[2]) != index:
        raise DataError(f"{where}, sample {sample.key}: its row is that of another sample ({row['key'][:40]!r})")
    if row["xxh3"] != xxhash.xxh3_128_digest(sample.image):
        raise DataError(f"{where}, sample {sample.key}: the image was altered (checksum differs)")
    if row_json(row) != sample.row:
        raise DataError(f"{where}, sample {sample.key}: its row is not in the form that the factory writes")
    return {**row, "offset": sample.offset, "size": len(sample.image)}


def tar_rows(storage: Storage, name: str, shard: int) -> tuple[list[dict[str, Any]], str, int]:
    """(rows, sha256, bytes) of a tar, from its own samples. Raises :class:`DataError` at the first flaw."""
    where = f"{storage.path(name)}: shard {shard}"
    with storage.open(name) as file:
        stream = HashingStream(file)
        samples = enumerate(walk(stream, where))
        rows = [sample_row(sample, shard, index, where) for index, sample in samples]
        return rows, stream.finish(), stream.bytes


def tar_flaws(
    storage: Storage, tar: TarInfo, rows: list[dict[str, Any]] | None, free: frozenset[str] = frozenset()
) -> Iterator[tuple[str, str]]:
    """(where, what) for everything wrong with a tar. ``rows`` are the full rows describing it, or None if lost;
    their columns ``free`` may differ from those in the tar."""
    where = f"shard {tar.shard}"
    walked, named = 0, False
    with storage.open(tar.name) as file:
        stream = HashingStream(file)
        try:
            for sample in walk(stream, where):
                flaw = _sample_flaw(sample, tar.shard, walked, rows, where, free)
                if flaw:
                    named = True
                    yield f"{where}, sample {sample.key}", flaw
                walked += 1
            if walked != tar.rows:
                named = True
                yield where, f"{tar.name} holds {walked} samples, expected {tar.rows}"
        except DataError as error:
            named = True
            at = f", sample {rows[walked]['key']}" if rows and walked < len(rows) else ""
            yield where + at, str(error).removeprefix(f"{where}: ")
        digest = stream.finish()
    for row in rows[walked + 1 :] if rows else ():
        if not _intact(storage, tar, row):
            named = True
            yield f"{where}, sample {row['key']}", "the image was altered or cut off (checksum differs)"
    if digest != tar.sha256:
        yield where, f"{tar.name} was altered: its sha256 differs{'' if named else ', though its samples are intact'}"


def _sample_flaw(
    sample: Sample, shard: int, index: int, rows: list[dict[str, Any]] | None, where: str, free: frozenset[str]
) -> str | None:
    if rows is None:
        try:
            sample_row(sample, shard, index, where)
        except DataError as error:
            return str(error).removeprefix(f"{where}, sample {sample.key}: ")
        return None
    if index >= len(rows):
        return "no row of the manifest describes it"
    row = rows[index]
    if (row["key"], row["offset"], row["size"]) != (sample.key, sample.offset, len(sample.image)):
        return f"its row says {row['key']} with {row['size']} bytes at {row['offset']}"
    if row["xxh3"] != xxhash.xxh3_128_digest(sample.image):
        return "the image was altered (checksum differs)"
    if free:
        try:
            own = parse_row(sample.row)
        except DataError as error:
            return str(error)
        row = row | {name: own[name] for name in free}
    try:
        same = row_json(row) == sample.row
    except ValueError as error:  # a table can hold what the factory never writes
        return f"its row is none of ours: {error}"
    return None if same else "its JSON in the tar differs from its row in the table"


def _intact(storage: Storage, tar: TarInfo, row: dict[str, Any]) -> bool:
    try:
        image = storage.read_range(tar.name, row["offset"], row["size"])
    except DataError:
        return False
    return bool(xxhash.xxh3_128_digest(image) == row["xxh3"])
