"""Parquet in and out: one set of options for every table that is written, one guard for every table that is read."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from manifests.errors import DataError
from manifests.schema import SCHEMA, filled, same_columns

_REPEATED = ("class_name", "prompt", "negative_prompt", "method", "source_key", "cosine_ref", "cosine_space")
DICTIONARY = (*_REPEATED, "reject_reason")
"""Text that repeats: stored once per row group, and read as Arrow dictionaries where speed matters."""

MAX_GROUP_BYTES = 1 << 30
_SMALL = (
    "shard",
    "label",
    "prior_label",
    "seed",
    "group",
    "trajectory",
    "step",
    "timestep",
    "teacher_label",
    "loss_bn",
)


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
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{where}: not a readable Parquet file: {reason}") from None


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
        if sum(group.num_rows for group in groups) != metadata.num_rows:
            raise DataError(f"{where}: its row groups do not add up to {metadata.num_rows} rows")
        if not dictionary:
            return file
        return pq.ParquetFile(
            source, metadata=metadata, read_dictionary=[*DICTIONARY], page_checksum_verification=True, pre_buffer=True
        )


def read_table(data: bytes, where: str) -> pa.Table:
    """A whole small table from its bytes, with exactly the columns of :data:`SCHEMA` and no null where none may be."""
    file = open_table(pa.BufferReader(data), where)
    with parquet_errors(where):
        table = file.read(use_threads=False).replace_schema_metadata(None)
        return filled(table).cast(SCHEMA)
