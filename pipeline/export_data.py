"""``factory export data``: a selection of a dataset in the formats that other tools read, image bytes unchanged.

=============  ====================================================================================================
parquet        ``train-00000-of-00003.parquet``: image (bytes and path), label, every column of the row
imagefolder    ``CLASS/KEY.png``, one folder for each class
webdataset     ``train-00000.tar``: ``KEY.png``, ``KEY.cls``, ``KEY.json``; written by webdataset's own writer
=============  ====================================================================================================

What a part holds follows from the selection and the size of parts alone, and a file appears complete or not at all: the
same call makes what is missing.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import webdataset

from manifests.card import CARD, SPLIT, TIMM_INFO, class_label, feature, front_matter, label_names, markdown, timm_info
from manifests.checked_json import dump_checked, load_checked
from manifests.curate import Selection
from manifests.errors import DataError
from manifests.images import extension
from manifests.local import temporary_name
from manifests.reader import Manifest
from manifests.schema import PLACEMENT, SCHEMA, Row, row_json
from manifests.storage import Storage, writing
from pipeline.outputs import outside
from pipeline.terminal import plain, progress, say, size

STATE = ".export.json"
"""What a folder is an export of; hidden, so that no reader takes it for data."""
WINDOW = 256
"""Images that are read at once; of Parquet also the rows of a group."""
OnPart = Callable[[int], None]
Samples = Iterator[tuple[Row, bytes]]
Parts = list[np.ndarray]
"""Places in the selection of what each file holds."""
Made = tuple[int, int, str]
"""Files in all, those of this call, and how to read them."""
Features = list[dict[str, Any]]


@dataclass(frozen=True)
class ExportResult:
    """What lies in ``out``: ``images`` of ``classes`` in ``files``, ``bytes`` of images; ``written``: files of this
    call."""

    out: str
    format: str
    images: int
    classes: int
    files: int
    written: int
    bytes: int
    use: str

    def lines(self) -> Iterator[str]:
        done = "" if self.written else ", all there already"
        yield (
            f"{self.images:,} images of {self.classes} classes, {size(self.bytes)}, in {self.files:,} files "
            f"({self.format}){done}: {plain(self.out)}"
        )
        yield f"read it with {plain(self.use)}"


def export_data(
    url: str, form: str, out: str, selection: Selection | None = None, part_mb: int = 500, quiet: bool = False
) -> ExportResult:
    """Write the rows that ``selection`` takes of the manifest ``url`` into the folder ``out`` as ``form``, a name in
    :data:`FORMATS`. ``part_mb``: megabytes of images in a Parquet file or tar; a larger image has one for itself.

    Raises UsageError where ``out`` is a file or inside the dataset, DataError where it holds something else, and for an
    image that is missing or altered; what was written stays, and the same call goes on.
    """
    manifest = (selection or Selection()).of(Manifest.open(url))
    storage = Storage(outside(manifest, out, f"--{form}"))
    storage.refuse_file()
    _claim(storage, form, manifest, part_mb)
    present = np.unique(manifest.labels)
    names = manifest.info.class_names
    if len(present) < len(names):
        absent = [plain(names[label]) for label in range(len(names)) if label not in present]
        say(f"{len(absent)} of {len(names)} classes have no image: {', '.join(absent[:5])}"
            + (", …" if len(absent) > 5 else "")
            + (": a reader that numbers the folders will number those after them otherwise" if form == "imagefolder"
               else ""))  # fmt: skip
    parts = np.split(np.arange(len(manifest)), _cuts(manifest.sizes, part_mb * 10**6))
    with progress("export", quiet=quiet) as shown:
        files, written, use = FORMATS[form](storage, manifest, parts, lambda count: shown(count, len(manifest), ""))
    for left in storage.temporary()[0]:  # of a killed attempt
        storage.drop_temporary(left)
    if storage.is_local:
        with suppress(OSError):  # absent, or somebody's
            os.rmdir(storage.folder("tmp"))
    total = int(manifest.sizes.sum())
    return ExportResult(storage.url, form, len(manifest), len(present), files, written, total, use)


def _claim(storage: Storage, form: str, manifest: Manifest, part_mb: int) -> None:
    """Make an empty folder that of this export, or see that it is."""
    text = "\n".join(manifest.column("key")).encode()
    what = {
        "format": form,
        "dataset": manifest.digest,
        "selection": f"{len(manifest)} images, sha256 {hashlib.sha256(text).hexdigest()}",
        "part_mb": part_mb if form != "imagefolder" else None,
    }
    if not storage.exists(STATE):
        there = os.listdir(storage.url) if storage.is_local and os.path.isdir(storage.url) else storage.list("")
        if there := sorted({*there} - {"tmp"}):
            raise DataError(f"{storage.url} is not empty (it holds {plain(there[0])}): name another folder")
        if storage.create(STATE, dump_checked(what)):
            return
    try:
        found = load_checked(storage.read(STATE))
    except ValueError as error:
        raise DataError(f"{storage.path(STATE)} is damaged ({error}): name another folder") from None
    if different := [key for key in what if found.get(key) != what[key]]:
        raise DataError(f"{storage.url} holds another export (its {', '.join(different)} differs): name another folder")


def _cuts(sizes: np.ndarray, limit: int) -> list[int]:
    """Where a new part begins, so that each holds at most ``limit`` bytes of images, or one image.

    >>> _cuts(np.array([4, 4, 4, 9, 1]), 8)
    [2, 3, 4]
    """
    cuts, held = [], 0
    for index, count in enumerate(sizes.tolist()):
        if held and held + count > limit:
            cuts.append(index)
            held = 0
        held += count
    return cuts


def _samples(manifest: Manifest, indices: np.ndarray) -> Samples:
    """Rows and stored images of ``indices``, some at a time."""
    for start in range(0, len(indices), WINDOW):
        window = indices[start : start + WINDOW]
        rows = manifest.take(window).to_table().to_pylist()
        yield from zip(rows, manifest.read_many(window), strict=True)


def _parquet(storage: Storage, manifest: Manifest, parts: Parts, on_count: OnPart) -> Made:
    """No card: the files tell ``datasets`` what image and label are, and others read every file of the folder."""
    columns = [field for field in SCHEMA if field.name not in {*PLACEMENT, "label"}]
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    fields = [pa.field("image", picture), pa.field("label", pa.int64())]
    fields += [pa.field("xxh3", pa.string()) if field.name == "xxh3" else field for field in columns]
    label = {"names": [*label_names(manifest.info.class_names)], "_type": "ClassLabel"}
    known = json.dumps({"info": {"features": {"image": {"_type": "Image"}, "label": label}}})
    schema = pa.schema(fields, {"huggingface": known})

    def write(path: Path, samples: Samples) -> None:
        with pq.ParquetWriter(path, schema, compression="zstd", compression_level=1) as writer:
            for group in _batched(samples, WINDOW):
                made = []
                for row, image in group:
                    path_inside = f"{row['key']}.{extension(image)}"
                    made.append(row | {"image": {"bytes": image, "path": path_inside}, "xxh3": row["xxh3"].hex()})
                writer.write_table(pa.Table.from_pylist(made, schema))

    names = [f"{SPLIT}-{number:05d}-of-{len(parts):05d}.parquet" for number in range(len(parts))]
    written = _write_parts(storage, manifest, parts, names, write, on_count)
    return len(parts), written, f'datasets.load_dataset("{storage.url}"), pandas.read_parquet or duckdb'


def _webdataset(storage: Storage, manifest: Manifest, parts: Parts, on_count: OnPart) -> Made:
    def write(path: Path, samples: Samples) -> None:
        with webdataset.TarWriter(str(path), user="", group="", mode=0o644, mtime=0) as writer:
            for row, image in samples:
                fields = {"__key__": row["key"], extension(image): image}
                writer.write(fields | {"cls": row["label"], "json": row_json(row)})

    names = [f"{SPLIT}-{number:05d}.tar" for number in range(len(parts))]
    written = _write_parts(storage, manifest, parts, names, write, on_count)
    features: Features = [
        {"name": extension(manifest.read(0)), "dtype": "image"},
        {"name": "cls", "dtype": class_label(manifest.info.class_names)},
        {"name": "json", "struct": [feature(field) for field in SCHEMA if field.name not in PLACEMENT]},
        *({"name": name, "dtype": "string"} for name in ("__key__", "__url__")),
    ]
    _card(storage, manifest, features, names)
    storage.write(TIMM_INFO, timm_info(zip(names, map(len, parts), strict=True)))
    last = f"{{00000..{len(parts) - 1:05d}}}" if len(parts) > 1 else "00000"
    return len(parts), written, f'webdataset.WebDataset("{storage.url}/{SPLIT}-{last}.tar")'


def _imagefolder(storage: Storage, manifest: Manifest, parts: Parts, on_count: OnPart) -> Made:
    folders = folder_names(manifest.info.class_names)
    labels, keys = manifest.labels, np.array(manifest.column("key"))
    written = 0
    for label in np.unique(labels).tolist():
        there = {Path(name).stem for name in storage.list(folders[label])}
        mine = np.flatnonzero(labels == label)
        missing = mine[~np.isin(keys[mine], [*there])]
        for row, image in _samples(manifest, missing):
            storage.write(f"{folders[label]}/{row['key']}.{extension(image)}", image)
            written += 1
            if written % WINDOW == 0:
                on_count(written + len(keys) - len(missing))
    return len(keys), written, f'torchvision.datasets.ImageFolder("{storage.url}")'


def folder_names(names: Iterable[str]) -> tuple[str, ...]:
    """A folder for each class, sorted as the labels are: the class's name where that is one and sorts so, else with its
    number in front.

    >>> folder_names(["cat", "dog"]), folder_names(["zebra", "../a", "CON"])
    (('cat', 'dog'), ('0-zebra', '1-a', '2-CON'))
    """
    listed = [*names]
    if all(re.fullmatch(r"\w[\w -]{0,60}", name) for name in listed) and listed == sorted({*listed}):
        return (*listed,)
    digits = len(str(len(listed) - 1))
    bare = (re.sub(r"[^\w-]+", "-", name).strip("-")[:60] for name in listed)
    return tuple(f"{number:0{digits}d}-{name}".rstrip("-") for number, name in enumerate(bare))


FORMATS: dict[str, Callable[[Storage, Manifest, Parts, OnPart], Made]]
FORMATS = {"parquet": _parquet, "imagefolder": _imagefolder, "webdataset": _webdataset}


def _write_parts(
    storage: Storage,
    manifest: Manifest,
    parts: Parts,
    names: list[str],
    write: Callable[[Path, Samples], None],
    on_count: OnPart,
) -> int:
    """Make every file of ``names`` that is not there, each from its part; how many that were."""
    there, done, written = {*storage.list("")}, 0, 0
    for name, part in zip(names, parts, strict=True):
        if name not in there:
            path = storage.scratch() / temporary_name("write")
            try:
                with writing(path):
                    write(path, _samples(manifest, part))
                storage.put_file(path, name)
            finally:
                path.unlink(missing_ok=True)
            written += 1
        done += len(part)
        on_count(done)
    return written


def _batched(samples: Samples, count: int) -> Iterator[list[tuple[Row, bytes]]]:
    held: list[tuple[Row, bytes]] = []
    for sample in samples:
        held.append(sample)
        if len(held) == count:
            yield held
            held = []
    if held:
        yield held


def _card(storage: Storage, manifest: Manifest, features: Features, names: list[str]) -> None:
    """A card by which ``datasets`` finds the files and the types of their columns."""
    configs = [{"config_name": "default", "data_files": [{"split": SPLIT, "path": names}]}]
    info = replace(manifest.info, tars=())
    text = (
        f"# {len(manifest):,} images of {len(info.class_names):,} classes\n\n"
        f"A selection of a dataset by dfkd-factory (fingerprint {markdown(info.fingerprint)}), exported.\n"
        "`label` or `cls` is the class that was asked for; how the images were made, by which prior and license, says\n"
        "the dataset's own card.\n"
    )
    storage.write(CARD, (front_matter(features, configs) + text).encode())
