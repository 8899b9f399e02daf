"""The tars of a dataset: standard WebDataset files, written byte-identically, read back strictly, compared with rows.

Reading accepts only what writing makes: regular files called ``KEY.png`` (or jpg, webp), ``KEY.cls`` (the label in
digits, which most readers of WebDataset expect) and ``KEY.json`` (the row), in this order.
Links, folders, long-name and sparse records, paths and anything else in a tar that came from elsewhere are refused
before a byte of payload is used. The writer's check before it publishes, ``factory verify`` and ``factory rebuild``
read through the same :class:`TarCheck`.
"""

import hashlib
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import BinaryIO, Protocol

import xxhash

from manifests.errors import DataError
from manifests.schema import EXTENSIONS, MAX_IMAGE, MAX_ROW_JSON, Row, make_key, normalize, parse_row, row_json

BLOCK = tarfile.BLOCKSIZE
MAX_END = 1 << 20
"""Bytes of zeros that may end a tar: its own writer fills up to 10,240."""
MAX_LABEL = 16
"""Bytes of one ``KEY.cls``."""
_NAME = re.compile(rf"^([0-9]{{6,}}-[0-9]{{6,}})\.({'|'.join((*EXTENSIONS, 'cls', 'json'))})$", re.ASCII)


@dataclass(frozen=True)
class Sample:
    """One image, its label and its row's JSON as they lie in a tar; ``offset`` is that of the image payload."""

    key: str
    extension: str
    offset: int
    image: bytes
    label: bytes
    json: bytes


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

    def add_sample(self, row: Row, extension: str, image: bytes, text: bytes) -> int:
        """Append the members of a sample; returns the offset of the image. ``text``: the row as JSON."""
        offset = self.add(f"{row['key']}.{extension}", image)
        self.add(f"{row['key']}.cls", label_text(row))
        self.add(f"{row['key']}.json", text)
        return offset

    def close(self) -> None:
        self._tar.close()


def label_text(row: Row) -> bytes:
    """The ``KEY.cls`` of a row."""
    return str(row["label"]).encode()


class Readable(Protocol):
    """All that walking needs of a stream."""

    def read(self, size: int, /) -> bytes: ...


def walk(file: Readable) -> Iterator[Sample]:
    """The samples of a tar, one at a time, from its start. Raises :class:`DataError` at a flaw of its structure."""
    at = 0

    def take(size: int, what: str) -> bytes:
        nonlocal at
        data = file.read(size)
        if len(data) != size:
            raise DataError(f"cut short inside {what}")
        at += size
        return data

    def member(block: bytes) -> tuple[str, str, int, bytes]:
        key, extension, size = _header(block)
        offset, data = at, take(size, f"{key}.{extension}")
        if any(take(-size % BLOCK, "padding")):
            raise DataError(f"bytes in the padding after {key}.{extension}")
        return key, extension, offset, data

    seen: set[str] = set()
    while any(block := take(BLOCK, "its headers (no end mark)")):
        key, extension, offset, image = member(block)
        if extension not in EXTENSIONS or key in seen:
            raise DataError(f"the image of {key} is missing or repeated")
        seen.add(key)
        beside = []
        for what, suffix in (("label", "cls"), ("row", "json")):
            other, found, _, data = member(take(BLOCK, f"the {what} of {key}"))
            if (other, found) != (key, suffix):
                raise DataError(f"the {what} of {key} is missing: expected {key}.{suffix}, not {other}.{found}")
            beside.append(data)
        yield Sample(key, extension, offset, image, *beside)
    rest = file.read(MAX_END + 1)
    if any(rest) or len(rest) > MAX_END:
        raise DataError("bytes after the end mark" if any(rest) else f"more than {MAX_END} zeros after the end mark")


def _header(block: bytes) -> tuple[str, str, int]:
    """(key, extension, size) of a member."""
    try:
        member = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except (tarfile.HeaderError, ValueError) as error:
        raise DataError(f"damaged tar header ({error})") from None
    match = _NAME.match(member.name)
    if match is None or member.type != tarfile.REGTYPE:
        raise DataError(f"unexpected member {member.name[:80]!r}: only KEY.png, KEY.cls and KEY.json files belong here")
    limit = {"json": MAX_ROW_JSON, "cls": MAX_LABEL}.get(match[2], MAX_IMAGE)
    if not 0 <= member.size <= limit:
        raise DataError(f"member {member.name!r} claims {member.size} bytes, more than {limit}")
    return match[1], match[2], member.size


