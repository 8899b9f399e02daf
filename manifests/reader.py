"""A dataset as its users read it: select rows of ``m.parquet``, look at them, read their images, train on them.

    images = Manifest.open("runs/digits").where("confidence >= 0.5")
    loader = DataLoader(images.dataset(transform), batch_size=64, shuffle=True)

The manifest is the index: it knows tar, offset, length and checksum of every image, so any image is one ranged read
and any run of neighbors is one longer read. What is asked for is sorted by its place in the tars and neighbors are
joined: a dense request becomes a sequential scan, a sparse one ranged reads.
"""

from __future__ import annotations

import html
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash
from PIL import Image

from manifests.dataset import MANIFEST, unique_names
from manifests.errors import DataError, FactoryError, UsageError
from manifests.fetch import Range, fetch
from manifests.images import decode
from manifests.manifest_file import Integers, ManifestFile
from manifests.order import spread
from manifests.schema import MAX_IMAGE, SCHEMA, Row
from manifests.storage import check_url, split
from manifests.tar_cache import TarCache

GAP_LOCAL, GAP_REMOTE = 64 << 10, 1 << 20
"""Bytes worth reading and throwing away rather than starting another read: about a seek's, or a request's, worth."""
RUN = 8 << 20
"""Bytes of one read at most, unless a single image is larger."""
WINDOW = 4096
"""Images that :meth:`Manifest.scan` orders by place at once."""

OnBad = Callable[[int, DataError], None]


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
    text = check_url(os.fspath(url))
    remote = "://" in text
    folder = not text.endswith(".parquet") if remote else os.path.isdir(text)
    return f"{text.rstrip('/')}/{MANIFEST}" if folder else text


