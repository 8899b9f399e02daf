"""Labeled images to evaluate on: WebDataset tars, class folders, Parquet, or a manifest, as samples one by one."""

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from manifests.checked_json import load_json
from manifests.dataset import DatasetInfo
from manifests.errors import DataError
from manifests.reader import Manifest
from manifests.schema import MAX_IMAGE, parquet_errors
from manifests.storage import Storage
from stages.distill.class_order import GrowingClassOrder, Label, class_order, read_label
from stages.distill.eval_files import (
    IMAGES,
    JUNK,
    LABEL_COLUMNS,
    DataFiles,
    LeftOut,
    find_files,
    is_image,
    place_of,
    reading,
)  # fmt: skip
from stages.distill.eval_tars import tar_images, tar_samples
from stages.settings import MAX_CLASSES

IMAGE_COLUMNS = ("image", "img", *IMAGES)
HUGGING_FACE = b"huggingface"
Sample = tuple[str, bytes, int]  # key, encoded image, class number of the model
ROWS_AT_ONCE = 16


@dataclass
class LabeledImages:
    """Samples of the data at ``where``, to go through once; ``class_order`` says in one line what labels mean.

    ``of_dataset``: whether stage 1 made them; other pictures are cropped as the model's input rule says. ``source``:
    what they lie in, for people; ``total``: their number, None where only the last one tells. While they are gone
    through, ``count`` and ``left_out`` grow, and ``digest``: sha256 of all labels and encoded images in order.
    """

    where: str
    class_order: str
    samples: Iterator[Sample]
    source: str
    left_out: LeftOut
    total: int | None = None
    of_dataset: bool = False
    count: int = 0
    digest: Any = field(default_factory=hashlib.sha256)

    def __iter__(self) -> Iterator[Sample]:
        for key, image, label in self.samples:
            self.digest.update(f"{label} {len(image)}\n".encode())
            self.digest.update(image)
            self.count += 1
            yield key, image, label
        if not self.count:
            raise DataError(f"{self.where} holds no labeled image" + self._left_out())

    @property
    def line(self) -> str:
        """How many images were gone through, and what was left out."""
        return f"{self.count:,} in {self.source}{self._left_out()}"

    def _left_out(self) -> str:
        line = self.left_out.line()
        return f"; left out: {line}" if line else ""


def labeled_images(data: str | Sequence[str], class_names: tuple[str, ...]) -> LabeledImages:
    """Everything at ``data`` (:func:`stages.distill.eval_files.find_files`) that a model of ``class_names`` can be
    scored on; labels are read as :mod:`stages.distill.class_order` says.

    Raises DataError naming what does not fit: here, or at the sample where a tar's labels do not.
    """
    files = find_files(data, class_names)
    read = {"manifest": _manifest, "folder": _folder, "tar": _tars, "parquet": _parquet}[files.kind]
    return read(files, class_names)


NO_LABEL = -1
WITHOUT = "labels play no part"


def unlabeled_images(data: str, class_names: tuple[str, ...]) -> LabeledImages:
    """Every image at ``data``, whatever its labels are, with :data:`NO_LABEL`; of a folder all that lie below it.

    Raises DataError for what holds none.
    """
    if "://" not in data and os.path.isdir(data) and any(is_image(name) for name in os.listdir(data)):
        return _all_below(data, LeftOut())
    files = find_files(data, class_names)
    if files.kind == "manifest":
        return _manifest(files, class_names)
    if files.kind == "folder":
        return _all_below(files.paths[0], files.left_out)
    if files.kind == "parquet":
        return _parquet(files, class_names, has_labels=False)

    def samples() -> Iterator[Sample]:
        for path in files.paths:
            yield from ((key, image, NO_LABEL) for key, image in tar_images(*place_of(path), files))

    return LabeledImages(files.where, WITHOUT, samples(), files.count, files.left_out)


