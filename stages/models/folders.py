"""Model folders of timm and transformers: what their JSON files say of a classifier. Imports no torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manifests.errors import DataError
from stages.settings import InputSettings

CONFIG, WEIGHTS = "config.json", "model.safetensors"
BIN, INDEX = "pytorch_model.bin", ".index.json"
_PIL_FILTERS = {2: "bilinear", 3: "bicubic", 4: "area"}
_TIMM_FILTERS = ("bilinear", "bicubic")


@dataclass(frozen=True)
class FolderFacts:
    """What a folder says of its classifier; None where it does not. ``num_classes`` is as the file has it, unchecked.

    ``half_precision``: the weights were saved in another precision than the float32 that they run in here.
    """

    architecture: str | None = None
    num_classes: Any = None
    class_names: tuple[str, ...] | None = None
    input: InputSettings | None = None
    half_precision: bool = False


def fetch(name: str, what: str) -> Path:
    """The folder ``name``, or that of a hub id: its JSON files and its weights, as safetensors if there are such."""
    if Path(name).is_dir():
        return Path(name)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise DataError(f"{what} {name}: no such folder (expected a folder, or org/name on the hub)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, allow_patterns=["*.json", WEIGHTS, "model-*-of-*.safetensors"]))
        if not any((folder / weights).is_file() for weights in (WEIGHTS, f"{WEIGHTS}{INDEX}")):
            folder = Path(snapshot_download(name, allow_patterns=["*.json", BIN, "pytorch_model-*-of-*.bin"]))
        return folder
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"{what} {name}: neither a local folder nor a hub id that can be fetched ({reason})") from None


def weights_in(folder: Path) -> Path:
    """The file that holds the weights of ``folder``, or the index of the shards that do; safetensors before ``.bin``.

    Raises DataError where there is none.
    """
    for name in (WEIGHTS, f"{WEIGHTS}{INDEX}", BIN, f"{BIN}{INDEX}"):
        if (folder / name).is_file():
            return folder / name
    there = ", ".join(sorted(path.name for path in folder.iterdir() if path.suffix != ".json")[:6]) or "nothing"
    raise DataError(f"{folder} holds no {WEIGHTS} or {BIN}, whole or as shards with {INDEX}: it has {there}")


def shards(path: Path) -> list[Path]:
    """The files that ``path`` lists, if it is an index. Raises DataError where it is damaged or leaves its folder."""
    if not path.name.endswith(INDEX):
        return []
    names = read_json(path).get("weight_map")
    if not isinstance(names, Mapping) or not names:
        raise DataError(f"{path} has no weight_map that names the shards")
    files = sorted(set(map(str, names.values())))
    if outside := [name for name in files if Path(name).name != name or name == ".."]:
        raise DataError(f"{path} names {outside[0]!r}: expected the names of files beside it")
    return [path.with_name(name) for name in files]


def read_weights(path: Path) -> bytes:
    """The content of a weights file. Raises DataError where it cannot be read, or is no regular file but a git-lfs
    pointer, a folder or a device."""
    try:
        if path.exists() and not path.is_file():
            raise DataError(f"{path} is no regular file")
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read teacher weights {path}: {error.strerror}") from None
    if data.startswith(b"version https://git-lfs.github.com/spec/"):
        raise DataError(f"{path} is a git-lfs pointer, not the weights: run git lfs pull in its folder")
    return data


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises DataError where it is absent or damaged."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} holds no JSON object")
    return content


def timm_facts(folder: Path) -> FolderFacts:
    """From a folder as timm's hub models have it: ``config.json`` with ``architecture`` and ``pretrained_cfg``."""
    path = folder / CONFIG
    config = read_json(path)
    pretrained = config.get("pretrained_cfg")
    if not isinstance(config.get("architecture"), str) or not isinstance(pretrained, Mapping):
        raise DataError(f"{path} is no timm config: it has no architecture and pretrained_cfg")
    if config.get("model_args"):
        raise DataError(f"{path} has model_args {config['model_args']}: build it with module.path:function")
    names = config.get("label_names") or pretrained.get("label_names")
    return FolderFacts(
        architecture=f"timm:{config['architecture']}",
        num_classes=config.get("num_classes", pretrained.get("num_classes")) or None,
        class_names=tuple(map(str, names)) if isinstance(names, list) and names else None,
        input=_timm_input(pretrained),
    )


def _timm_input(pretrained: Mapping[str, Any]) -> InputSettings | None:
    try:
        channels, height, width = pretrained["input_size"]
        if height != width or pretrained.get("interpolation") not in _TIMM_FILTERS:
            return None
        values = {key: pretrained[key] for key in ("mean", "std")}
        return InputSettings(size=height, channels=channels, resize=pretrained["interpolation"], **values)
    except (KeyError, TypeError, ValueError):
        return None


def hf_facts(folder: Path) -> FolderFacts:
    """From ``config.json`` and ``preprocessor_config.json`` of a transformers image classifier."""
    config = read_json(folder / CONFIG)
    labels, names = config.get("id2label"), None
    if isinstance(labels, Mapping) and labels:
        try:
            names = tuple(str(labels[str(i)]) for i in range(len(labels)))
        except KeyError as error:
            raise DataError(f"{folder / CONFIG}: id2label has no entry {error}") from None
    processor = folder / "preprocessor_config.json"
    return FolderFacts(
        num_classes=len(names) if names else None,
        class_names=names,
        input=processor_input(read_json(processor), config.get("num_channels", 3)) if processor.is_file() else None,
        half_precision=config.get("dtype", config.get("torch_dtype")) not in (None, "float32"),
    )


def processor_input(processor: Mapping[str, Any], channels: int) -> InputSettings | None:
    """What an image processor prepares; None if :class:`InputSettings` cannot express it, or not all of it is said."""
    others = ("do_flip_channel_order", "do_color_quantize", "rescale_offset")
    if any(map(processor.get, others)) or processor.get("do_normalize") is None:
        return None  # transformers leaves out what is None, and no file holds the defaults of a class
    try:
        size = processor.get("size")
        if processor.get("do_center_crop") and processor.get("crop_size"):
            size = processor["crop_size"]
        if isinstance(size, Mapping):
            sides = {size[key] for key in ("height", "width", "shortest_edge") if key in size}
            size = sides.pop() if len(sides) == 1 else None
        scaled = processor.get("do_rescale", True) and abs(processor.get("rescale_factor", 1 / 255) * 255 - 1) < 1e-6
        resize = _PIL_FILTERS.get(processor.get("resample", 2))
        if not isinstance(size, int) or not scaled or resize is None:
            return None
        mean, std = processor.get("image_mean"), processor.get("image_std")
        if not processor["do_normalize"]:
            mean, std = (0.0,) * channels, (1.0,) * channels
        values = {"size": size, "channels": channels, "mean": mean, "std": std, "resize": resize}
        return InputSettings.model_validate(values)
    except (TypeError, ValueError):  # null, or a text for a number
        return None
