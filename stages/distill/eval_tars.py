"""Samples of WebDataset tars, with a bound on all that a tar may claim.

Members are read here, since webdataset's own reader takes any size and opens ``pipe:`` URLs; webdataset groups them.
"""

import bz2
import gzip
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, BinaryIO, Self, cast

from manifests.checked_json import load_json
from manifests.errors import DataError
from manifests.schema import MAX_IMAGE
from manifests.storage import Storage
from stages.distill.class_order import Label, NamedNumber, read_label, read_text_label
from stages.distill.eval_files import IMAGES, LABEL_COLUMNS, DataFiles, LeftOut

LABEL_FILES = ("cls", "label", "class", "target", "json", "txt", "index", "id")
"""Extensions beside KEY.jpg; the first one there is the label."""
NAME_FIELD = "class_name"  # beside the label in KEY.json of a dataset's shards
MAX_HEADER = 1 << 20
"""Bytes of a long name or extended header."""
MAX_MEMBERS, MAX_SAMPLE = 1000, 2 * MAX_IMAGE
"""Files, and bytes of those that are read, of one sample."""
Fields = dict[str, str | bytes]
"""Contents by extension; ``__key__``: the name before it."""


@dataclass(frozen=True)
class TarSample:
    """``source``: the extension that holds the label."""

    key: str
    image: bytes
    label: Label | NamedNumber
    source: str


def tar_samples(storage: Storage, name: str, files: DataFiles) -> Iterator[TarSample]:
    """Samples with an image; others are counted in ``files.left_out``. Raises DataError for one without a label, or
    with two files that may be its image or label, and where the tar is damaged, cut short or joined with another."""
    images = (files.image,) if files.image else IMAGES
    labels = (files.label, "json") if files.label else LABEL_FILES
    keys = (files.label,) if files.label else LABEL_COLUMNS
    read = frozenset(name.rpartition(".")[2].lower() for name in (*images, *labels))
    where = storage.path(name)
    for fields in _grouped(storage, name, files.left_out, read):
        key, image = str(fields["__key__"]), _pick(fields, images, where)
        if image is None:
            files.left_out.add("samples without an image", f"sample without an image ({key})")
            continue
        source, label = _tar_label(fields, labels, keys, f"{where}: sample {key!r}")
        yield TarSample(key, cast(bytes, fields[image]), label, source)


def tar_images(storage: Storage, name: str, files: DataFiles) -> Iterator[tuple[str, bytes]]:
    """Keys and images of all samples, labeled or not; else as :func:`tar_samples`."""
    images, where = (files.image,) if files.image else IMAGES, storage.path(name)
    read = frozenset(image.rpartition(".")[2].lower() for image in images)
    for fields in _grouped(storage, name, files.left_out, read):
        key, image = str(fields["__key__"]), _pick(fields, images, where)
        if image is None:
            files.left_out.add("samples without an image", f"sample without an image ({key})")
        else:
            yield key, cast(bytes, fields[image])


def _grouped(storage: Storage, name: str, left_out: LeftOut, read: frozenset[str]) -> Iterator[Fields]:
    """Samples as webdataset groups them: neighbors of one key, by their extensions in lower case."""
    from webdataset.tariterators import group_by_keys

    try:
        yield from group_by_keys(_members(storage, name, left_out, read))
    except (tarfile.TarError, zlib.error, ValueError, EOFError, OverflowError, OSError, RecursionError) as error:
        text = str(error if isinstance(error, OSError) or not error.args else error.args[0])
        reason = " ".join(text.partition(" dict_keys(")[0].split())[:200]
        raise DataError(f"{storage.path(name)} is damaged or no tar: {reason}") from None