def _all_below(folder: str, left_out: LeftOut) -> LabeledImages:
    files = [*_images_below(folder, left_out)]
    samples = ((os.path.relpath(file, folder), _read_file(file), NO_LABEL) for file in files)
    return LabeledImages(folder, WITHOUT, samples, "a folder", left_out, len(files))


def _manifest(files: DataFiles, class_names: tuple[str, ...]) -> LabeledImages:
    _refuse_columns(files)
    url, left_out = files.paths[0], LeftOut()
    rows = Manifest.open(url)
    keys, labels = rows.column("key"), rows.column("label")
    places = _first_places((int(label), f"row {key}") for key, label in zip(keys, labels, strict=True))
    order = class_order(places, class_names, url, listed=rows.info.class_names)
    samples = ((keys[index], image, order.index[int(labels[index])]) for index, image in rows.scan())
    if rejected := rows.num_rows - len(rows):
        left_out.add("images that stage 1 rejected", "image that stage 1 rejected", rejected)
    return LabeledImages(url, order.line, samples, "a manifest", left_out, len(rows), of_dataset=True)


def _refuse_columns(files: DataFiles) -> None:
    if name := files.label or files.image:
        raise DataError(f"{files.where} has no columns to name: leave @…={name} out")


def _first_places(labels: Iterable[tuple[Label, str]]) -> dict[Label, str]:
    """Every distinct label, with the first place that has it."""
    places: dict[Label, str] = {}
    for label, place in labels:
        if label not in places:
            if len(places) >= MAX_CLASSES:
                raise DataError(f"{place}: more than {MAX_CLASSES} different labels")
            places[label] = place
    return places


# Folders: one sub-folder a class, with all that lies below it, as torchvision's ImageFolder reads them.


def _folder(files: DataFiles, class_names: tuple[str, ...]) -> LabeledImages:
    _refuse_columns(files)
    path, left_out = files.paths[0], files.left_out
    entries = dict(_entries(path, left_out))
    classes = [name for name, is_folder in entries.items() if is_folder]
    for name in sorted(entries.keys() - classes):
        left_out.add("images beside the folders", f"image beside the folders ({name})")
    order = class_order({name: f"sub-folder {name}" for name in classes}, class_names, path, folders=True)
    images = [(name, file) for name in classes for file in _images_below(f"{path}/{name}", left_out)]
    filled = {name for name, _ in images}
    empty = [name for name in classes if name not in filled]
    source = f"{len(filled)} folders" if len(filled) > 1 else "1 folder"
    if empty:
        source += f" ({len(empty)} without an image: {', '.join(empty[:3])}{', …' if len(empty) > 3 else ''})"
    samples = ((os.path.relpath(file, path), _read_file(file), order.index[name]) for name, file in images)
    return LabeledImages(path, order.line, samples, source, left_out, len(images))


def _entries(folder: str, left_out: LeftOut) -> Iterator[tuple[str, bool]]:
    """Images, and whether each is a folder instead; what is neither is counted."""
    with reading(folder), os.scandir(folder) as entries:
        found = sorted((entry.name, entry.is_dir()) for entry in entries)
    for name, is_folder in found:
        if is_folder and (name.startswith(".") or name in JUNK):
            left_out.add("hidden folders", f"hidden folder {name}")
        elif is_folder or is_image(name):
            yield name, is_folder
        else:
            left_out.add_file(name)


def _images_below(folder: str, left_out: LeftOut) -> Iterator[str]:
    """Paths of all images, each one a regular file of bounded size that may be read. A folder that links name again is
    read once."""
    waiting, seen = [folder], set[tuple[int, int]]()
    while waiting:
        here = waiting.pop()
        with reading(here):
            place = os.stat(here)
        if (place.st_dev, place.st_ino) in seen:
            left_out.add("folders linked again", f"folder linked again {os.path.basename(here)}")
            continue
        seen.add((place.st_dev, place.st_ino))
        below = []
        for name, is_folder in _entries(here, left_out):
            path = f"{here}/{name}"
            if is_folder:
                below.append(path)
                continue
            with reading(path):
                _check_file(os.stat(path), path)
            if not os.access(path, os.R_OK):
                raise DataError(f"cannot read {path}: Permission denied")
            yield path
        waiting += reversed(below)


