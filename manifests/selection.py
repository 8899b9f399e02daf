"""The selected rows of a manifest and the bytes of their images, each checked against its recorded checksum.

Reading sorts what is asked for by its place in the tars and joins neighbours: a dense request becomes a sequential
scan, a sparse one ranged reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from manifests.errors import DataError, FactoryError
from manifests.schema import MAX_IMAGE

if TYPE_CHECKING:
    from manifests.reader import Manifest

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
