"""Labelled images to evaluate on: a WebDataset tar, an image folder, a Parquet table, or a manifest of ours."""

import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from manifests.errors import DataError
from manifests.info import DatasetInfo
from manifests.reader import Manifest
from manifests.schema import MAX_IMAGE, load_json
from manifests.storage import Storage, split
from manifests.tables import parquet_errors

IMAGES = ("png", "jpg", "jpeg", "webp", "bmp")
IMAGE_COLUMNS = (*IMAGES, "image", "img")
LABEL_COLUMNS = ("label", "cls", "labels", "fine_label")
Sample = tuple[str, bytes, int]  # key, encoded image, label
ROWS_AT_ONCE = 64


def labelled_images(path: str, class_names: Sequence[str]) -> Iterator[Sample]:
    """(key, encoded image, label) of everything at ``path``. Raises DataError naming what does not fit."""
    if "://" not in path and os.path.isdir(path):
        yield from _manifest(f"{path}/m.parquet") if os.path.isfile(f"{path}/m.parquet") else _folder(path, class_names)
        return
    name = split(path)[1]
    storage, file = split(path if "://" in path else os.path.realpath(path))  # a hub's cache holds links
    if name.endswith(".tar"):
        yield from _tar(storage, file)
    elif name.endswith(".parquet"):
        yield from _parquet(storage, file)
    else:
        raise DataError(f"{path} is no .tar, .parquet or folder of images")


def _manifest(url: str) -> Iterator[Sample]:
    rows = Manifest.open(url).select()
    keys, labels = rows.column("key"), rows.column("label")
    for index, image in rows.scan():
        yield keys[index], image, int(labels[index])


def _folder(path: str, class_names: Sequence[str]) -> Iterator[Sample]:
    """One sub-folder a class: named as the model's classes are, or one for each, numbered by their sorted names.

    Folders whose names begin with a dot are left out. Raises DataError where only some are named as classes are, or
    none is and their number is another, or a file cannot be read: before the first image where that shows.
    """
    try:
        for key, file, label in _files(path, class_names):
            yield key, file.read_bytes(), label
    except OSError as error:
        raise DataError(f"cannot read {error.filename or path}: {error.strerror}") from None


def _files(path: str, class_names: Sequence[str]) -> list[tuple[str, Path, int]]:
    """(key, file, label) of every image; each can be opened."""
    folders = sorted(f for f in Path(path).iterdir() if f.is_dir() and not f.name.startswith("."))
    known = {name: number for number, name in enumerate(class_names)}
    unknown = [folder.name for folder in folders if folder.name not in known]
    if unknown and len(unknown) < len(folders):
        raise DataError(f"{path} has sub-folders that are no class ({_some(class_names)}): {_some(unknown)}")
    if unknown and len(folders) != len(class_names):
        wanted = f"the model's {len(class_names)} classes ({_some(class_names)}), or one for each in their order"
        raise DataError(f"{path} has {len(folders)} sub-folders ({_some(unknown)}); expected some named as {wanted}")
    files = [
        (f"{folder.name}/{file.name}", file, known.get(folder.name, order))
        for order, folder in enumerate(folders)
        for file in sorted(folder.iterdir())
        if file.suffix.lower()[1:] in IMAGES
    ]
    for _, file, _ in files:
        with file.open("rb"):
            pass
    return files


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _tar(storage: Storage, name: str) -> Iterator[Sample]:
    """KEY.png (jpg, …) beside KEY.cls (a number) or KEY.json with a label; members of one key are neighbours."""
    key, parts = "", dict[str, bytes]()
    try:
        with storage.open(name) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in tar:
                if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                    continue  # links, devices and sparse files hold nothing to read
                if not 0 <= member.size <= MAX_IMAGE:
                    raise DataError(f"{storage.path(name)}: {member.name[:80]!r} claims {member.size} bytes")
                stem, _, extension = os.path.basename(member.name).partition(".")
                found = os.path.join(os.path.dirname(member.name), stem)
                if found != key and parts:
                    yield _tar_sample(storage.path(name), key, parts)
                    parts = {}
                key = found
                content = tar.extractfile(member)
                assert content is not None
                parts[extension.lower()] = content.read()
    except (tarfile.TarError, ValueError, EOFError, OverflowError) as error:
        raise DataError(f"{storage.path(name)} is damaged or no tar: {error}") from None
    if parts:
        yield _tar_sample(storage.path(name), key, parts)


def _tar_sample(where: str, key: str, parts: dict[str, bytes]) -> Sample:
    image = next((parts[kind] for kind in IMAGES if kind in parts), None)
    try:
        label = int(parts["cls"]) if "cls" in parts else int(load_json(parts["json"])["label"])
    except (KeyError, ValueError, TypeError, OverflowError):
        raise DataError(f"{where}: sample {key!r} has no label: a number in KEY.cls, or label in KEY.json") from None
    if image is None:
        raise DataError(f"{where}: sample {key!r} has no image ({', '.join(IMAGES)})")
    return key, image, label


def _parquet(storage: Storage, name: str) -> Iterator[Sample]:
    where = storage.path(name)
    with storage.open(name) as stream, parquet_errors(where):
        file = pq.ParquetFile(stream)
        if _ours(file, where):
            yield from _manifest(where)
            return
        columns = file.schema_arrow.names
        image = next((c for c in IMAGE_COLUMNS if c in columns), None)
        label = next((c for c in LABEL_COLUMNS if c in columns), None)
        if image is None or label is None:
            wanted = f"an image column ({', '.join(IMAGE_COLUMNS)}) and a label column ({', '.join(LABEL_COLUMNS)})"
            raise DataError(f"{where} needs {wanted}; it has {', '.join(columns)}")
        wanted_columns = [image, label, *(["key"] if "key" in columns else [])]
        number = 0
        for group in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=wanted_columns):
            for row in group.to_pylist():
                yield str(row.get("key", number)), _bytes(row[image]), _label(row[label], where, number)
                number += 1


def _ours(file: pq.ParquetFile, where: str) -> bool:
    try:
        DatasetInfo.from_metadata(file.metadata.metadata, where)
    except DataError:
        return False
    return True


def _bytes(value: Any) -> bytes:
    found = value.get("bytes") if isinstance(value, dict) else value  # Hugging Face stores {bytes, path}
    return found if isinstance(found, bytes) else b""


def _label(value: Any, where: str, row: int) -> int:
    if not isinstance(value, int):
        raise DataError(f"{where}: row {row}: label {value!r} is no integer")
    return value
