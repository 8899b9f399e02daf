"""Which files are labeled data: from what a user wrote (a path, a pattern, several) to tars, Parquet or class folders.

Nothing below such a folder is left out without being counted (:class:`LeftOut`).
"""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from itertools import islice
from math import prod
from typing import Literal

from manifests.errors import DataError
from manifests.schema import EXTENSIONS
from manifests.storage import Storage, split
from stages.distill.class_order import classes_called

IMAGES = (*EXTENSIONS, "jpeg", "jfif", "jpe", "bmp", "dib", "tif", "tiff", "ppm", "pgm", "pbm", "pnm", "gif")
"""Extensions of images: torchvision's IMG_EXTENSIONS and a few more of the same formats."""
LABEL_COLUMNS = ("label", "cls", "labels", "class", "target", "category", "fine_label")
TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2")
Kind = Literal["manifest", "folder", "tar", "parquet"]
MANIFEST = "m.parquet"
SPLITS = frozenset(("train", "training", "val", "valid", "validation", "test", "testing", "eval", "dev"))
JUNK = frozenset({"__MACOSX", "Thumbs.db", "desktop.ini"})
"""What Windows and archives made on a Mac leave beside images."""
MOST_KINDS = 1000
"""Kinds of files that are counted apart."""
NESTED = 4
"""Folders with one sub-folder that are gone through on the way to the data."""
MAX_PARTS = 100_000
_RANGE = re.compile(r"\{(-?\d{1,18})\.\.(-?\d{1,18})", re.ASCII)
_COLUMNS = re.compile(r"(.+)@((?:image|label)=[^@,=]+(?:,(?:image|label)=[^@,=]+)?)")
_INSTEAD = {
    "arrow": "written by datasets' save_to_disk: load_from_disk(FOLDER).to_parquet(FILE) makes Parquet of it",
    "zip": "unpack it",
    "xz": "compress it with gzip, or not at all",
    "zst": "compress it with gzip, or not at all",
    "npz": "NumPy arrays are not read: write one folder of images for each class, a WebDataset tar or Parquet",
    "npy": "NumPy arrays are not read: write one folder of images for each class, a WebDataset tar or Parquet",
    "pkl": "pickles are never loaded: write one folder of images for each class, a WebDataset tar or Parquet",
    "h5": "HDF5 is not read: write one folder of images for each class, a WebDataset tar or Parquet",
    "tfrecord": "TFRecord is not read: write one folder of images for each class, a WebDataset tar or Parquet",
}
_EXPECTED = "expected a .tar, .tar.gz, .parquet, or a folder with one sub-folder of images for each class"