def _check_file(found: os.stat_result, path: str) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise DataError(f"cannot read {path}: it is no regular file")
    if found.st_size > MAX_IMAGE:
        raise DataError(f"{path} has {found.st_size} bytes, and an image at most {MAX_IMAGE}")


def _read_file(path: str) -> bytes:
    with reading(path), open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # a FIFO is not waited for
        _check_file(os.fstat(file.fileno()), path)
        return file.read(MAX_IMAGE + 1)


# Tars: read once, sample by sample.


def _tars(files: DataFiles, class_names: tuple[str, ...]) -> LabeledImages:
    """The first sample settles what labels mean, and the others must agree."""
    order = GrowingClassOrder(class_names, files.where)
    used: Counter[str] = Counter()  # the extensions that held labels
    seen = set[int]()

    def samples() -> Iterator[Sample]:
        for path in files.paths:
            storage, name = place_of(path)
            for sample in tar_samples(storage, name, files):
                used[sample.source] += 1
                of = f" of {storage.path(name)}" if len(files.paths) > 1 else ""
                number = order.add(sample.label, f"sample {sample.key!r}{of}")
                seen.add(number)
                yield sample.key, sample.image, number
        if not files.label and used.total() == used["index"] + used["id"] == len(seen) > 2:
            kind = next(iter(used))
            raise DataError(
                f"{files.where}: KEY.{kind} is another number in every sample, so it may count them; if it is the "
                f"label, write @label={kind} after the path"
            )

    walk = samples()
    first = list(islice(walk, 1))
    source = f"{files.count} (labels: {', '.join(f'.{kind}' for kind in used)})"
    return LabeledImages(files.where, order.line, chain(first, walk), source, files.left_out)


# Parquet, as Hugging Face datasets and others write it.


@dataclass(frozen=True)
class _Table:
    """One Parquet file, and where its images and labels are."""

    storage: Storage
    name: str
    image: str
    label: str | None
    class_names: tuple[str, ...]
    has_key: bool
    rows: int

    @property
    def where(self) -> str:
        return self.storage.path(self.name)

    def batches(self, *columns: str) -> Iterator[pa.RecordBatch]:
        with self.storage.open(self.name) as stream, parquet_errors(self.where):
            file = pq.ParquetFile(stream)
            yield from file.iter_batches(batch_size=_rows_at_once(file.metadata, columns), columns=[*columns])

    def labels(self) -> Iterator[tuple[Label, str]]:
        assert self.label is not None
        row = 0
        for batch in self.batches(self.label):
            for value in batch.column(0).to_pylist():
                yield self.read_label(value, row), f"row {row}"
                row += 1

    def read_label(self, value: Any, row: int) -> Label:
        try:
            return read_label(value)
        except ValueError as error:
            raise DataError(f"{self.where}: row {row}: {error}") from None

    def samples(self, index: Callable[[Label], int]) -> Iterator[Sample]:
        columns = (self.image, *([self.label] if self.label else []), *(["key"] if self.has_key else []))
        row = 0
        for batch in self.batches(*columns):
            for values in batch.to_pylist():
                image = _image_bytes(values[self.image], f"{self.where}: row {row}")
                label = index(self.read_label(values[self.label], row)) if self.label else NO_LABEL
                yield str(values.get("key", row)), image, label
                row += 1


