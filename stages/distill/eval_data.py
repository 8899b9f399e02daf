"""Labeled images to evaluate on: a WebDataset tar, an image folder, a Parquet table, or a manifest."""

import hashlib
import os
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from manifests.checked_json import load_json
from manifests.dataset import DatasetInfo
from manifests.errors import DataError
from manifests.reader import Manifest
from manifests.schema import MAX_IMAGE, parquet_errors
from manifests.storage import Storage, split
from stages.distill.class_order import GrowingClassOrder, Label, NamedNumber, class_order, read_label, read_text_label
from stages.settings import MAX_CLASSES

IMAGES = ("png", "jpg", "jpeg", "webp", "bmp")
IMAGE_COLUMNS = (*IMAGES, "image", "img")
LABEL_COLUMNS = ("label", "cls", "labels", "fine_label")
NAME_FIELD = "class_name"  # beside the label in KEY.json of a dataset's shards
HUGGING_FACE = b"huggingface"
Sample = tuple[str, bytes, int]  # key, encoded image, class number of the model
ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class LabeledImages:
    """Samples of the data at ``where``, to go through once; ``class_order`` says in one line what labels mean.

    ``of_dataset``: whether stage 1 made them; other pictures are cropped as the model's input rule says.
    ``digest``: sha256 of all labels and encoded images that were gone through, in their order.
    """

    where: str
    class_order: str
    samples: Iterator[Sample]
    of_dataset: bool = False
    digest: Any = field(default_factory=hashlib.sha256, compare=False)

    def __iter__(self) -> Iterator[Sample]:
        for key, image, label in self.samples:
            self.digest.update(f"{label} {len(image)}\n".encode())
            self.digest.update(image)
            yield key, image, label


def labeled_images(path: str, class_names: tuple[str, ...]) -> LabeledImages:
    """Everything at ``path`` that a model of ``class_names`` can be scored on; labels are read as
    :mod:`stages.distill.class_order` says.

    Raises DataError naming what does not fit: here, or at the sample where a tar's labels do not.
    """
    if "://" not in path and os.path.isdir(path):
        if os.path.isfile(f"{path}/m.parquet"):
            return _manifest(f"{path}/m.parquet", class_names)
        return _folder(path, class_names)
    name = split(path)[1]
    storage, file = split(path if "://" in path else os.path.realpath(path))  # a hub's cache holds links
    if name.endswith(".tar"):
        return _tar_file(storage, file, class_names)
    if name.endswith(".parquet"):
        return _parquet(storage, file, class_names)
    raise DataError(f"{path} is no .tar, .parquet or folder of images")


def _manifest(url: str, class_names: tuple[str, ...]) -> LabeledImages:
    rows = Manifest.open(url)
    keys, labels = rows.column("key"), rows.column("label")
    places = _first_places((int(label), f"row {key}") for key, label in zip(keys, labels, strict=True))
    order = class_order(places, class_names, url, listed=rows.info.class_names)
    samples = ((keys[index], image, order.index[int(labels[index])]) for index, image in rows.scan())
    return LabeledImages(url, order.line, samples, of_dataset=True)


def _folder(path: str, class_names: tuple[str, ...]) -> LabeledImages:
    """One sub-folder a class. Folders whose names begin with a dot are left out, and every file can be opened."""

    def samples() -> Iterator[Sample]:
        for name, file in files:
            with _reading(path):
                image = file.read_bytes()
            yield f"{name}/{file.name}", image, order.index[name]

    with _reading(path):
        folders = sorted(f for f in Path(path).iterdir() if f.is_dir() and not f.name.startswith("."))
        names = {folder.name: f"sub-folder {folder.name}" for folder in folders}
        order = class_order(names, class_names, path, folders=True)
        files = [(d.name, f) for d in folders for f in sorted(d.iterdir()) if f.suffix.lower()[1:] in IMAGES]
        for _, file in files:
            with file.open("rb"):
                pass
    return LabeledImages(path, order.line, samples())


