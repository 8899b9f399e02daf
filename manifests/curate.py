"""Which rows of a manifest a command uses: ``--where``, files of keys from other tools, the best of each class."""

import io
import logging
import os
import re
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from manifests.errors import DataError, UsageError, one_line
from manifests.plain_files import read_regular
from manifests.reader import Manifest
from manifests.schema import KEY, SCHEMA, parquet_errors

log = logging.getLogger(__name__)

MAX_KEYS = 1 << 30
"""Bytes of a file of keys; 50 million keys as text need 700 MB."""
_BEST = re.compile(r"([0-9]{1,9}):(-?)([a-z_0-9]+)")


@dataclass(frozen=True)
class Selection:
    """What narrows a manifest down, in this order; None does nothing.

    ``where``: a condition (:mod:`manifests.where`). ``keys``, ``exclude_keys``: files of keys to take, and to leave
    out. ``best``: ``100:confidence`` takes of each class the 100 rows with the highest confidence, ``100:-entropy``
    those with the lowest entropy; rows without a value are none of them, equal ones are taken in the manifest's order.
    """

    where: str | None = None
    include_rejected: bool = False
    keys: str | None = None
    exclude_keys: str | None = None
    best: str | None = None

    def of(self, manifest: Manifest) -> Manifest:
        """The rows of ``manifest`` that are selected. Raises UsageError for a wrong condition or column, DataError
        where a file of keys does not belong to it or nothing is left."""
        best = parse_best(self.best) if self.best else None
        selected = manifest.where(self.where, self.include_rejected)
        for file, exclude in ((self.keys, False), (self.exclude_keys, True)):
            if file:
                selected = _with_keys(selected, file, exclude)
        return _best(selected, *best) if best else selected


def parse_best(text: str) -> tuple[int, str, bool]:
    """``100:-entropy`` as (number for each class, column, whether the smallest are the best). Raises UsageError."""
    match = _BEST.fullmatch(text)
    if match is None or not int(match[1]):
        raise UsageError(f"best {text!r}: expected N:COLUMN (the highest values) or N:-COLUMN, such as 100:confidence")
    kind = SCHEMA.field(match[3]).type if match[3] in SCHEMA.names else None
    if kind is None or not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        numbers = [f.name for f in SCHEMA if pa.types.is_floating(f.type) or pa.types.is_integer(f.type)]
        raise UsageError(f"best {text!r}: {match[3]} is no column of numbers; those are {', '.join(numbers)}")
    return int(match[1]), match[3], bool(match[2])


def _best(manifest: Manifest, count: int, column: str, smallest: bool) -> Manifest:
    values = np.array([np.nan if value is None else value for value in manifest.column(column)], np.float64)
    order = np.lexsort((values if smallest else -values, manifest.labels))
    order = order[~np.isnan(values[order])]
    labels = manifest.labels[order]
    rank = np.arange(len(order)) - np.searchsorted(labels, labels)
    return _taken(manifest, np.sort(order[rank < count]), f"has a {column}")


def _with_keys(manifest: Manifest, file: str, exclude: bool) -> Manifest:
    """The rows whose key ``file`` lists, or the others. A key of no row at all means another dataset."""
    keys = read_keys(file)
    listed = pa.array(manifest.column("key"), pa.string())
    chosen = pc.is_in(listed, value_set=keys).to_numpy(zero_copy_only=False)
    if not exclude and chosen.sum() < len(keys):
        every = pa.array(Manifest(manifest.file, include_rejected=True).column("key"), pa.string())
        unknown = keys.filter(pc.invert(pc.is_in(keys, value_set=every)))
        if len(unknown):
            raise DataError(
                f"{file}: {len(unknown)} of its {len(keys)} keys are none of {manifest.url}: {unknown[0].as_py()}"
            )
        log.warning("%s: %s of its %s keys are left out: rejected images, or --where does not select them",
                    file, len(keys) - int(chosen.sum()), len(keys))  # fmt: skip
    what = f"is {'left by' if exclude else 'in'} {file}"
    return _taken(manifest, np.flatnonzero(~chosen if exclude else chosen), what)


def _taken(manifest: Manifest, indices: np.ndarray, what: str) -> Manifest:
    if not len(indices):
        raise DataError(f"{manifest.url}: none of its {len(manifest)} selected rows {what}")
    return manifest.take(indices)


def read_keys(file: str) -> pa.StringArray:
    """The keys that ``file`` lists, each once: the column ``key`` of Parquet or CSV (or its only one), or the lines of
    a text. Raises DataError where it cannot be read, is empty, or holds what is no key."""
    try:
        data = read_regular(file, MAX_KEYS)
    except OSError as error:
        raise DataError(f"cannot read the keys in {file}: {error.strerror}") from None
    suffix = os.path.splitext(file)[1].lower()
    if suffix == ".parquet":
        with parquet_errors(file):
            parquet = pq.ParquetFile(io.BytesIO(data))
            column = parquet.read([_column(parquet.schema_arrow.names, file)]).column(0)
    elif suffix == ".csv":
        try:
            table = pa.csv.read_csv(
                io.BytesIO(data), convert_options=pa.csv.ConvertOptions(column_types={"key": pa.string()})
            )
        except pa.ArrowException as error:
            raise DataError(f"{file}: not readable as CSV: {one_line(error, 200)}") from None
        column = table[_column(table.column_names, file)]
    else:
        try:
            column = pa.array([line.strip() for line in data.decode().splitlines() if line.strip()], pa.string())
        except UnicodeDecodeError:
            raise DataError(f"{file}: no text: give keys as .parquet, .csv, or one on each line") from None
    if not pa.types.is_string(column.type) and not pa.types.is_large_string(column.type):
        raise DataError(f"{file}: its keys are of type {column.type}, expected text such as 000012-000345")
    keys = pc.unique(column.cast(pa.string())).drop_null()
    wrong = keys.filter(pc.invert(pc.match_substring_regex(keys, KEY)))
    if len(wrong):
        raise DataError(f"{file}: {wrong[0].as_py()[:80]!r} is no key of an image, such as 000012-000345")
    if not len(keys):
        raise DataError(f"{file}: no keys in it")
    return keys


def _column(names: list[str], file: str) -> str:
    if "key" in names or len(names) == 1:
        return "key" if "key" in names else names[0]
    raise DataError(f"{file}: no column key; its columns: {', '.join(map(str, names[:20]))}")