class Manifest:
    """Selected rows of a manifest, addressed ``0..len-1`` in its order, and their images. Can be pickled and used after
    a fork.

    :meth:`open` selects the images that were kept, :meth:`where` narrows that down; both raise :class:`DataError` where
    nothing is left. ``file`` holds every row whatever is selected, ``num_rows`` of them; ``info`` describes the
    dataset; ``problems`` lists the tars that :meth:`open` passed over.
    """

    def __init__(
        self,
        file: ManifestFile,
        conditions: Sequence[str] = (),
        include_rejected: bool = False,
        base: Integers | None = None,
    ) -> None:
        self.file, self.info, self.url, self.storage = file, file.info, file.url, file.storage
        self.num_rows, self.problems = file.num_rows, list[str]()
        self._conditions, self._include_rejected, self._base = (*conditions,), include_rejected, base

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("labels", "_places")}

    @classmethod
    def open(cls, url: str | os.PathLike[str], verify: bool = False, skip_bad: bool = False) -> Manifest:
        """The kept images of a manifest file, or of the ``m.parquet`` of a dataset folder.

        Checks that it is ours and that every tar it names is there with its recorded size; with ``verify`` also each
        tar's sha256. Raises :class:`DataError` naming the file, or with ``skip_bad`` notes it in ``problems``: the
        samples of a bad tar then fail one by one where they are read.
        """
        manifest = cls(ManifestFile(*split(manifest_url(url))))
        for problem in manifest.file.tar_problems(verify):
            if not skip_bad:
                raise DataError(problem)
            manifest.problems.append(problem)
        return manifest

    def where(self, expression: str | None = None, include_rejected: bool | None = None) -> Manifest:
        """Those of its rows that satisfy ``expression`` as well (see :mod:`manifests.where`).

        ``include_rejected``: also images that a filter of stage 1 rejected; None leaves that as it is. Raises
        :class:`UsageError` for a bad expression or unknown column, :class:`DataError` where nothing is left.
        """
        conditions = [*self._conditions, *([expression] if expression else [])]
        rejected = self._include_rejected if include_rejected is None else include_rejected
        selected = Manifest(self.file, conditions, rejected, self._base)
        _ = selected.rows
        return selected

    def take(self, indices: Sequence[int] | Integers | slice) -> Manifest:
        """Those of its rows at ``indices``, in that order."""
        taken = Manifest(self.file, self._conditions, self._include_rejected, self.rows[indices])
        taken.rows = self.rows[indices]
        return taken

    @cached_property
    def rows(self) -> Integers:
        """Numbers of the selected rows in the file."""
        rows = self.file.matching(self._conditions, self._include_rejected)
        if self._base is not None:
            rows = self._base[np.isin(self._base, rows)]
        if not len(rows) and (self._conditions or not self._include_rejected):
            some = self._conditions and not self._include_rejected
            among = f"{self.num_kept} kept rows" if some else f"{self.num_rows} rows"
            wanted = " and ".join(self._conditions) or "kept == True"
            raise DataError(f"{self.url}: none of its {among} satisfies {wanted!r}")
        return rows

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_kept(self) -> int:
        """Rows of the file that no filter of stage 1 rejected, selected or not."""
        return len(self.file.matching((), False))

    @property
    def digest(self) -> str:
        """:attr:`ManifestFile.digest`: of the whole file, whatever is selected."""
        return self.file.digest

    def column(self, name: str) -> npt.NDArray[Any] | list[Any]:
        """One column: a NumPy array for numbers and truth values without nulls (reals with nulls: NaN), else a list."""
        values = self.file.read_columns([name], self.rows)[name]
        kind = values.type
        exact = (pa.types.is_integer(kind) or pa.types.is_boolean(kind)) and not values.null_count
        if exact or pa.types.is_floating(kind):
            return np.asarray(values.combine_chunks().to_numpy(zero_copy_only=False))
        try:
            return [*values.to_pylist()]
        except UnicodeDecodeError:
            raise DataError(f"{self.url}: column {name!r} holds text that is not UTF-8") from None

    @cached_property
    def labels(self) -> Integers:
        """The target class of every row. Raises :class:`DataError` where one is none of the dataset's classes."""
        values = np.asarray(self.column("label"), np.int64)
        classes = len(self.info.class_names)
        if len(values) and not (values.min() >= 0 and values.max() < classes):
            found = f"labels reach from {values.min()} to {values.max()}"
            raise DataError(f"{self.url}: {found}, but its classes are {classes}")
        return values

    def row(self, index: int) -> Row:
        """Every column of one sample."""
        try:
            return self.file.row(int(self.rows[index]))
        except UnicodeDecodeError:
            raise DataError(f"{self.url}: row {int(self.rows[index])} holds text that is not UTF-8") from None

    def to_table(self) -> pa.Table:
        """All columns, as an Arrow table (``.to_pandas()`` makes a data frame of it)."""
        return self.file.read_columns(SCHEMA.names, self.rows)

    def pixels(self, indices: Sequence[int] | Integers) -> list[npt.NDArray[np.uint8]]:
        """uint8 ``[side, side, 3]`` of each of ``indices``, in that order.

        Raises :class:`DataError` naming a sample that is missing, altered, no image or not of the dataset's size.
        """
        images = []
        for index, data in zip(indices, self.read_many(indices), strict=True):
            try:
                images.append(decode(data, self.info.image_size))
            except ValueError as error:
                raise DataError(f"{self.url}: sample {self.row(int(index))['key']}: {error}") from None
        return images

    def images(self, n: int = 16) -> list[Image.Image]:
        """``n`` images, evenly spread over the selection; all of them where there are fewer."""
        return [Image.fromarray(image) for image in self.pixels(spread(np.arange(len(self)), n))]

    def dataset(self, transform: Callable[[Image.Image], Any] | None = None) -> ImageDataset:
        """The images with their labels for ``torch.utils.data.DataLoader``, each one checked as it is read."""
        return ImageDataset(self, transform)

    def __repr__(self) -> str:
        parts = [repr(self.url), self._size(), *(f"where {condition!r}" for condition in self._conditions)]
        return f"Manifest({', '.join(parts)})"

    def _size(self) -> str:
        try:
            return f"{len(self):,} of {self.num_rows:,} rows"
        except FactoryError:
            return f"none of {self.num_rows:,} rows"

    def _repr_html_(self) -> str:
        """What a notebook shows. Everything in it that comes from the file is bounded and escaped."""
        synth = self.info.recipe.get("synth")
        facts = {
            "manifest": self.url,
            "images": f"{self._size()}, {self.info.image_size} × {self.info.image_size} pixels",
            "where": " and ".join(self._conditions) or "kept",
            "classes": self._classes(),
            "method": synth.get("method", "") if isinstance(synth, dict) else "",
            "prior": _identity(self.info.prior, "pipeline", "name"),
            "teacher": _identity(self.info.teacher, "kind", "architecture"),
            "fingerprint": self.info.fingerprint[:12],
            "columns": ", ".join(SCHEMA.names),
        }
        cells = (f"<tr><th>{name}</th><td>{html.escape(str(fact)[:2000])}</td></tr>" for name, fact in facts.items())
        return f"<table>{''.join(cells)}</table>"

    def _classes(self, most: int = 20) -> str:
        names = unique_names(self.info.class_names)
        try:
            counts = np.bincount(self.labels, minlength=len(names))
        except FactoryError as error:
            return f"{len(names)}: {error}"
        some = [f"{names[label][:40]} ({counts[label]:,})" for label in np.flatnonzero(counts)]
        return f"{len(names)}: {', '.join(some[:most])}{', …' if len(some) > most else ''}"

    def read(self, index: int) -> bytes:
        """The stored image of one sample. Raises :class:`DataError` naming shard and key if it is not intact."""
        return self.read_many([index])[0]

    def read_many(self, indices: Sequence[int] | Integers, on_bad: OnBad | None = None) -> list[bytes]:
        """The images of ``indices``, in that order; with ``on_bad`` a bad one is reported to it and ``b""`` here."""
        wanted = np.asarray(indices, dtype=np.int64)
        images = [b""] * len(wanted)
        bad = self._read_runs(wanted, [*self._runs(wanted)], images, self.file.cache)
        if bad:  # by itself: a tar that was cut short still holds its first samples
            bad = self._read_runs(wanted, [np.array([position]) for position in sorted(bad)], images, None)
        for position in sorted(bad):
            error = DataError(f"{self.name(int(wanted[position]))} {bad[position]}")
            if on_bad is None:
                raise error
            on_bad(int(wanted[position]), error)
        return images

    def scan(
        self, order: Sequence[int] | Integers | None = None, on_bad: OnBad | None = None
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
        table = self.file.read_columns(["shard", "offset", "size", "xxh3"], self.rows)
        shard, offset, size = (table[name].to_numpy().astype(np.int64) for name in ("shard", "offset", "size"))
        if any(table[name].null_count for name in table.column_names):
            raise DataError(f"{self.url}: a place or checksum is missing")
        digests = table["xxh3"].chunks
        raw = b"".join(digest.buffers()[1][digest.offset * 16 :][: len(digest) * 16] for digest in digests)
        tars = self.info.tars
        numbers = np.array([tar.shard for tar in tars], dtype=np.int64)
        lengths = np.array([tar.bytes for tar in tars], dtype=np.int64)
        tar = np.minimum(np.searchsorted(numbers, shard), max(len(tars) - 1, 0))
        inside = numbers[tar] == shard if len(tars) else np.zeros(len(shard), bool)
        inside &= (offset >= 512) & (size > 0) & (size <= MAX_IMAGE)
        inside[inside] &= offset[inside] <= lengths[tar[inside]] - size[inside]
        return np.where(inside, tar, -1), offset, size, np.frombuffer(raw, np.uint8).reshape(-1, 16)

    @property
    def tars(self) -> Integers:
        """Number of each row's tar in ``info.tars``, −1 for a row that lies in none."""
        return self._places[0]

    @property
    def sizes(self) -> Integers:
        """Bytes of each row's stored image."""
        return self._places[2]

    def _runs(self, wanted: Integers) -> Iterator[Integers]:
        """Positions in ``wanted`` by place, cut where the next image is elsewhere, far away, or the run is long."""
        if not len(wanted):
            return
        tar, offset, size, _ = self._places
        order = np.lexsort((offset[wanted], tar[wanted]))
        rows = wanted[order]
        starts, ends, tars = offset[rows], offset[rows] + size[rows], tar[rows]
        cache = self.file.cache
        near = np.array([self.storage.is_local or (cache is not None and each in cache) for each in self.info.tars])
        gap = np.where(near[tars[:-1]] if len(near) else True, GAP_LOCAL, GAP_REMOTE)
        apart = (np.diff(tars) != 0) | (starts[1:] - ends[:-1] > gap) | (tars[1:] < 0)
        for piece in np.split(order, np.flatnonzero(apart) + 1):
            inside = wanted[piece]
            lots = (offset[inside] - offset[inside[0]]) // RUN
            yield from np.split(piece, np.flatnonzero(np.diff(lots)) + 1)

    def _read_runs(
        self, wanted: Integers, runs: list[Integers], images: list[bytes], cache: TarCache | None
    ) -> dict[int, str]:
        """Put each intact image of ``runs`` (positions in ``wanted``) into ``images``; why not, by position, of the
        others."""
        tars, offsets, sizes, digests = self._places
        bad: dict[int, str] = {}
        missing: list[tuple[Integers, Range]] = []

        def put(run: Integers, start: int, block: bytes) -> bool:
            for position in run.tolist():
                index = wanted[position]
                image = block[offsets[index] - start :][: sizes[index]]
                if xxhash.xxh3_128_digest(image) == digests[index].tobytes():
                    images[position] = image
                else:
                    bad[position] = "was altered (checksum differs)"
            return not any(position in bad for position in run.tolist())

        for run in runs:
            rows = wanted[run]
            tar, start, stop = int(tars[rows[0]]), int(offsets[rows[0]]), int((offsets[rows] + sizes[rows]).max())
            if tar < 0:
                bad |= dict.fromkeys(run.tolist(), "lies outside its tar")
                continue
            info = self.info.tars[tar]
            block = cache.read(info, start, stop - start) if cache else None
            if block is None:
                missing.append((run, Range(info.name, start, stop - start)))
            elif not put(run, start, block) and cache:
                cache.drop(info)
        for number, found in fetch(self.storage, [each for _, each in missing], self.file.patience):
            run, (_, start, _) = missing[number]
            if isinstance(found, DataError):
                bad |= dict.fromkeys(run.tolist(), f"cannot be read: {found}")
            else:
                put(run, start, found)
        return bad

    def name(self, index: int) -> str:
        """One sample as messages name it."""
        try:
            found = self.file.read_columns(["shard", "key"], self.rows[index : index + 1]).to_pylist()[0]
            return f"{self.url}: shard {found['shard']}, sample {found['key']!r}"
        except (FactoryError, UnicodeDecodeError):
            return f"{self.url}: row {int(self.rows[index])}"


@dataclass(frozen=True)
class ImageDataset:
    """A map-style dataset of ``(image, label)``, by duck type one of ``torch.utils.data``; workers may be forked or
    spawned.

    The image is an RGB ``PIL.Image``, or what ``transform`` makes of it. Raises DataError as :meth:`Manifest.pixels`.
    """

    manifest: Manifest
    transform: Callable[[Image.Image], Any] | None = None

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.__getitems__([range(len(self))[index]])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, int]]:
        """A batch at once, as PyTorch's loader fetches it: neighbors in a tar are one read."""
        images = map(Image.fromarray, self.manifest.pixels(indices))
        labels = self.manifest.labels[np.asarray(indices, np.int64)].tolist()
        return [
            (self.transform(image) if self.transform else image, label)
            for image, label in zip(images, labels, strict=True)
        ]


def _identity(facts: Mapping[str, Any], *names: str) -> str:
    """A prior or teacher in a few words."""
    words = [str(facts[name])[:80] for name in names if facts.get(name)]
    return " ".join([*words, f"sha256 {str(facts['sha256'])[:12]}"] if facts.get("sha256") else words)
