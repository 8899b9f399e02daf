"""The tars of a dataset: standard WebDataset files, written byte-identically and read back strictly.

Reading accepts only what writing makes: regular files called ``KEY.png`` (or jpg, webp) followed by ``KEY.json``.
Links, folders, long-name and sparse records, paths and anything else in a tar that came from elsewhere are refused
before a byte of payload is used.
"""

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import BinaryIO, Protocol

from manifests.errors import DataError
from manifests.schema import EXTENSIONS, MAX_IMAGE, MAX_ROW_JSON

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