class LeftOut:
    """What was not read as an image, counted by kind."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add(self, kind: str, name: str, count: int = 1) -> None:
        """More of ``kind`` (``hidden files``); ``name`` is what the only one is called."""
        kind = kind[:80] if kind in self._counts or len(self._counts) < MOST_KINDS else "other files"
        self._counts[kind] += count
        self._first.setdefault(kind, name[:80])

    def add_file(self, path: str) -> None:
        """A file that is no image, by its extension."""
        name = os.path.basename(path)
        if name.startswith("."):
            return self.add("hidden files", f"hidden file {name}")
        if name in JUNK:
            return self.add(name, name)
        extension = name.rpartition(".")[2] if "." in name else ""
        return self.add(f"*.{extension}" if extension else name, name)

    def line(self, most: int = 6) -> str:
        """``3 hidden files, 1 README.md``; "" where nothing was left out."""
        parts = [f"{n:,} {kind if n > 1 else self._first[kind][:80]}" for kind, n in self._counts.most_common(most)]
        rest = sum(n for _, n in self._counts.most_common()[most:])
        return ", ".join([*parts, *([f"{rest:,} other files"] if rest else [])])


@dataclass(frozen=True)
class DataFiles:
    """Labeled data of one ``kind``: ``paths`` are files, or the one folder or manifest. ``where``: as errors name it.

    ``image``, ``label``: the columns (in tars: the extension, or key of KEY.json) that the user named, if any.
    """

    where: str
    kind: Kind
    paths: tuple[str, ...]
    image: str | None = None
    label: str | None = None
    left_out: LeftOut = field(default_factory=LeftOut)

    @property
    def count(self) -> str:
        """``2 tars``, ``1 of 2 Parquet files``: as their names (``…-00000-of-00002.parquet``) say."""
        one, more = ("tar", "tars") if self.kind == "tar" else ("Parquet file", "Parquet files")
        stems = {match[1]: int(match[2]) for path in self.paths if (match := re.search(r"(.*)-\d+-of-(\d+)\b", path))}
        of, here = sum(stems.values()), len(self.paths)
        return f"{here} of {of} {more}" if of > here else f"{here} {one if here == 1 else more}"


def find_files(data: str | Sequence[str], class_names: tuple[str, ...]) -> DataFiles:
    """The files of ``data``: a path or URL, a pattern (``a-{000..003}.tar``, ``test-*.parquet``), or several.

    ``@image=COLUMN,label=COLUMN`` at the end names columns. Raises DataError naming what is no labeled data.
    """
    texts = [data] if isinstance(data, str) else [*data]
    paths: list[str] = []
    columns: dict[str, str] = {}
    for text in texts:
        path, named = text, ""
        if not os.path.exists(text) and (match := _COLUMNS.fullmatch(text)):
            path, named = match[1], match[2]
        columns |= dict(re.findall("(image|label)=([^,]+)", named))
        paths += _expanded(path)
    where = texts[0] if len(texts) == 1 else f"{texts[0]} and {len(texts) - 1} more"
    if len(paths) == 1 and kind_of(paths[0]) is None:
        return _in_folder(paths[0], class_names, columns)
    kinds = {kind_of(path): path for path in paths}
    if None in kinds:
        folder = "://" not in kinds[None] and os.path.isdir(kinds[None])
        raise DataError(f"{where}: several folders are no one data set" if folder else _no_data(kinds[None]))
    if len(kinds) > 1:
        raise DataError(f"{where}: tars and Parquet files do not mix ({', '.join(kinds.values())}): name one kind")
    kind = kind_of(paths[0])
    assert kind is not None
    return DataFiles(where, kind, tuple(paths), columns.get("image"), columns.get("label"))


def kind_of(path: str) -> Literal["tar", "parquet"] | None:
    """What a file's name says that it is; None for anything else, and for a folder."""
    name = path.lower()
    if "://" not in path and os.path.isdir(path):
        return None
    return "tar" if name.endswith(TARS) else "parquet" if name.endswith(".parquet") else None


def is_image(name: str) -> bool:
    return name.rpartition(".")[2].lower() in IMAGES and not name.startswith(".")