@contextmanager
def _reading(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot read {error.filename or path}: {error.strerror}") from None


def _first_places(labels: Iterable[tuple[Label, str]]) -> dict[Label, str]:
    """Every distinct label, with the first place that has it."""
    places: dict[Label, str] = {}
    for label, place in labels:
        if label not in places:
            if len(places) >= MAX_CLASSES:
                raise DataError(f"{place}: more than {MAX_CLASSES} different labels")
            places[label] = place
    return places


def _tar_file(storage: Storage, name: str, class_names: tuple[str, ...]) -> LabeledImages:
    """A tar is read once: its first sample settles what labels mean, and the others must agree."""
    where = storage.path(name)
    order = GrowingClassOrder(class_names, where)
    samples = ((key, image, order.add(label, f"sample {key!r}")) for key, image, label in _tar(storage, name))
    first = list(islice(samples, 1))
    return LabeledImages(where, order.line, chain(first, samples))


def _tar(storage: Storage, name: str) -> Iterator[tuple[str, bytes, Label | NamedNumber]]:
    """KEY.png (jpg, …) beside KEY.cls, KEY.json with a label, or KEY.txt; members of one key are neighbors."""
    key, parts = "", dict[str, bytes]()
    try:
        with storage.open(name) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in tar:
                if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                    continue  # links, devices and sparse files hold nothing to read
                if not 0 <= member.size <= MAX_IMAGE:
                    raise DataError(f"{storage.path(name)}: {member.name[:80]!r} claims {member.size} bytes")
                stem, _, extension = os.path.basename(member.name).partition(".")
                path = os.path.join(os.path.dirname(member.name), stem)
                if path != key and parts:
                    yield _tar_sample(storage.path(name), key, parts)
                    parts = {}
                key = path
                content = tar.extractfile(member)
                assert content is not None
                parts[extension.lower()] = content.read()
    except (tarfile.TarError, ValueError, EOFError, OverflowError) as error:
        raise DataError(f"{storage.path(name)} is damaged or no tar: {error}") from None
    if parts:
        yield _tar_sample(storage.path(name), key, parts)


def _tar_sample(where: str, key: str, parts: dict[str, bytes]) -> tuple[str, bytes, Label | NamedNumber]:
    image = next((parts[kind] for kind in IMAGES if kind in parts), None)
    try:
        label = _tar_label(parts)
    except (KeyError, ValueError, TypeError) as error:
        expected = "a number or a class name in KEY.cls or KEY.txt, or label in KEY.json"
        why = f" ({error})" if isinstance(error, ValueError) else ""
        raise DataError(f"{where}: sample {key!r} has no label: {expected}{why}") from None
    if image is None:
        raise DataError(f"{where}: sample {key!r} has no image ({', '.join(IMAGES)})")
    return key, image, label


def _tar_label(parts: dict[str, bytes]) -> Label | NamedNumber:
    if "cls" in parts:
        return read_text_label(parts["cls"])
    if "json" not in parts:
        return read_text_label(parts["txt"])
    values = load_json(parts["json"])
    label, name = read_label(values["label"]), values.get(NAME_FIELD)
    return NamedNumber(label, name) if isinstance(label, int) and isinstance(name, str) else label


def _parquet(storage: Storage, name: str, class_names: tuple[str, ...]) -> LabeledImages:
    where = storage.path(name)
    with storage.open(name) as stream, parquet_errors(where):
        file = pq.ParquetFile(stream)
        if _is_manifest(file, where):
            return _manifest(where, class_names)
        columns = file.schema_arrow.names
        image = next((c for c in IMAGE_COLUMNS if c in columns), None)
        label = next((c for c in LABEL_COLUMNS if c in columns), None)
        if image is None or label is None:
            needed = f"an image column ({', '.join(IMAGE_COLUMNS)}) and a label column ({', '.join(LABEL_COLUMNS)})"
            raise DataError(f"{where} needs {needed}; it has {', '.join(columns)}")
        groups = file.iter_batches(batch_size=ROWS_AT_ONCE, columns=[label])
        values = enumerate(value for group in groups for value in group.column(0).to_pylist())
        places = _first_places((_row_label(value, where, row), f"row {row}") for row, value in values)
        order = class_order(places, class_names, where, _class_label_names(file, label))

    def samples() -> Iterator[Sample]:
        needed = [image, label, *(["key"] if "key" in columns else [])]
        number = 0
        with storage.open(name) as stream, parquet_errors(where):
            for group in pq.ParquetFile(stream).iter_batches(batch_size=ROWS_AT_ONCE, columns=needed):
                for row in group.to_pylist():
                    index = order.index[_row_label(row[label], where, number)]
                    yield str(row.get("key", number)), _bytes(row[image]), index
                    number += 1

    return LabeledImages(where, order.line, samples())


def _class_label_names(file: pq.ParquetFile, column: str) -> tuple[str, ...]:
    """The names of a ``ClassLabel`` in the schema that Hugging Face datasets keep beside the columns; () without."""
    try:
        values = load_json((file.schema_arrow.metadata or {})[HUGGING_FACE])
        names = values["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError):
        return ()
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else ()


def _is_manifest(file: pq.ParquetFile, where: str) -> bool:
    try:
        DatasetInfo.from_metadata(file.metadata.metadata, where)
    except DataError:
        return False
    return True


def _bytes(value: Any) -> bytes:
    data = value.get("bytes") if isinstance(value, dict) else value  # Hugging Face stores {bytes, path}
    return data if isinstance(data, bytes) else b""


def _row_label(value: Any, where: str, row: int) -> Label:
    try:
        return read_label(value)
    except ValueError as error:
        raise DataError(f"{where}: row {row}: {error}") from None