@dataclass(frozen=True)
class Checked:
    """A sample's full row, or the ``flaw`` of what ``where`` names: a sample, or the shard where no sample is known."""

    where: str
    row: Row
    flaw: str | None = None


class TarCheck:
    """One pass over a shard's tar: iterate for its samples; then ``samples``, ``bytes`` and ``sha256`` are those of the
    whole file.

    Each sample is held against the row that describes it: its entry of ``rows``, of which the columns ``free`` may
    differ from those in the tar, or without ``rows`` the JSON beside its image. A flaw is part of what is yielded;
    where the structure breaks, the images of the remaining ``rows`` are read at their places, and the file is read on
    to its byte ``expected``.
    """

    def __init__(
        self,
        file: BinaryIO,
        shard: int,
        rows: list[Row] | None = None,
        free: frozenset[str] = frozenset(),
        expected: int = 0,
    ) -> None:
        self._file, self._shard, self._rows, self._free, self._expected = file, shard, rows, free, expected
        self._digest = hashlib.sha256()
        self.samples, self.bytes = 0, 0

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._digest.update(data)
        self.bytes += len(data)
        return data

    def __iter__(self) -> Iterator[Checked]:
        where, broken = f"shard {self._shard}", ""
        try:
            for sample in walk(self):
                yield self._checked(f"{where}, sample {sample.key}", sample)
                self.samples += 1
        except DataError as error:
            broken = str(error)
        while self.read(max(0, min(1 << 20, self._expected - self.bytes))):
            pass
        self.sha256 = self._digest.hexdigest()
        left = (self._rows or [])[self.samples :]
        if left:
            yield Checked(f"{where}, sample {left[0]['key']}", left[0], broken or "the tar ends before it")
        elif broken:
            yield Checked(where, {}, broken)
        for row in left[1:]:
            if flaw := self._image_flaw(row):
                yield Checked(f"{where}, sample {row['key']}", row, flaw)

    def _checked(self, where: str, sample: Sample) -> Checked:
        row: Row = {}
        try:
            row = self._row(sample)
            return Checked(where, row, self._flaw(sample, row))
        except ValueError as error:  # a table, too, can hold what the factory never writes
            return Checked(where, row, f"no valid row describes it: {error}")

    def _row(self, sample: Sample) -> Row:
        """The full row that describes ``sample``. Raises ``ValueError`` where there is none."""
        if self._rows is not None and self.samples >= len(self._rows):
            raise ValueError("the manifest has no more")
        own = parse_row(sample.json, sample.offset, len(sample.image)) if self._rows is None or self._free else {}
        if self._rows is None:
            return own
        return normalize(self._rows[self.samples] | {name: own[name] for name in self._free})

    def _flaw(self, sample: Sample, row: Row) -> str | None:
        expected = (make_key(self._shard, self.samples), self._shard, sample.offset, len(sample.image))
        if sample.key != expected[0] or (row["key"], row["shard"], row["offset"], row["size"]) != expected:
            which = f"{row['key'][:40]!r}, {row['size']} bytes at {row['offset']}"
            return f"its row is that of another sample ({which})"
        if row["xxh3"] != xxhash.xxh3_128_digest(sample.image):
            return "the image was altered (checksum differs)"
        if sample.label != label_text(row):
            return f"its label in the tar is {sample.label!r}, in its row {row['label']}"
        if row_json(row) != sample.json:
            return "its JSON in the tar differs from its row as the factory writes it"
        return None

    def _image_flaw(self, row: Row) -> str | None:
        """Whether the image is intact at its place, whatever lies between; a table may claim any place."""
        image = b""
        if 0 <= row["offset"] <= self.bytes and 0 <= row["size"] <= MAX_IMAGE:
            self._file.seek(row["offset"])
            image = self._file.read(row["size"])
        intact = xxhash.xxh3_128_digest(image) == row["xxh3"]
        return None if intact else "the image was altered or cut off (checksum differs)"