def place_of(path: str) -> tuple[Storage, str]:
    """A file's folder and name; a local link is followed, since a hub's cache holds links."""
    return split(path if "://" in path else os.path.realpath(path))


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Failures of the file system as one line."""
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot read {error.filename or path}: {error.strerror}") from None


def _expanded(path: str) -> list[str]:
    """Braces and wildcards as a shell and webdataset expand them; a path that exists is meant as it is."""
    local = "://" not in path
    if local and os.path.exists(path):
        return [path]
    if "{" in path:
        from braceexpand import braceexpand

        try:
            count = prod(abs(int(last) - int(first)) + 1 for first, last in _RANGE.findall(path))
            # braceexpand spells a range out before it yields anything
            parts = [*islice(braceexpand(path, escape=False), MAX_PARTS + 1)] if count <= MAX_PARTS else []
            if count > MAX_PARTS or len(parts) > MAX_PARTS:
                raise DataError(f"{path} stands for more than {MAX_PARTS:,} files")
            return [each for part in parts for each in _expanded(part)]
        except ValueError as error:
            raise DataError(f"{path}: {error}") from None
    if not any(mark in path for mark in "*?["):
        return [path]
    if local:
        found = sorted(glob.glob(path))
    else:
        folder, _, pattern = path.rpartition("/")
        found = [f"{folder}/{name}" for name in Storage(folder).list("") if fnmatch(name, pattern)]
    if not found:
        raise DataError(f"{path}: no such file")
    return found


def _in_folder(path: str, class_names: tuple[str, ...], columns: dict[str, str], depth: int = 0) -> DataFiles:
    if "://" in path:
        files, folders = Storage(path).list(""), []
    else:
        if not os.path.isdir(path):
            raise DataError(_no_data(path))
        with reading(path), os.scandir(path) as entries:
            kinds = sorted((entry.name, entry.is_dir()) for entry in entries)
        files = [name for name, is_dir in kinds if not is_dir]
        folders = [name for name, is_dir in kinds if is_dir and not name.startswith(".") and name not in JUNK]
    if MANIFEST in files:
        return DataFiles(path, "manifest", (f"{path}/{MANIFEST}",), columns.get("image"), columns.get("label"))
    if "dataset_dict.json" in files or ("state.json" in files and "dataset_info.json" in files):
        split = '["test"]' if "dataset_dict.json" in files else ""
        raise DataError(
            f"{path} was written by datasets' save_to_disk, which is not read; make Parquet of it: "
            f"datasets.load_from_disk({path!r}){split}.to_parquet('test.parquet')"
        )
    shards = [name for name in files if kind_of(name) and not name.startswith(".")]
    if shards:
        if filled := [name for name in folders if _holds_images(f"{path}/{name}")]:
            raise DataError(f"{path} holds {shards[0]} and folders of images ({filled[0]}): name one or the other")
        return _shards(path, shards, [*(set(files) - set(shards)), *folders], columns)
    splits = [name for name in folders if name.lower() in SPLITS and not classes_called(name, class_names)]
    if len(folders) == 1 and depth < NESTED and not classes_called(folders[0], class_names):
        below = f"{path}/{folders[0]}"
        if splits or not _holds_images(below):  # an unpacked archive, data/ of a repository, the only split
            return _in_folder(below, class_names, columns, depth + 1)
    if splits and (len(splits) == len(folders) or not all(_holds_images(f"{path}/{name}") for name in splits)):
        raise DataError(f"{path} holds splits ({', '.join(splits)}): name one of them, {path}/{splits[-1]}")
    if not folders:
        raise DataError(_no_class_folders(path, files))
    return DataFiles(path, "folder", (path,), columns.get("image"), columns.get("label"))


def _shards(path: str, shards: list[str], others: list[str], columns: dict[str, str]) -> DataFiles:
    """Tars or Parquet files of one split."""
    splits: dict[str, list[str]] = {}
    for name in shards:
        for word in re.findall("[a-z]+", name.lower()):
            if word in SPLITS:
                splits.setdefault(word, []).append(name)
                break
    if len(splits) > 1:
        one, extension = max(splits), shards[0].partition(".")[2]
        pattern = f"{path}/*{one}*.{extension}"
        raise DataError(f"{path} holds splits ({', '.join(sorted(splits))}): name the files of one, '{pattern}'")
    if len({kind_of(name) for name in shards}) > 1:
        raise DataError(f"{path} holds tars and Parquet files: name the files of one kind, '{path}/*.tar'")
    left_out = LeftOut()
    for name in sorted(others):
        left_out.add_file(name)
    kind = kind_of(shards[0])
    assert kind is not None
    paths = tuple(f"{path}/{name}" for name in shards)
    return DataFiles(path, kind, paths, columns.get("image"), columns.get("label"), left_out)


def _holds_images(folder: str) -> bool:
    with reading(folder), os.scandir(folder) as entries:
        return any(is_image(entry.name) and not entry.is_dir() for entry in entries)


def _no_class_folders(path: str, files: list[str]) -> str:
    images = sum(map(is_image, files))
    if images:
        lists = [name for name in files if name.startswith("metadata.") or name.endswith((".csv", ".tsv"))]
        unread = f" ({lists[0]} is not read)" if lists else ""
        return f"{path} holds {images:,} images but no sub-folders, one for each class, named like it{unread}"
    if any(re.fullmatch(r"(data_batch_\d|test_batch|train|test|meta|batches\.meta)", name) for name in files):
        return f"{path}: CIFAR's pickles are never loaded; {_EXPECTED}"
    left_out = LeftOut()
    for name in files:
        left_out.add_file(name)
    return f"{path} holds no labeled image ({left_out.line() or 'it is empty'}); {_EXPECTED}"


def _no_data(path: str) -> str:
    """Why a file is no labeled data."""
    if "://" not in path and not os.path.exists(path):
        return f"{path}: no such file or folder"
    extension = path.lower().rpartition(".")[2]
    instead = _INSTEAD.get({"pickle": "pkl", "pt": "pkl", "pth": "pkl", "hdf5": "h5"}.get(extension, extension), "")
    return f"{path} is no .tar, .parquet or folder of images" + (f": {instead}" if instead else f"; {_EXPECTED}")