def _rows_at_once(metadata: pq.FileMetaData, columns: Sequence[str]) -> int:
    """As many rows as may be spelled out together: each may be the longest text or image of a dictionary, again."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    chunks = (group.column(number) for group in groups for number in range(group.num_columns))
    largest = [
        chunk.total_uncompressed_size
        for chunk in chunks
        if chunk.has_dictionary_page and chunk.path_in_schema.partition(".")[0] in columns
    ]
    return max(1, min(ROWS_AT_ONCE, 4 * MAX_IMAGE // max(1, *largest, 0)))


def _parquet(files: DataFiles, class_names: tuple[str, ...], has_labels: bool = True) -> LabeledImages:
    first, *_ = files.paths
    if len(files.paths) == 1 and (manifest := _as_manifest(first)):
        return _manifest(replace(files, paths=(manifest,)), class_names)
    tables = [_table(path, files.image, files.label, has_labels) for path in files.paths]
    rows = sum(table.rows for table in tables)
    if not has_labels:
        unlabeled = chain.from_iterable(table.samples(lambda label: NO_LABEL) for table in tables)
        return LabeledImages(files.where, WITHOUT, unlabeled, files.count, files.left_out, rows)
    for table in tables:
        if table.class_names != tables[0].class_names:
            raise DataError(f"{table.where} and {tables[0].where} name their classes differently")
    labels = chain.from_iterable(table.labels() for table in tables)
    where = tables[0].where if len(tables) == 1 else files.where
    order = class_order(_first_places(labels), class_names, where, tables[0].class_names)
    samples = chain.from_iterable(table.samples(order.index.__getitem__) for table in tables)
    source = f"{files.count} (image: {tables[0].image}, label: {tables[0].label})"
    return LabeledImages(where, order.line, samples, source, files.left_out, rows)


@contextmanager
def _opened(path: str) -> Iterator[tuple[Storage, str, pq.ParquetFile]]:
    storage, name = place_of(path)
    with storage.open(name) as stream, parquet_errors(storage.path(name)):
        yield storage, name, pq.ParquetFile(stream)


def _as_manifest(path: str) -> str | None:
    """The URL of a dataset's manifest; None for any other Parquet file."""
    with _opened(path) as (storage, name, file):
        try:
            DatasetInfo.from_metadata(file.metadata.metadata, path)
        except DataError:
            return None
        return storage.path(name)


def _table(path: str, image: str | None, label: str | None, has_labels: bool = True) -> _Table:
    with _opened(path) as (storage, name, file):
        schema, features = file.schema_arrow, _features(file)
        image = image or _column(schema, features, IMAGE_COLUMNS, "Image") or ""
        label = (label or _column(schema, features, LABEL_COLUMNS, "ClassLabel") or "") if has_labels else None
        if image not in schema.names or (has_labels and label not in schema.names):
            raise DataError(
                f"{path} needs an image column ({', '.join(IMAGE_COLUMNS[:3])} …) and a label column "
                f"({', '.join(LABEL_COLUMNS)}); it has {', '.join(schema.names)}: name them with "
                f"{os.path.basename(path)}@image=COLUMN,label=COLUMN"
            )
        names = features.get(label or "", {}).get("names")
        listed = tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else ()
        return _Table(storage, name, image, label, listed, "key" in schema.names, file.metadata.num_rows)


def _column(schema: pa.Schema, features: dict[str, dict[str, Any]], known: Sequence[str], kind: str) -> str | None:
    """The first column of a ``known`` name, else the only one that Hugging Face's schema calls ``kind``."""
    of_kind = [name for name, feature in features.items() if feature.get("_type") == kind and name in schema.names]
    return next((name for name in known if name in schema.names), of_kind[0] if len(of_kind) == 1 else None)


def _features(file: pq.ParquetFile) -> dict[str, dict[str, Any]]:
    """The schema that Hugging Face datasets keep beside the columns; {} without."""
    try:
        features = load_json((file.schema_arrow.metadata or {})[HUGGING_FACE])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _image_bytes(value: Any, where: str) -> bytes:
    data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if isinstance(data, bytes):
        if len(data) > MAX_IMAGE:
            raise DataError(f"{where} has an image of {len(data)} bytes, and an image has at most {MAX_IMAGE}")
        return data
    if isinstance(text := path or data, str):
        raise DataError(
            f"{where} holds a path ({text[:80]!r}), not an image: write the images' bytes, or give their folder"
        )
    raise DataError(f"{where} holds {'nothing' if data is None else type(data).__name__}, expected an encoded image")
