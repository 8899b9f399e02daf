"""Opens ``m.parquet``, selects rows, reads their images. ``factory run distill`` and ``factory inspect`` read with it.

The manifest is the index: it knows tar, offset, length and checksum of every image, so any image is one ranged read
and any run of neighbors is one longer read. Nothing is trusted before it is checked.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from manifests.dataset import DatasetInfo, TarInfo
from manifests.errors import DataError, FactoryError, UsageError
from manifests.merge import MANIFEST
from manifests.schema import MAX_IMAGE, SCHEMA, open_table, parquet_errors
from manifests.storage import Storage, split
from manifests.where import columns_of, compile_where

# The selected rows of a manifest and the bytes of their images, each checked against its recorded checksum.
#
# Reading sorts what is asked for by its place in the tars and joins neighbors: a dense request becomes a sequential
# scan, a sparse one ranged reads.


GAP_LOCAL, GAP_REMOTE = 64 << 10, 1 << 20
"""Bytes worth reading and throwing away rather than starting another read: about a seek's, or a request's, worth."""
RUN = 8 << 20
"""Bytes of one read at most, unless a single image is larger."""
WINDOW = 4096
"""Images that :meth:`Selection.scan` orders by place at once."""

Integers = npt.NDArray[np.int64]
OnBad = Callable[[int, DataError], None]


class Selection:
    """Rows of a manifest, addressed ``0..len-1`` in manifest order. Can be pickled and used after a fork."""

    def __init__(self, manifest: Manifest, rows: npt.NDArray[np.int64]) -> None:
        self.manifest, self.rows = manifest, rows

    def __getstate__(self) -> dict[str, Any]:
        return {"manifest": self.manifest, "rows": self.rows}

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, name: str) -> npt.NDArray[Any] | list[Any]:
        """One column: a NumPy array for numbers and truth values without nulls (reals with nulls: NaN), else a list."""
        values = self.manifest.read_columns([name], self.rows)[name]
        kind = values.type
        exact = (pa.types.is_integer(kind) or pa.types.is_boolean(kind)) and not values.null_count
        if exact or pa.types.is_floating(kind):
            return np.asarray(values.combine_chunks().to_numpy(zero_copy_only=False))
        try:
            return [*values.to_pylist()]
        except UnicodeDecodeError:
            raise DataError(f"{self.manifest.url}: column {name!r} holds text that is not UTF-8") from None

    @cached_property
    def labels(self) -> Integers:
        """The target class of every row. Raises :class:`DataError` where one is none of the dataset's classes."""
        values = np.asarray(self.column("label"), np.int64)
        classes = len(self.manifest.info.class_names)
        if len(values) and not (values.min() >= 0 and values.max() < classes):
            found = f"labels reach from {values.min()} to {values.max()}"
            raise DataError(f"{self.manifest.url}: {found}, but its classes are {classes}")
        return values

    def row(self, index: int) -> dict[str, Any]:
        """Every column of one sample."""
        try:
            return self.manifest.row(int(self.rows[index]))
        except UnicodeDecodeError:
            raise DataError(f"{self.manifest.url}: row {int(self.rows[index])} holds text that is not UTF-8") from None

    def read(self, index: int) -> bytes:
        """The stored image of one sample. Raises :class:`DataError` naming shard and key if it is not intact."""
        return self.read_many([index])[0]

    def read_many(self, indices: Sequence[int] | npt.NDArray[np.int64], on_bad: OnBad | None = None) -> list[bytes]:
        """The images of ``indices``, in that order; with ``on_bad`` a bad one is reported to it and ``b""`` here."""
        wanted = np.asarray(indices, dtype=np.int64)
        images = [b""] * len(wanted)
        for run in self._runs(wanted):
            self._read_run(wanted, run, images, on_bad)
        return images

    def scan(
        self, order: Sequence[int] | npt.NDArray[np.int64] | None = None, on_bad: OnBad | None = None
    ) -> Iterator[tuple[int, bytes]]:
        """(index, image) for every index of ``order``, in that order; default: all, sequentially.

        With ``on_bad`` bad images are reported to it and left out; without, the first one raises :class:`DataError`.
        """
        every = np.arange(len(self), dtype=np.int64) if order is None else np.asarray(order, dtype=np.int64)
        for start in range(0, len(every), WINDOW):
            window = every[start : start + WINDOW]
            for index, image in zip(window.tolist(), self.read_many(window, on_bad), strict=True):
                if image:
                    yield index, image

    @cached_property
    def _places(self) -> tuple[Integers, Integers, Integers, npt.NDArray[np.uint8]]:
        """(tar number in info.tars or -1, offset, size, checksum) of every row; places outside their tar get -1."""
        table = self.manifest.read_columns(["shard", "offset", "size", "xxh3"], self.rows)
        shard, offset, size = (table[name].to_numpy().astype(np.int64) for name in ("shard", "offset", "size"))
        if any(table[name].null_count for name in table.column_names):
            raise DataError(f"{self.manifest.url}: a place or checksum is missing")
        digests = table["xxh3"].combine_chunks()
        raw = b"".join(digest.buffers()[1][digest.offset * 16 :][: len(digest) * 16] for digest in _chunks(digests))
        tars = self.manifest.info.tars
        numbers = np.array([tar.shard for tar in tars], dtype=np.int64)
        lengths = np.array([tar.bytes for tar in tars], dtype=np.int64)
        tar = np.minimum(np.searchsorted(numbers, shard), max(len(tars) - 1, 0))
        inside = numbers[tar] == shard if len(tars) else np.zeros(len(shard), bool)
        inside &= (offset >= 512) & (size > 0) & (size <= MAX_IMAGE)
        inside[inside] &= offset[inside] <= lengths[tar[inside]] - size[inside]
        return np.where(inside, tar, -1), offset, size, np.frombuffer(raw, np.uint8).reshape(-1, 16)

    def _runs(self, wanted: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.int64]]:
        """Positions in ``wanted`` by place, cut where the next image is elsewhere, far away, or the run is long."""
        if not len(wanted):
            return
        tar, offset, size, _ = self._places
        order = np.lexsort((offset[wanted], tar[wanted]))
        rows = wanted[order]
        starts, ends, tars = offset[rows], offset[rows] + size[rows], tar[rows]
        gap = GAP_LOCAL if self.manifest.storage.is_local else GAP_REMOTE
        apart = (np.diff(tars) != 0) | (starts[1:] - ends[:-1] > gap) | (tars[1:] < 0)
        for piece in np.split(order, np.flatnonzero(apart) + 1):
            inside = wanted[piece]
            lots = (offset[inside] - offset[inside[0]]) // RUN
            yield from np.split(piece, np.flatnonzero(np.diff(lots)) + 1)

    def _read_run(
        self, wanted: npt.NDArray[np.int64], run: npt.NDArray[np.int64], images: list[bytes], on_bad: OnBad | None
    ) -> None:
        tars, offsets, sizes, digests = self._places
        rows = wanted[run]
        tar = int(tars[rows[0]])
        start, stop = int(offsets[rows[0]]), int((offsets[rows] + sizes[rows]).max())
        block: bytes | None = None
        reason = "lies outside its tar"
        if tar >= 0:
            name = self.manifest.info.tars[tar].name
            try:
                block = self.manifest.storage.read_range(name, start, stop - start)
            except DataError as error:
                reason = f"cannot be read: {error}"
                if len(run) > 1:  # a tar that was cut short still holds its first samples
                    for position in run:
                        self._read_run(wanted, np.array([position]), images, on_bad)
                    return
        for position, index in zip(run.tolist(), rows.tolist(), strict=True):
            image = b"" if block is None else block[offsets[index] - start :][: sizes[index]]
            if image and xxhash.xxh3_128_digest(image) == digests[index].tobytes():
                images[position] = image
                continue
            bad = self._bad(index, reason if block is None else "was altered (checksum differs)")
            if on_bad is None:
                raise bad
            on_bad(index, bad)

    def _bad(self, index: int, reason: str) -> DataError:
        row = int(self.rows[index])
        try:
            found = self.manifest.read_columns(["shard", "key"], self.rows[index : index + 1]).to_pylist()[0]
            which = f"shard {found['shard']}, sample {found['key']!r}"
        except (FactoryError, UnicodeDecodeError):
            which = f"row {row}"
        return DataError(f"{self.manifest.url}: {which} {reason}")


