"""What a manifest holds: the columns of a row, its JSON twin inside the tar, and the Parquet tables that carry them.

``m.parquet`` and the table of every shard have the columns of :data:`SCHEMA`; ``KEY.json`` beside each image in a tar
holds the same row without ``offset`` and ``size``, so tables can be rebuilt from tars alone.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import zip_longest
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from manifests.checked_json import load_json
from manifests.errors import DataError, one_line

Row = dict[str, Any]
"""A row by column name, in plain types as :data:`SCHEMA` has them (lists, dicts of a cut, None for null)."""
FORMAT_VERSION = 3  # raise when files of an earlier version can no longer be read
KEY = "^[0-9]{6,}-[0-9]{6,}$"
EXTENSIONS = ("png", "jpg", "webp")

MAX_ROW_JSON = 1 << 20
"""Bytes of one ``KEY.json``; a row with 1,000 logits and 50 cuts needs 12 kB."""
MAX_IMAGE = 64 << 20
"""Bytes of one stored image."""

_CUT = pa.struct(
    [
        ("step", pa.int16()),
        ("timestep", pa.int32()),
        ("partner", pa.int32()),
        ("y", pa.int16()),
        ("x", pa.int16()),
        ("h", pa.int16()),
        ("w", pa.int16()),
        ("lam", pa.float32()),
    ]
)


SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),  # unique, no dots: 000012-000345
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),  # of the image payload in the tar, bytes
        pa.field("size", pa.int32(), nullable=False),
        pa.field("xxh3", pa.binary(16), nullable=False),  # xxh3-128 of the stored image bytes, big-endian
        pa.field("label", pa.int32(), nullable=False),
        pa.field("class_name", pa.string()),
        pa.field("prompt", pa.string()),
        pa.field("negative_prompt", pa.string()),
        pa.field("prior_label", pa.int32()),  # class-conditional priors
        pa.field("method", pa.string(), nullable=False),
        pa.field("seed", pa.int64()),
        pa.field("group", pa.int32()),
        pa.field("trajectory", pa.int32()),
        pa.field("source_key", pa.string()),  # the image it was derived from
        pa.field("step", pa.int16()),
        pa.field("timestep", pa.int32()),  # 0 = final image
        pa.field("lca", pa.list_(_CUT)),  # by lca.kind: stages/synth/latent_mix.py
        pa.field("cosine", pa.float32()),
        pa.field("cosine_ref", pa.string()),
        pa.field("cosine_space", pa.string()),  # teacher | contrastive
        pa.field("teacher_label", pa.int32()),
        pa.field("confidence", pa.float32()),
        pa.field("entropy", pa.float32()),
        pa.field("margin", pa.float32()),
        pa.field("loss_ce", pa.float32()),
        pa.field("loss_adv", pa.float32()),
        pa.field("loss_bn", pa.float32()),
        pa.field("kept", pa.bool_(), nullable=False),
        pa.field("reject_reason", pa.string()),
        pa.field("logits", pa.list_(pa.float16())),
        pa.field("skipped_updates", pa.int16()),  # of the guidance, for a gradient that was not finite; null: none
    ]
)
REQUIRED = frozenset(field.name for field in SCHEMA if not field.nullable)
PLACEMENT = frozenset({"offset", "size"})
"""Columns that only the finished tar knows; they are no part of a row's JSON."""

SCORED = frozenset(
    {"cosine", "cosine_ref", "cosine_space", "teacher_label", "confidence", "entropy", "margin"}
    | {"kept", "reject_reason", "logits"}
)
"""Columns that ``factory rescore`` computes again; in its manifests they differ from the rows in the tars."""


def make_key(shard: int, index: int) -> str:
    """The key of the ``index``-th sample of ``shard``."""
    return f"{shard:06d}-{index:06d}"


# Conversion of one value to what its column stores, in plain Python types. Arrow's own casts accept more: 1.0 and True
# as an integer, an object with other fields.


_NUMPY = (np.generic, np.ndarray)


def _expect(value: Any, types: type | tuple[type, ...], what: str) -> Any:
    plain = value.tolist() if isinstance(value, _NUMPY) else value
    if not isinstance(plain, types) or (isinstance(plain, bool) and types is not bool):
        raise ValueError(f"expected {what}")
    return plain


def _integer(bits: int, value: Any) -> int:
    number = int(_expect(value, int, "an integer"))
    if not -(1 << bits - 1) <= number < 1 << bits - 1:
        raise ValueError(f"does not fit {bits} bits")
    return number


