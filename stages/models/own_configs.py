"""What classifiers of timm and transformers say of themselves in the files beside their weights. Imports no torch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from manifests.errors import DataError
from stages.models.settings import InputSettings

Facts = dict[str, Any]  # any of architecture, num_classes, class_names, input, cast; what is unknown is absent
_RESAMPLE = {2: "bilinear", 3: "bicubic", 4: "area"}  # PIL's numbers
_INTERPOLATION = ("bilinear", "bicubic")


def fetch(name: str, what: str) -> Path:
    """The folder ``name``, or that of a hub id: its JSON files and ``model.safetensors``, nothing else."""
    if Path(name).is_dir():
        return Path(name)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise DataError(f"{what} {name}: no such folder (expected a folder, or org/name on the hub)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "model.safetensors"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"{what} {name}: neither a local folder nor a hub id that can be fetched ({reason})") from None


def read_json(path: Path) -> Facts:
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


def timm_facts(folder: Path) -> Facts:
    """From a folder as timm's hub models have it: ``config.json`` with ``architecture`` and ``pretrained_cfg``."""
    path = folder / "config.json"
    config = read_json(path)
    own = config.get("pretrained_cfg")
    if not isinstance(config.get("architecture"), str) or not isinstance(own, Mapping):
        raise DataError(f"{path} is no timm config: it has no architecture and pretrained_cfg")
    if config.get("model_args"):
        raise DataError(f"{path} has model_args {config['model_args']}: build it with module.path:function")
    facts: Facts = {"architecture": f"timm:{config['architecture']}"}
    classes = config.get("num_classes", own.get("num_classes"))
    if classes:
        facts["num_classes"] = classes
    names = config.get("label_names") or own.get("label_names")
    if isinstance(names, list) and names:
        facts["class_names"] = tuple(map(str, names))
    try:
        channels, size, width = own["input_size"]
        if size == width and own.get("interpolation") in _INTERPOLATION:
            values = {"mean": own["mean"], "std": own["std"], "resize": own["interpolation"]}
            facts["input"] = InputSettings(size=size, channels=channels, **values)
    except (KeyError, TypeError, ValueError):
        pass  # then the recipe must say it
    return facts


def hf_facts(folder: Path) -> Facts:
    """From ``config.json`` and ``preprocessor_config.json`` of a transformers image classifier."""
    config = read_json(folder / "config.json")
    facts: Facts = {"cast": config.get("dtype", config.get("torch_dtype")) not in (None, "float32")}
    labels = config.get("id2label")
    if isinstance(labels, Mapping) and labels:
        try:
            facts["class_names"] = tuple(str(labels[str(i)]) for i in range(len(labels)))
        except KeyError as error:
            raise DataError(f"{folder / 'config.json'}: id2label has no entry {error}") from None
        facts["num_classes"] = len(labels)
    path = folder / "preprocessor_config.json"
    if path.is_file():
        found = processor_input(read_json(path), config.get("num_channels", 3))
        if found is not None:
            facts["input"] = found
    return facts


def processor_input(processor: Facts, channels: int) -> InputSettings | None:
    """What an image processor prepares, None where that is not one of our input rules, or not all of it is said."""
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
        resize = _RESAMPLE.get(processor.get("resample", 2))
        if not isinstance(size, int) or not scaled or resize is None:
            return None
        mean, std = processor.get("image_mean"), processor.get("image_std")
        if not processor["do_normalize"]:
            mean, std = (0.0,) * channels, (1.0,) * channels
        values = {"size": size, "channels": channels, "mean": mean, "std": std, "resize": resize}
        return InputSettings.model_validate(values)
    except (TypeError, ValueError):  # null, or a text for a number
        return None