def _chunks(values: pa.Array | pa.ChunkedArray) -> list[pa.Array]:
    return values.chunks if isinstance(values, pa.ChunkedArray) else [values]


_ROW = "__row"


def parse_source(text: str) -> tuple[str, float]:
    """``path@0.3`` as (path, weight); without a weight, 1. A weight is the share of the selection used per epoch."""
    path, at, weight = text.rpartition("@")
    if not at or "/" in weight:
        return text, 1.0
    try:
        value = float(weight)
    except ValueError:
        return text, 1.0
    if not (math.isfinite(value) and value > 0) or not path:
        raise UsageError(f"--manifest {text!r}: the weight after @ must be a positive number")
    return path, value


def manifest_url(url: str | os.PathLike[str]) -> str:
    """The manifest of a dataset folder; the URL itself where it already names a file."""
    text = os.fspath(url)
    remote = "://" in text
    folder = not text.endswith(".parquet") if remote else os.path.isdir(text)
    return f"{text.rstrip('/')}/{MANIFEST}" if folder else text


class Manifest:
    """An opened manifest. Make one with :meth:`open`; instances can be pickled (they reopen where they arrive)."""

    def __init__(self, storage: Storage, name: str) -> None:
        self.storage, self.name = storage, name
        self.url = storage.path(name)
        self.problems: list[str] = []
        self._handle: tuple[int, pq.ParquetFile] | None = None
        self._lock = threading.Lock()
        self._held: tuple[int, pa.Table] | None = None
        file = self._file
        self.info = DatasetInfo.from_metadata(file.metadata.metadata, self.url)
        self.num_rows: int = file.metadata.num_rows
        if self.num_rows != self.info.rows:
            raise DataError(f"{self.url}: {self.num_rows} rows, but its tars hold {self.info.rows}")
        counts = [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)]
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    @classmethod
    def open(cls, url: str | os.PathLike[str], verify: bool = False, skip_bad: bool = False) -> Manifest:
        """Open a manifest file, or the ``m.parquet`` of a dataset folder.

        Checks that it is ours and that every tar it names is there with its recorded size; with ``verify`` also each
        tar's sha256. Raises :class:`DataError` naming the file, or with ``skip_bad`` notes it in ``problems``: the
        samples of a bad tar then fail one by one where they are read.
        """
        manifest = cls(*split(manifest_url(url)))
        for problem in manifest._tar_problems(verify):
            if not skip_bad:
                raise DataError(problem)
            manifest.problems.append(problem)
        return manifest

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None, "_held": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = {**state, "_lock": threading.Lock()}

    def _read_group(self, group: int, columns: list[str] | None = None) -> pa.Table:
        """A row group. One thread at a time: Arrow's open file is not made for more."""
        with self._lock:
            return self._file.read_row_group(group, columns=columns)

    @property
    def _file(self) -> pq.ParquetFile:
        """The open file of this process: a fork must not share its position."""
        if self._handle is None or self._handle[0] != os.getpid():
            source = self.storage.open(self.name)
            self._handle = (os.getpid(), open_table(source, self.url, dictionary=True))
        return self._handle[1]

    def _tar_problems(self, verify: bool) -> list[str]:
        sizes = self.storage.sizes("shards")
        problems = []
        for tar in self.info.tars:
            path = self.storage.path(tar.name)
            if tar.name not in sizes:
                problems.append(f"{path}: missing tar of shard {tar.shard}, expected beside {self.url}")
            elif sizes[tar.name] != tar.bytes:
                problems.append(f"{path}: {sizes[tar.name]} bytes, expected {tar.bytes} (shard {tar.shard})")
            elif verify and self.tar_sha256(tar) != tar.sha256:
                problems.append(f"{path}: altered: its sha256 is not the recorded one (shard {tar.shard})")
        return problems

    def tar_sha256(self, tar: TarInfo) -> str:
        with self.storage.open(tar.name) as file:
            return _sha256(file)

    @cached_property
    def digest(self) -> str:
        """sha256 of the stored rows and of the description but for its recipe: what an order or a checkpoint refers to.

        The recipe holds settings of stage 2, which may be edited; what decides the images is in the fingerprint.
        """
        described = {name: value for name, value in asdict(self.info).items() if name != "recipe"}
        digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
        with self.storage.open(self.name) as file:
            end = file.seek(-8, os.SEEK_END)  # Parquet: pages, footer, its length in 4 bytes, PAR1
            pages = end - int.from_bytes(file.read(4), "little")
            file.seek(0)
            _update(digest, file, pages)
        return digest.hexdigest()

    def select(self, where: str | None = None, kept: bool = True) -> Selection:
        """The rows that satisfy ``where`` (see :mod:`manifests.where`); with ``kept`` only images not rejected.

        Raises :class:`UsageError` for a bad expression or unknown column, :class:`DataError` where nothing is left.
        """
        condition = compile_where(where, SCHEMA) if where else None
        columns = sorted({*(columns_of(where) if where else ()), *(("kept",) if kept else ())})
        if not columns and condition is None:
            with parquet_errors(self.url):  # a number of rows is only a claim
                rows = np.arange(self.num_rows, dtype=np.int64)
        else:
            found = [self._matching(group, columns, where, kept) for group in range(self.num_groups)]
            rows = np.concatenate([np.zeros(0, np.int64), *found])
        if not len(rows):
            kept_rows = len(self.select()) if where and kept and self._any_kept() else 0
            among = f"{kept_rows} kept rows" if kept and where else f"{self.num_rows} rows"
            raise DataError(f"{self.url}: none of its {among} satisfies {where or 'kept == True'!r}")
        return Selection(self, rows)

    def _any_kept(self) -> bool:
        return any(len(self._matching(group, ["kept"], None, True)) for group in range(self.num_groups))

    def _matching(self, group: int, columns: list[str], where: str | None, kept: bool) -> npt.NDArray[np.int64]:
        with parquet_errors(self.url):
            table = self._read_group(group, columns)
            start, stop = self._starts[group], self._starts[group + 1]
            table = table.append_column(_ROW, pa.array(np.arange(start, stop)))
            if kept:
                table = table.filter(table["kept"])
        if where:
            try:
                table = table.filter(compile_where(where, table.schema))
            except pa.ArrowException as error:
                raise UsageError(f"--where {where!r}: {' '.join(str(error).split())[:200]}") from None
        return np.asarray(table[_ROW].to_numpy(), dtype=np.int64)

    def read_columns(self, names: list[str], rows: npt.NDArray[np.int64]) -> pa.Table:
        """The named columns of ``rows`` (any order, repeats allowed), text as plain strings."""
        unknown = [name for name in names if name not in SCHEMA.names]
        if unknown:
            raise UsageError(f"{self.url}: unknown column {unknown[0]!r}; columns: {', '.join(SCHEMA.names)}")
        order = np.argsort(rows, kind="stable")
        ascending = rows[order]
        bounds = np.searchsorted(ascending, self._starts)
        parts = []
        with parquet_errors(self.url):
            for group in range(self.num_groups):
                wanted = ascending[bounds[group] : bounds[group + 1]] - self._starts[group]
                if len(wanted):
                    part = self._read_group(group, names)
                    parts.append(part if len(wanted) == part.num_rows and _all(wanted) else part.take(wanted))
            schema = pa.schema([SCHEMA.field(name).with_nullable(True) for name in names])
            if not parts:
                return schema.empty_table()
            table = pa.concat_tables([part.select(names).replace_schema_metadata(None).cast(schema) for part in parts])
            if _all(order):
                return table
            back = np.empty(len(order), np.int64)
            back[order] = np.arange(len(order))
            return table.take(back)

    @property
    def num_groups(self) -> int:
        return len(self._starts) - 1

    def group(self, group: int) -> pa.Table:
        """One row group with every column; the last one is kept for the next call."""
        held = self._held
        if held is None or held[0] != group:
            with parquet_errors(self.url):
                table = self._read_group(group).replace_schema_metadata(None)
                self._held = held = (group, table.cast(SCHEMA))
        return held[1]

    def shard_rows(self, shard: int) -> pa.Table:
        """Every row of a shard's tar, in order; the rows of a manifest lie in the order of its tars."""
        tars = [tar for tar in self.info.tars if tar.shard <= shard]
        if not tars or tars[-1].shard != shard:
            raise DataError(f"{self.url}: shard {shard} is not in it")
        stop = sum(tar.rows for tar in tars)
        start = stop - tars[-1].rows
        groups = range(
            int(np.searchsorted(self._starts, start, side="right")) - 1, int(np.searchsorted(self._starts, stop))
        )
        parts = [self.group(group) for group in groups]
        first = int(self._starts[groups.start]) if parts else 0
        return pa.concat_tables([SCHEMA.empty_table(), *parts]).slice(start - first, stop - start)

    def row(self, index: int) -> dict[str, Any]:
        """One row as a dict with every column; the row group it lies in is kept for the next call."""
        if not 0 <= index < self.num_rows:
            raise IndexError(f"row {index} of {self.num_rows}")
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        row: dict[str, Any] = self.group(group).slice(index - int(self._starts[group]), 1).to_pylist()[0]
        return row


def _all(indices: npt.NDArray[np.int64]) -> bool:
    return bool(np.array_equal(indices, np.arange(len(indices))))


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
    _update(digest, file)
    return digest.hexdigest()


def _update(digest: Any, file: Any, size: float = math.inf) -> None:
    """Hash ``size`` bytes of ``file``, or what is left of it."""
    while block := file.read(int(min(1 << 20, size))):
        digest.update(block)
        size -= len(block)