def _real(kind: type[np.floating[Any]], value: Any) -> float | None:
    """Floats as the shortest decimal of the stored value, so JSON and Parquet agree; non-finite becomes null."""
    if value is None:  # inside a list: what was not finite when it was written
        return None
    stored = kind(_expect(value, (int, float), "a number"))
    if not math.isfinite(stored):
        return None
    short = float(str(stored))
    return short if kind(short) == stored else float(stored)


def _text(value: Any) -> str:
    text: str = _expect(value, str, "text")
    text.encode("utf-8")
    return text


def _digest(value: Any) -> bytes:
    raw = bytes.fromhex(value) if isinstance(value, str) else value
    if not isinstance(raw, bytes) or len(raw) != 16:
        raise ValueError("expected 16 bytes")
    return raw


_LEAVES: dict[pa.DataType, Callable[[Any], Any]] = {
    pa.int16(): partial(_integer, 16),
    pa.int32(): partial(_integer, 32),
    pa.int64(): partial(_integer, 64),
    pa.float16(): partial(_real, np.float16),
    pa.float32(): partial(_real, np.float32),
    pa.string(): _text,
    pa.binary(16): _digest,
    pa.bool_(): lambda value: _expect(value, bool, "true or false"),
}


def _converter(kind: pa.DataType) -> Callable[[Any], Any]:
    if pa.types.is_list(kind):
        item = _converter(kind.value_type)
        return lambda value: [item(entry) for entry in _expect(value, (list, tuple), "a list")]
    if pa.types.is_struct(kind):
        fields = {field.name: _converter(field.type) for field in kind}

        def convert(value: Any) -> dict[str, Any]:
            if not isinstance(value, Mapping) or set(value) != set(fields):
                raise ValueError(f"expected an object with {', '.join(fields)}")
            return {name: item(value[name]) for name, item in fields.items()}

        return convert
    return _LEAVES[kind]


_CONVERT = {field.name: _converter(field.type) for field in SCHEMA}


def normalize(row: Mapping[str, Any]) -> Row:
    """``row`` with exactly the stored values: every column present, in order, null where it was missing.

    Raises ``ValueError`` naming the column for an unknown column, a wrong type or a missing required value.
    """
    unknown = sorted(set(map(str, row)) - set(_CONVERT))
    if unknown:
        raise ValueError(f"unknown column {unknown[0]!r}")
    full: Row = {}
    for name, convert in _CONVERT.items():
        value = row.get(name)
        try:
            full[name] = None if value is None else convert(value)
        except (ValueError, OverflowError) as error:
            raise ValueError(f"column {name!r}: {error}") from None
        if full[name] is None and name in REQUIRED:
            raise ValueError(f"column {name!r} must not be null")
    return full


def row_json(row: Mapping[str, Any]) -> bytes:
    """The ``KEY.json`` of a normalized row: columns in order, without nulls, ``offset`` and ``size``."""
    values = {name: value for name, value in row.items() if value is not None and name not in PLACEMENT}
    values["xxh3"] = values["xxh3"].hex()
    return json.dumps(values, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def parse_row(data: bytes, offset: int, size: int) -> Row:
    """The normalized row of a ``KEY.json`` whose image lies at ``offset``. Raises ``ValueError`` for anything else."""
    if len(data) > MAX_ROW_JSON:
        raise ValueError(f"{len(data)} bytes, at most {MAX_ROW_JSON} are read")
    values = load_json(data)
    if not isinstance(values, dict) or PLACEMENT & set(values):
        raise ValueError("expected an object without offset and size")
    return normalize({**values, "offset": offset, "size": size})


def to_table(rows: list[Row]) -> pa.Table:
    """Normalized rows as a table of :data:`SCHEMA`."""
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def same_columns(schema: pa.Schema) -> str | None:
    """None where names, order and types are those of :data:`SCHEMA`; else what differs."""
    for number, (theirs, ours) in enumerate(zip_longest(schema, SCHEMA), 1):
        if theirs is None or ours is None or theirs.name != ours.name:
            found, expected = (field and field.name[:80] for field in (theirs, ours))
            return f"column {number} is {found!r}, expected {expected!r}"
        if theirs.type != ours.type:
            return f"column {ours.name!r} is {str(theirs.type)[:80]}, expected {ours.type}"
    loose = [field.name for field in schema if field.nullable and field.name in REQUIRED]
    return f"column {loose[0]!r} may be null" if loose else None


MAX_GROUP_BYTES = 1 << 30
DICTIONARY = [field.name for field in SCHEMA if field.type == pa.string() and field.name != "key"]
"""Text that repeats: stored once per row group, and read as Arrow dictionaries where speed matters."""
_SMALL = ["shard", "label", "prior_label", "seed", "group", "trajectory", "step", "timestep"]
_SMALL += ["teacher_label", "loss_bn"]


def write_options() -> dict[str, Any]:
    """Options of every table. Page checksums make a flipped bit an error instead of a wrong value."""
    return {
        "compression": "zstd",
        "compression_level": 1,
        "use_dictionary": [*DICTIONARY, *_SMALL],
        "write_page_checksum": True,
        "version": "2.6",
    }


@contextmanager
def parquet_errors(where: str) -> Iterator[None]:
    """Whatever Arrow says about a bad file, as one line naming it."""
    try:
        yield
    except DataError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError, OverflowError, MemoryError) as error:
        raise DataError(f"{where}: not a readable Parquet file: {one_line(error, 200)}") from None


