"""What a dataset says of itself, kept in the metadata of ``m.parquet``: recipe, identities, classes and its tars."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import NoneType
from typing import Any

from manifests.checked_json import dump_checked, load_checked, load_tree
from manifests.errors import DataError
from manifests.schema import FORMAT_VERSION

_VERSION, _INFO, _DIGEST = b"factory.format_version", b"factory.info", b"factory.info_sha256"
_SHA256 = re.compile("^[0-9a-f]{64}$")
MAX_SHARD = 1 << 24
MANIFEST, DATASET = "m.parquet", "dataset.json"
MAX_INFO = 90 << 20
"""Bytes of the metadata; 500,000 tars need 60 MB, and Parquet readers stop at 100 MB."""
MAX_SIDE = 4096
"""Pixels of a stored image's side: what a reader may have to decode is bounded before it decodes anything."""
MIN_SAMPLE = 3072
"""Bytes that a sample takes in its tar at least: three headers, a block each of image, label and JSON."""


def file_name(shard: int, sha256: str, suffix: str) -> str:
    """Where a shard's ``tar`` or ``parquet`` with this content lives: equal bytes have equal names."""
    return f"shards/{shard:06d}-{sha256[:12]}.{suffix}"


_SHARD_FILE = "[0-9]{6,8}-[0-9a-f]{12}[.](tar|parquet)"
SHARD_FILE = re.compile(rf"shards/({_SHARD_FILE}|[.]{_SHARD_FILE}-[0-9a-f]{{32}})", re.ASCII)
"""A shard's tar or table, or a copy of one that was under way to another disk."""


def is_sha256(value: Any) -> bool:
    return isinstance(value, str) and bool(_SHA256.match(value))


def is_count(value: Any, limit: int = 1 << 53) -> bool:
    """A plain integer in ``[0, limit)``."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < limit


@dataclass(frozen=True)
class TarInfo:
    """One tar of the dataset; ``name`` follows from shard and content."""

    shard: int
    name: str
    sha256: str
    bytes: int
    rows: int

    def __post_init__(self) -> None:
        counts = is_count(self.shard, MAX_SHARD) and is_count(self.bytes) and is_count(self.rows)
        if not counts or not is_sha256(self.sha256):
            raise ValueError(f"a tar has a shard number, a sha256, bytes and rows: {str(self)[:300]}")
        if self.rows * MIN_SAMPLE > self.bytes:
            raise ValueError(f"shard {self.shard}: {self.rows} rows do not fit {self.bytes} bytes")
        if self.name != file_name(self.shard, self.sha256, "tar"):
            raise ValueError(f"shard {self.shard}: {self.name!r} is not the name of a tar with this content")


def unique_names(names: Sequence[str]) -> tuple[str, ...]:
    """Class names to tell classes apart by: the label behind a name that several have (ImageNet has two cranes).

    >>> unique_names(["crane", "dog", "crane"])
    ('crane (0)', 'dog', 'crane (2)')
    """
    count = Counter(names)
    return tuple(f"{name} ({label})" if count[name] > 1 else name for label, name in enumerate(names))


@dataclass(frozen=True)
class DatasetInfo:
    """Everything about a dataset but its rows. ``tars`` is filled by the merge, in shard order.

    ``prior`` and ``teacher`` are identities with checksums; ``image_size`` is the stored side in pixels. ``rescored``
    tells what a manifest of ``factory rescore`` was made from; None where the columns are those of the tars.
    """

    fingerprint: str
    recipe: dict[str, Any]
    prior: dict[str, Any]
    teacher: dict[str, Any]
    image_size: int
    class_names: tuple[str, ...]
    tars: tuple[TarInfo, ...] = ()
    format_version: int = FORMAT_VERSION
    rescored: dict[str, Any] | None = None

    @property
    def rows(self) -> int:
        return sum(tar.rows for tar in self.tars)

    def with_tars(self, tars: tuple[TarInfo, ...]) -> "DatasetInfo":
        return replace(self, tars=tars)

    def to_metadata(self) -> dict[bytes, bytes]:
        """Key-value metadata for Parquet; its own checksum is part of it, since Parquet does not protect its footer."""
        values = asdict(self)
        del values["format_version"]
        if self.rescored is None:
            del values["rescored"]
        values["tars"] = [[tar.shard, tar.sha256, tar.bytes, tar.rows] for tar in self.tars]
        text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
        if len(text) > MAX_INFO:
            raise DataError(f"the dataset's description has {len(text)} bytes, at most {MAX_INFO}: use larger shards")
        return {
            _VERSION: str(self.format_version).encode(),
            _INFO: text,
            _DIGEST: hashlib.sha256(text).hexdigest().encode(),
        }

    def to_json(self) -> bytes:
        """Without its tars, as ``dataset.json`` of a run folder holds it: enough to rebuild a lost manifest."""
        return dump_checked(json.loads(self.with_tars(()).to_metadata()[_INFO]))

    @classmethod
    def from_json(cls, data: bytes, where: str) -> "DatasetInfo":
        """The inverse of :meth:`to_json`. Raises :class:`DataError` naming ``where`` for anything else."""
        return cls._parsed(load_checked, data, where)

    @classmethod
    def from_metadata(cls, metadata: Mapping[bytes, bytes] | None, where: str) -> "DatasetInfo":
        """Read it back. Raises :class:`DataError` naming ``where`` for metadata that is not ours, newer or damaged."""
        found = metadata or {}
        if _VERSION not in found or _INFO not in found:
            raise DataError(f"{where}: not a manifest of this factory (its metadata lacks factory.format_version)")
        if found[_VERSION] != str(FORMAT_VERSION).encode():
            version = found[_VERSION][:20].decode("ascii", "replace")
            raise DataError(f"{where}: format version {version!r}, this program reads {FORMAT_VERSION}")
        if hashlib.sha256(found[_INFO]).hexdigest().encode() != found.get(_DIGEST):
            raise DataError(f"{where}: its description was altered (checksum differs)")
        return cls._parsed(load_tree, found[_INFO], where)

    @classmethod
    def _parsed(cls, load: Callable[[bytes], Any], data: bytes, where: str) -> "DatasetInfo":
        try:
            values = {"rescored": None, **load(data)}
            for name, kind in _KINDS.items():
                if not isinstance(values[name], kind):
                    raise ValueError(f"{name} is {str(values[name])[:80]!r}")
            names, side = values["class_names"], values["image_size"]
            if not all(isinstance(name, str) for name in names) or not is_count(side, MAX_SIDE + 1):
                raise ValueError(f"expected class names as text and an image size of at most {MAX_SIDE} pixels")
            tars = tuple(TarInfo(s, file_name(s, d, "tar"), d, b, n) for s, d, b, n in values["tars"])
            if [tar.shard for tar in tars] != sorted({tar.shard for tar in tars}):
                raise ValueError("shards are repeated or out of order")
            fields = {name: values[name] for name in (*_KINDS, "image_size")}
            return cls(**fields | {"class_names": (*names,), "tars": tars})
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{where}: damaged description: {error}") from None


_KINDS: dict[str, type | tuple[type, ...]] = dict.fromkeys(("recipe", "prior", "teacher"), dict)
_KINDS |= {"fingerprint": str, "class_names": list, "tars": list, "rescored": (dict, NoneType)}
"""What the JSON of a description holds, beside the size of its images."""
