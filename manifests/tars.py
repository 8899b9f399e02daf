"""The tars of a dataset: standard WebDataset files, written byte-identically, read back strictly, compared with rows.

Reading accepts only what writing makes: regular files called ``KEY.png`` (or jpg, webp) followed by ``KEY.json``.
Links, folders, long-name and sparse records, paths and anything else in a tar that came from elsewhere are refused
before a byte of payload is used.
"""

import hashlib
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Any, BinaryIO, Protocol

import xxhash

from manifests.dataset import TarInfo
from manifests.errors import DataError
from manifests.schema import EXTENSIONS, MAX_IMAGE, MAX_ROW_JSON, parse_row, row_json
from manifests.storage import Storage

BLOCK = tarfile.BLOCKSIZE
_NAME = re.compile(rf"^([0-9]{{6,}}-[0-9]{{6,}})\.({'|'.join((*EXTENSIONS, 'json'))})$", re.ASCII)


@dataclass(frozen=True)
class Sample:
    """One image and its row's JSON as they lie in a tar; ``offset`` is that of the image payload."""

    key: str
    extension: str
    offset: int
    image: bytes
    row: bytes


class Readable(Protocol):
    """All that walking needs of a stream."""

    def read(self, size: int, /) -> bytes: ...


class TarStream:
    """Appends members to an open file. Times, owners and modes are constant, so equal members give equal bytes."""

    def __init__(self, file: BinaryIO) -> None:
        self._tar = tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def add(self, name: str, data: bytes) -> int:
        """Append a file; returns the offset of its payload."""
        member = tarfile.TarInfo(name)
        member.size = len(data)
        start = self._tar.offset
        self._tar.addfile(member, BytesIO(data))
        return start + BLOCK

    def close(self) -> None:
        self._tar.close()


def _header(block: bytes, where: str) -> tuple[str, str, int]:
    """(key, extension, size) of a member header."""
    try:
        member = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except (tarfile.HeaderError, ValueError) as error:
        raise DataError(f"{where}: damaged tar header ({error})") from None
    match = _NAME.match(member.name)
    if match is None or member.type != tarfile.REGTYPE:
        raise DataError(f"{where}: unexpected member {member.name[:80]!r}: only KEY.png and KEY.json files belong here")
    limit = MAX_ROW_JSON if match[2] == "json" else MAX_IMAGE
    if not 0 <= member.size <= limit:
        raise DataError(f"{where}: member {member.name!r} claims {member.size} bytes, more than {limit}")
    return match[1], match[2], member.size


def walk(file: Readable, where: str) -> Iterator[Sample]:
    """The samples of a tar, one at a time, from its start. Raises :class:`DataError` naming ``where`` at a flaw."""
    at = 0

    def take(size: int, what: str) -> bytes:
        nonlocal at
        data = file.read(size)
        if len(data) != size:
            raise DataError(f"{where}: cut short inside {what}")
        at += size
        return data

    def member(block: bytes) -> tuple[str, str, int, bytes]:
        key, extension, size = _header(block, where)
        offset, data = at, take(size, f"{key}.{extension}")
        if any(take(-size % BLOCK, "padding")):
            raise DataError(f"{where}: bytes in the padding after {key}.{extension}")
        return key, extension, offset, data

    seen: set[str] = set()
    while any(block := take(BLOCK, "its headers (no end mark)")):
        key, extension, offset, image = member(block)
        if extension == "json" or key in seen:
            raise DataError(f"{where}: sample {key}: its image is missing or repeated")
        seen.add(key)
        row_key, row_extension, _, row = member(take(BLOCK, f"the row of sample {key}"))
        if row_key != key or row_extension != "json":
            raise DataError(f"{where}: sample {key}: its row is missing")
        yield Sample(key, extension, offset, image, row)
    while rest := file.read(1 << 20):
        if any(rest):
            raise DataError(f"{where}: bytes after the end mark")


# Looks at one tar closely: its checksum, its structure, and every sample against the rows that describe it.
#
# ``factory verify`` compares with known rows; rebuilding reads the rows out of the tar.


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