def open_table(source: BinaryIO | pa.NativeFile, where: str, dictionary: bool = False) -> pq.ParquetFile:
    """Open a table of ours: columns and sizes are checked before any value is read.

    With ``dictionary`` repeated text is read as Arrow dictionaries: faster to filter, smaller in memory.
    """
    with parquet_errors(where):
        file = pq.ParquetFile(source, page_checksum_verification=True)
        difference = same_columns(file.schema.to_arrow_schema())
        if difference:
            raise DataError(f"{where}: not a manifest of this factory: {difference}")
        metadata = file.metadata
        groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
        if any(not 0 <= group.total_byte_size <= MAX_GROUP_BYTES or group.num_rows < 0 for group in groups):
            raise DataError(f"{where}: a row group claims more than {MAX_GROUP_BYTES} bytes")
        repeated = {*DICTIONARY}
        for chunk in (group.column(index) for group in groups for index in range(group.num_columns)):
            if chunk.physical_type == "BYTE_ARRAY":
                if any(
                    encoding.startswith("DELTA") for encoding in chunk.encodings
                ):  # each text a few bytes of another
                    raise DataError(f"{where}: column {chunk.path_in_schema[:80]!r} is delta-encoded: write it plainly")
                if chunk.has_dictionary_page:
                    repeated.add(chunk.path_in_schema)
        if sum(group.num_rows for group in groups) != metadata.num_rows:
            raise DataError(f"{where}: its row groups do not add up to {metadata.num_rows} rows")
        if not dictionary:
            return file
        return pq.ParquetFile(
            source, metadata=metadata, read_dictionary=[*repeated], page_checksum_verification=True, pre_buffer=True
        )


MAX_GROUP_TEXT = 256 << 20
"""Bytes of all text in one row group, spelled out; prompts of 1,000 characters make a twentieth."""


def check_cells(table: pa.Table, where: str) -> pa.Table:
    """``table``, read with ``dictionary``. Raises DataError, before text is spelled out row by row, where a cell is
    longer than a row may be, or all cells of a row group are together: a dictionary says megabytes in a few bytes.
    Also where a list holds null."""
    total = 0
    for name, column in zip(table.column_names, table.columns, strict=True):
        if pa.types.is_list(column.type) and pc.list_flatten(column).null_count:
            raise DataError(f"{where}: column {name!r} has a list that holds null")
    for column in table.columns:
        for chunk in column.chunks if pa.types.is_dictionary(column.type) else ():
            lengths = pc.cast(pc.binary_length(chunk.dictionary), pa.int64())
            if (pc.max(lengths).as_py() or 0) > MAX_ROW_JSON:
                raise DataError(f"{where}: a text has more than {MAX_ROW_JSON} bytes")
            total += pc.sum(lengths.take(chunk.indices)).as_py() or 0
    if total > MAX_GROUP_TEXT:
        raise DataError(f"{where}: a row group has more than {MAX_GROUP_TEXT} bytes of text")
    return table


def read_table(data: bytes, where: str) -> pa.Table:
    """A whole small table from its bytes, with exactly the columns of :data:`SCHEMA` and no null where none may be."""
    file = open_table(pa.BufferReader(data), where, dictionary=True)
    with parquet_errors(where):
        table = check_cells(file.read(use_threads=False).replace_schema_metadata(None), where)
        return table.cast(SCHEMA)
