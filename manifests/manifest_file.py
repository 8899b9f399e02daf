"""An open ``m.parquet``: its description, and its rows column by column and row group by row group.

:class:`manifests.reader.Manifest` selects rows of it and reads their images. Nothing is trusted before it is checked.
"""

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from manifests.dataset import DatasetInfo
from manifests.errors import DataError, UsageError, one_line, suggest
from manifests.schema import SCHEMA, Row, check_cells, open_table, parquet_errors
from manifests.storage import Patience, Storage
from manifests.tar_cache import TarCache
from manifests.where import columns_of, compile_where

Integers = npt.NDArray[np.int64]
_ROW = "__row"


class ManifestFile:
    """Can be pickled and used after a fork: it reopens where it arrives. Raises :class:`DataError` for a file that is
    not a manifest, or whose number of rows is not that of its tars.

    ``patience`` and ``cache`` say how the images of its tars are read; the cache stays in its process."""

    def __init__(self, storage: Storage, name: str) -> None:
        self.storage, self.name = storage, name
        self.url = storage.path(name)
        self._handle: tuple[int, pq.ParquetFile] | None = None
        self._held: tuple[int, pa.Table] | None = None
        self._lock = threading.Lock()
        self.patience = Patience()
        self.cache: TarCache | None = None
        metadata = self._parquet.metadata
        self.info = DatasetInfo.from_metadata(metadata.metadata, self.url)
        self.num_rows: int = metadata.num_rows
        self.num_groups: int = metadata.num_row_groups
        if self.num_rows != self.info.rows:
            raise DataError(f"{self.url}: {self.num_rows} rows, but its tars hold {self.info.rows}")
        counts = [metadata.row_group(index).num_rows for index in range(self.num_groups)]
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    def __getstate__(self) -> dict[str, Any]:
        gone = dict.fromkeys(("_handle", "_held", "_lock", "cache"))
        return {**self.__dict__, **gone, "patience": Patience(self.patience.stall_seconds)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = {**state, "_lock": threading.Lock()}

    @property
    def _parquet(self) -> pq.ParquetFile:
        """The open file of this process: a fork must not share its position."""
        if self._handle is None or self._handle[0] != os.getpid():
            source = self.storage.open(self.name)
            self._handle = (os.getpid(), open_table(source, self.url, dictionary=True))
        return self._handle[1]

    def _read_group(self, group: int, columns: list[str] | None = None) -> pa.Table:
        """A row group. One thread at a time: Arrow's open file is not made for more."""
        with self._lock:
            return check_cells(self._parquet.read_row_group(group, columns=columns), self.url)

    def tar_problems(self, verify: bool) -> Iterator[str]:
        """Tars that are missing or have another size; with ``verify`` also those with another sha256."""
        sizes = self.storage.sizes("shards")
        for tar in self.info.tars:
            path = self.storage.path(tar.name)
            if tar.name not in sizes:
                yield f"{path}: missing tar of shard {tar.shard}, expected beside {self.url}"
            elif sizes[tar.name] != tar.bytes:
                yield f"{path}: {sizes[tar.name]} bytes, expected {tar.bytes} (shard {tar.shard})"
            elif verify:
                with self.storage.open(tar.name) as file:
                    if _sha256(file, tar.bytes) != tar.sha256:
                        yield f"{path}: altered: its sha256 is not the recorded one (shard {tar.shard})"

    @cached_property
    def digest(self) -> str:
        """sha256 of the stored rows and of the description but for its recipe: what an order or a checkpoint refers to.

        The recipe holds settings of stage 2, which may be edited; what decides the images is in the fingerprint.
        """
        described = {name: value for name, value in asdict(self.info).items() if name != "recipe"}
        with self.storage.open(self.name) as file:
            end = file.seek(-8, os.SEEK_END)  # Parquet: pages, footer, its length in 4 bytes, PAR1
            pages = end - int.from_bytes(file.read(4), "little")
            file.seek(0)
            return _sha256(file, pages, json.dumps(described, sort_keys=True).encode())

    def matching(self, conditions: Sequence[str], include_rejected: bool) -> Integers:
        """Ascending numbers of the rows that satisfy all ``conditions`` (see :mod:`manifests.where`).

        Raises :class:`UsageError` for a bad expression or unknown column.
        """
        filters = {text: compile_where(text, SCHEMA) for text in (*([] if include_rejected else ["kept"]), *conditions)}
        if not filters:
            with parquet_errors(self.url):  # a number of rows is only a claim
                return np.arange(self.num_rows, dtype=np.int64)
        columns = sorted({name for text in filters for name in columns_of(text)})
        found = [self._matching(group, columns, filters) for group in range(self.num_groups)]
        return np.concatenate([np.zeros(0, np.int64), *found])

    def _matching(self, group: int, columns: list[str], filters: dict[str, pc.Expression]) -> Integers:
        with parquet_errors(self.url):
            table = self._read_group(group, columns)
            table = table.append_column(_ROW, pa.array(np.arange(*self._starts[group : group + 2])))
        for text, expression in filters.items():
            try:
                table = table.filter(expression)
            except pa.ArrowException as error:
                raise UsageError(f"--where {text!r}: {one_line(error, 200)}") from None
        return np.asarray(table[_ROW].to_numpy(), dtype=np.int64)

    def read_columns(self, names: list[str], rows: Integers) -> pa.Table:
        """The named columns of ``rows`` (any order, repeats allowed), text as plain strings."""
        unknown = [name for name in names if name not in SCHEMA.names]
        if unknown:
            raise UsageError(f"{self.url}: unknown column {unknown[0]!r}; {suggest(unknown[0], SCHEMA.names)}")
        order = np.argsort(rows, kind="stable")
        ascending = rows[order]
        bounds = np.searchsorted(ascending, self._starts)
        schema = pa.schema([SCHEMA.field(name).with_nullable(True) for name in names])
        parts = []
        with parquet_errors(self.url):
            for group in range(self.num_groups):
                wanted = ascending[bounds[group] : bounds[group + 1]] - self._starts[group]
                if len(wanted):
                    part = self._read_group(group, names)
                    part = part if len(wanted) == part.num_rows and _all(wanted) else part.take(wanted)
                    parts.append(part.select(names).replace_schema_metadata(None).cast(schema))
            table = pa.concat_tables(parts or [schema.empty_table()])
            if _all(order):
                return table
            back = np.empty(len(order), np.int64)
            back[order] = np.arange(len(order))
            return table.take(back)

    def group(self, group: int) -> pa.Table:
        """One row group with every column; the last one is kept for the next call."""
        held = self._held
        if held is None or held[0] != group:
            with parquet_errors(self.url):
                table = self._read_group(group).replace_schema_metadata(None)
                self._held = held = (group, table.cast(SCHEMA))
        return held[1]

    def row(self, number: int) -> Row:
        """One row as a dict with every column; the row group it lies in is kept for the next call."""
        group = int(np.searchsorted(self._starts, number, side="right")) - 1
        row: Row = self.group(group).slice(number - int(self._starts[group]), 1).to_pylist()[0]
        return row

    @cached_property
    def _shards(self) -> dict[int, tuple[int, int]]:
        """The first row of each shard, and the one after its last: rows lie in the order of the tars."""
        stops = np.cumsum([tar.rows for tar in self.info.tars]).tolist()
        return {tar.shard: (stop - tar.rows, stop) for tar, stop in zip(self.info.tars, stops, strict=True)}

    def shard_rows(self, shard: int) -> pa.Table:
        """Every row of a shard's tar, in order."""
        if shard not in self._shards:
            raise DataError(f"{self.url}: shard {shard} is not in it")
        start, stop = self._shards[shard]
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        parts = [self.group(group) for group in range(first, int(np.searchsorted(self._starts, stop)))]
        return pa.concat_tables([SCHEMA.empty_table(), *parts]).slice(start - int(self._starts[first]), stop - start)


def _all(indices: Integers) -> bool:
    return bool(np.array_equal(indices, np.arange(len(indices))))


def _sha256(file: BinaryIO, size: int, first: bytes = b"") -> str:
    """Of ``first`` and the next ``size`` bytes of ``file``."""
    digest = hashlib.sha256(first)
    while size > 0 and (block := file.read(min(1 << 20, size))):
        digest.update(block)
        size -= len(block)
    return digest.hexdigest()