class _Header(tarfile.TarInfo):
    """A member whose header is read in bounded memory."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:  # the way that tarfile provides for subclasses
        headers = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)
        if self.type in (*headers, tarfile.SOLARIS_XHDTYPE) and self.size > MAX_HEADER:
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        if self.type == tarfile.GNUTYPE_SPARSE:
            raise tarfile.ReadError(f"{self.name[:80]!r} is a sparse file")
        return super()._proc_member(tar)  # type: ignore[misc]

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tar)
        except tarfile.EmptyHeaderError:  # type: ignore[attr-defined]
            raise tarfile.ReadError("it has no end mark: it was cut short, or never closed") from None


def _members(storage: Storage, name: str, left_out: LeftOut, read: frozenset[str]) -> Iterator[dict[str, Any]]:
    """Regular members that belong to a sample; those whose extension is not in ``read`` come without content."""
    from webdataset.tariterators import base_plus_ext

    where = storage.path(name)
    sample, members, size = "", 0, 0  # of the sample that webdataset gathers
    with storage.open(name) as file, tarfile.open(fileobj=_unpacked(file, where), mode="r|", tarinfo=_Header) as tar:
        for member in tar:
            key, extensions = base_plus_ext(member.name)
            if member.isdir():
                continue
            if key != sample and key is not None:
                sample, members, size = key, 0, 0
            members += key is not None
            if members > MAX_MEMBERS or size > MAX_SAMPLE:
                raise DataError(f"{where}: sample {sample[:80]!r} has over {MAX_MEMBERS} files or {MAX_SAMPLE} bytes")
            if not member.isreg() or member.issparse():
                left_out.add("links and special files", f"link or special file {member.name}")
            elif key is None:
                left_out.add_file(member.name)
            elif extensions.rpartition(".")[2].lower() not in read:
                yield {"fname": member.name, "data": b"", "__url__": where}
            elif not 0 <= member.size <= MAX_IMAGE:
                raise DataError(f"{where}: {member.name[:80]!r} claims {member.size} bytes")
            else:
                size += member.size
                content = tar.extractfile(member)
                assert content is not None
                yield {"fname": member.name, "data": content.read(), "__url__": where}
        rest = cast(BinaryIO, tar.fileobj)
        while block := rest.read(1 << 20):
            if any(block):
                raise DataError(f"{where} goes on after its end mark: give tars that were joined one by one")


def _unpacked(file: BinaryIO, where: str) -> BinaryIO:
    """``file``, or what it holds compressed, whatever it is called."""
    magic = file.read(6)
    file.seek(0)
    if magic.startswith(b"\x1f\x8b"):
        return cast(BinaryIO, gzip.GzipFile(fileobj=file))
    if magic.startswith(b"BZh"):
        return cast(BinaryIO, bz2.BZ2File(file))
    if magic.startswith((b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        raise DataError(f"{where} is compressed with xz or zstd: compress it with gzip, or not at all")
    return file


def _pick(fields: Fields, kinds: Sequence[str], where: str) -> str | None:
    """The one of ``fields`` that is called by one of ``kinds``, else the one that ends so (``seg.png``)."""
    named = [name for name in fields if name in kinds]
    found = named or [name for name in fields if name.rpartition(".")[2] in kinds and not name.startswith("__")]
    if len(found) > 1:
        raise DataError(
            f"{where}: sample {str(fields['__key__'])!r} has {len(found)} files that may be its image or its label "
            f"({', '.join(found[:4])}): name the one that is with @image=EXTENSION or @label=EXTENSION after the path"
        )
    return found[0] if found else None


def _tar_label(
    fields: Fields, kinds: Sequence[str], keys: Sequence[str], where: str
) -> tuple[str, Label | NamedNumber]:
    """The extension that holds the label, and the label. Raises DataError where there is none."""
    why = ""
    for kind in kinds:
        name = _pick(fields, (kind,), where.partition(": sample ")[0])
        if name is None:
            continue
        try:
            data = cast(bytes, fields[name])
            label = _json_label(data, keys) if kind == "json" else read_text_label(data)
        except (ValueError, TypeError) as error:
            why = f" ({error})"
            break
        if label is not None:
            return _by_name(name, label, fields, keys)
    expected = ", ".join(f"KEY.{kind}" for kind in kinds)
    raise DataError(
        f"{where} has no label: a number or a class name in {expected} beside its image, in JSON as "
        f"{' or '.join(keys)}{why}; files of one sample must be neighbors in the tar, and "
        "a tar of class folders be unpacked"
    )


def _by_name(
    name: str, label: Label | NamedNumber, fields: Fields, keys: Sequence[str]
) -> tuple[str, Label | NamedNumber]:
    """The ``label`` in the file ``name``, with its class's name where KEY.json says the same number and that."""
    if isinstance(label, int) and isinstance(data := fields.get("json"), bytes):
        with suppress(ValueError, TypeError):  # JSON about something else
            named = _json_label(data, keys)
            if isinstance(named, NamedNumber) and named.number == label:
                return "json", named
    return name, label


def _json_label(data: bytes, keys: Sequence[str]) -> Label | NamedNumber | None:
    values = load_json(data)
    if not isinstance(values, dict):
        return read_label(values)
    key = next((key for key in keys if key in values), None)
    if key is None:
        return None
    label, name = read_label(values[key]), values.get(NAME_FIELD)
    return NamedNumber(label, name) if isinstance(label, int) and isinstance(name, str) else label
