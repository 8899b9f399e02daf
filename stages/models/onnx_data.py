"""The data files beside an ONNX model: what the exporter of PyTorch writes by default. Imports no torch."""

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from manifests.checked_json import load_json
from manifests.errors import DataError, UsageError
from manifests.plain_files import read_regular
from stages.hub import inside

ONNX_FACTS = "dfkd_factory"
"""The entry of a model's metadata that says what it takes and answers (:func:`stages.distill.export.describe`)."""
SMALL = 2**20
"""Bytes of a tensor that moves into the model."""


def external_data(model: bytes, path: Path) -> dict[str, bytes]:
    """Content of the data files of the ONNX ``model``, which was read from ``path``, by the names in it.

    Raises DataError where that is none, where a file is missing, shorter than the model says, no regular file, or
    outside the model's folder (of links: outside the repository of the hub's cache).
    """
    try:
        import onnx
    except ImportError:
        raise UsageError(f"{path} needs onnx: pip install 'dfkd-factory[onnx]'") from None
    ends: dict[str, int] = {}
    try:
        parsed = onnx.load_model_from_string(model)
    except Exception as error:  # protobuf's DecodeError, or what follows from wrong bytes
        raise DataError(f"{path} is no ONNX model: {(str(error).splitlines() or ['no message'])[0]}") from None
    for tensor in _tensors(parsed):
        if tensor.data_location == tensor.EXTERNAL:
            name, start, length = _place(tensor, path)
            ends[name] = max(start + (length or 0), ends.get(name, 0))
    return {name: _read(path, name, end) for name, end in sorted(ends.items())}


def stated_facts(path: Path) -> dict[str, Any]:
    """What the metadata of the ONNX model ``path`` say of its input and classes; nothing where they do not, or where it
    cannot be read (which loading it will say)."""
    try:
        import onnx

        entries = onnx.load_model_from_string(read_regular(path)).metadata_props
        found: Any = next((load_json(entry.value.encode()) for entry in entries if entry.key == ONNX_FACTS), {})
    except Exception:  # as above
        return {}
    return found if isinstance(found, dict) else {}


def with_small_data(model: bytes, data: Mapping[str, bytes], path: Path) -> bytes:
    """The ONNX ``model`` with small tensors out of ``data`` (:func:`external_data`) inside: onnxruntime infers shapes
    from some, and does not look for those elsewhere."""
    import onnx

    parsed = onnx.load_model_from_string(model)
    for tensor in _tensors(parsed):
        if tensor.data_location == tensor.EXTERNAL:
            name, start, length = _place(tensor, path)
            content = data[name][start : None if length is None else start + length]
            if len(content) <= SMALL:
                tensor.raw_data, tensor.data_location = content, tensor.DEFAULT
                del tensor.external_data[:]
    inside: bytes = parsed.SerializeToString()
    return inside


def _place(tensor: Any, path: Path) -> tuple[str, int, int | None]:
    """File, offset and length (None: to its end) of the external data of ``tensor``."""
    entry = {item.key: item.value for item in tensor.external_data}
    numbers = {key: entry[key] for key in ("offset", "length") if entry.get(key)}
    if not all(value.isascii() and value.isdigit() and len(value) < 16 for value in numbers.values()):
        raise DataError(f"{path}: data of tensor {tensor.name[:80]!r} has no place: {str(numbers)[:80]}")
    length = numbers.get("length")
    return entry.get("location", ""), int(numbers.get("offset", 0)), None if length is None else int(length)


def _tensors(message: Any) -> Iterator[Any]:
    """Every tensor in a protobuf message, at any depth."""
    if message.DESCRIPTOR.name == "TensorProto":
        yield message
        return
    for part, value in message.ListFields():
        if part.message_type is not None:
            for inner in value if isinstance(value, list) or hasattr(value, "add") else (value,):
                yield from _tensors(inner)


def _read(model: Path, name: str, end: int) -> bytes:
    relative = PurePosixPath(name)
    if not name or "\0" in name or "\\" in name or relative.is_absolute() or ".." in relative.parts:
        raise DataError(f"{model} names data outside its folder: {name[:80]!r}")
    path = inside(model.parent, name)
    try:
        data = read_regular(path)
    except FileNotFoundError:
        raise DataError(f"{model}: its data {name[:80]!r} is missing: copy it beside the model") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    if len(data) < end:
        raise DataError(f"{path} is truncated: {len(data)} bytes, {model.name} needs {end}")
    return data
