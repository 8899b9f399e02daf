"""Model folders of timm and transformers: what their JSON files say of a classifier. Imports no torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from manifests.checked_json import load_tree
from manifests.errors import DataError
from manifests.plain_files import read_regular
from stages.hub import inside, snapshot
from stages.settings import MAX_CLASSES, InputSettings

CONFIG, WEIGHTS = "config.json", "model.safetensors"
BIN, INDEX = "pytorch_model.bin", ".index.json"
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
MAX_CONFIG = 16 * 2**20
"""Bytes of a configuration."""
TIMM_FILTERS = ("bilinear", "bicubic", "nearest")
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
NOT_OF_THE_NET = (
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args", "pretrained_strict",
    "pretrained_filter_fn", "checkpoint_path", "cache_dir", "features_only", "out_indices", "device", "dtype",
)  # fmt: skip
"""Arguments of timm's ``create_model`` that fetch or read weights, or leave the classifier out."""


@dataclass(frozen=True)
class FolderFacts:
    """What a folder says of its classifier; None where it does not. ``num_classes`` is as the file has it, unchecked.

    ``half_precision``: the weights were saved in another precision than the float32 that they run in here.
    ``arguments``: with which timm builds the network. ``decisions``: from which file and field the architecture, input
    and classes are; of an input that is None: why.
    """

    architecture: str | None = None
    num_classes: Any = None
    class_names: tuple[str, ...] | None = None
    input: InputSettings | None = None
    half_precision: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)
    decisions: Mapping[str, str] = field(default_factory=dict)


def fetch(name: str, what: str) -> Path:
    """The folder ``name``, or that of a hub id: its JSON files and its weights, as safetensors if there are such."""

    def choose(names: list[str]) -> list[str]:
        safe = WEIGHTS in names or f"{WEIGHTS}{INDEX}" in names
        weights = (WEIGHTS, "model-*-of-*.safetensors") if safe else (BIN, "pytorch_model-*-of-*.bin")
        return [name for name in names if any(fnmatch(name, pattern) for pattern in ("*.json", *weights))]

    return snapshot(name, what, choose)


def weights_in(folder: Path) -> Path:
    """The file that holds the weights of ``folder``, or the index of the shards that do; safetensors before ``.bin``.

    Raises DataError where there is none.
    """
    for name in (WEIGHTS, f"{WEIGHTS}{INDEX}", BIN, f"{BIN}{INDEX}"):
        if (folder / name).is_file():
            return inside(folder, name)
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
    return [inside(path.parent, name) for name in files]


def read_weights(path: Path) -> bytes:
    """The content of a weights file. Raises DataError where it cannot be read, or is no regular file but a git-lfs
    pointer, a folder or a device."""
    try:
        data = read_regular(path)
    except OSError as error:
        raise DataError(f"cannot read teacher weights {path}: {error.strerror}") from None
    if data.startswith(b"version https://git-lfs.github.com/spec/"):
        raise DataError(f"{path} is a git-lfs pointer, not the weights: run git lfs pull in its folder")
    return data


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a model folder; raises DataError where it is absent, damaged or a link out of it."""
    try:
        content = load_tree(read_regular(inside(path.parent, path.name), MAX_CONFIG), finite=False)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} holds no JSON object")
    return content


def timm_facts(folder: Path) -> FolderFacts:
    """From ``config.json`` as timm's ``save_for_hf`` and ``push_to_hf_hub`` write it, or older timm in one table.

    Raises DataError where it is none, or where its ``model_args`` are no plain, bounded arguments of a network.
    """
    path = folder / CONFIG
    config = read_json(path)
    pretrained = config.get("pretrained_cfg", config)
    if not isinstance(config.get("architecture"), str) or not isinstance(pretrained, Mapping):
        raise DataError(f"{path} is no timm config: it has no architecture and pretrained_cfg")
    arguments = builder_arguments(config.get("model_args") or {}, path)
    names = config.get("label_names") or pretrained.get("label_names") or pretrained.get("labels")
    count = config.get("num_classes", pretrained.get("num_classes")) or None
    class_names, of_classes = listed_names(names, count, f"label_names of {CONFIG}")
    rule = timm_input(pretrained, arguments)
    return FolderFacts(
        architecture=f"timm:{config['architecture']}",
        num_classes=count,
        class_names=class_names,
        input=None if isinstance(rule, str) else rule,
        arguments={key: value for key, value in arguments.items() if key not in ("num_classes", "in_chans")},
        decisions={
            "architecture": f"{CONFIG} of {folder}",
            "input": rule if isinstance(rule, str) else f"pretrained_cfg of {CONFIG}",
            "classes": of_classes,
        },
    )


def timm_rule(rule: InputSettings) -> dict[str, Any] | None:
    """The fields of a timm ``pretrained_cfg`` that say ``rule``, the inverse of :func:`timm_input`; None where timm has
    no words for it."""
    if rule.resize not in TIMM_FILTERS or rule.channel_order != "rgb":
        return None
    fields = {
        "input_size": [rule.channels, rule.size, rule.size],
        "interpolation": rule.resize,
        "mean": [*rule.mean],
        "std": [*rule.std],
    }
    if isinstance(rule.resize_size, int):
        exact = rule.size / rule.resize_size
        crop = exact if math.floor(rule.size / exact) == rule.resize_size else rule.size / (rule.resize_size + 0.5)
        return fields | {"crop_pct": crop, "crop_mode": "center"}
    if rule.resize_size not in (None, (rule.size, rule.size)):
        return None
    return fields | {"crop_pct": 1.0, "crop_mode": "squash"}


def timm_layout(
    name: str, num_classes: int, class_names: tuple[str, ...], rule: InputSettings, arguments: Mapping[str, Any]
) -> dict[str, Any] | None:
    """``config.json`` as timm's ``save_for_hf`` writes it for its model ``name`` (without ``timm:``), built with
    ``arguments``: ``timm.create_model("local-dir:…")`` and transformers' TimmWrapper read it. None as
    :func:`timm_rule`."""
    fields = timm_rule(rule)
    if fields is None:
        return None
    try:
        import timm

        known = timm.get_pretrained_cfg(name)
    except (ImportError, RuntimeError):
        return None
    kept = known.to_dict() if known else {}
    inherited = {key: kept[key] for key in ("fixed_input_size", "first_conv", "classifier", "pool_size") if key in kept}
    built = dict(arguments)
    if rule.channels != 3:
        built["in_chans"] = rule.channels
    if kept.get("fixed_input_size"):
        built.setdefault("img_size", rule.size)
    return {
        "architecture": name.partition(".")[0],
        "num_classes": num_classes,
        "label_names": [*class_names],
        "model_args": built,
        "pretrained_cfg": {**inherited, **fields, "num_classes": num_classes, "custom_load": False},
    }


def builder_arguments(given: Any, path: Path) -> dict[str, Any]:
    """``model_args`` of the file ``path``. Raises DataError where they are no plain arguments of a network."""
    refused = sorted(key for key in given if key in NOT_OF_THE_NET) if isinstance(given, Mapping) else []
    if not isinstance(given, Mapping) or refused or not is_plain(given):
        what = ", ".join(refused) if refused else "more than a few small numbers and short texts"
        raise DataError(f"{path}: model_args hold {what}: build the network with module.path:function")
    return {key: value for key, value in given.items() if value is not None}


def is_plain(value: Any, depth: int = 4) -> bool:
    """Whether ``value`` is JSON of a few small numbers, short texts and lists, as arguments of a network are."""
    if isinstance(value, Mapping | list) and depth and len(value) <= 64:
        values = value.values() if isinstance(value, Mapping) else value
        return all(is_plain(entry, depth - 1) for entry in values)
    if isinstance(value, str):
        return len(value) <= 100
    return value is None or isinstance(value, bool) or (isinstance(value, int | float) and abs(value) <= MAX_CLASSES)


def listed_names(names: Any, count: Any, where: str) -> tuple[tuple[str, ...] | None, str]:
    """The class names in a list or a table by number, and from ``where`` they are; None and why where they do not fit
    ``count`` classes."""
    if isinstance(names, Mapping):
        numbers = [str(i) for i in range(len(names))]
        if not all(number in names for number in numbers):
            return None, f"without names: {where} leave numbers out"
        names = [names[number] for number in numbers]
    if not isinstance(names, list) or not names:
        return None, "without names"
    if count not in (None, len(names)):
        return None, f"without names: {where} are {len(names)}"
    return tuple(map(str, names)), f"names from {where}"


def timm_input(pretrained: Mapping[str, Any], arguments: Mapping[str, Any]) -> InputSettings | str:
    """The input rule of timm's ``pretrained_cfg``, as its ``resolve_data_config`` and ``create_transform`` read it; in
    words what it has that :class:`InputSettings` cannot express."""
    cfg: dict[str, Any] = {
        "input_size": (3, 224, 224),
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "crop_mode": "center",
    }
    cfg = {**cfg, **IMAGENET, **{key: value for key, value in pretrained.items() if value}}
    try:
        channels, height, width = cfg["input_size"]
        channels = arguments.get("in_chans", channels)
        if "img_size" in arguments and cfg.get("fixed_input_size"):
            size = arguments["img_size"]
            height, width = size if isinstance(size, list) else (size, size)
        if height != width:
            return f"pretrained_cfg says input_size {cfg['input_size']}, and only square inputs are supported"
        if cfg["crop_mode"] not in ("center", "squash"):
            return f"pretrained_cfg says crop_mode {cfg['crop_mode']}, which pads pictures: choose a center crop"
        if cfg["interpolation"] not in TIMM_FILTERS:
            return f"pretrained_cfg says interpolation {cfg['interpolation']}: choose bicubic, say"
        side = math.floor(height / cfg["crop_pct"])
        values = {key: [cfg[key]] if isinstance(cfg[key], int | float) else cfg[key] for key in IMAGENET}
        values = {key: v if len(v) == channels else [sum(v) / len(v)] * channels for key, v in values.items()}
        crop = side if cfg["crop_mode"] == "center" else (side, side) if side != height else None
        return InputSettings(size=height, channels=channels, resize=cfg["interpolation"], resize_size=crop, **values)
    except (KeyError, TypeError, ValueError, ArithmeticError):
        wrong = {key: cfg[key] for key in ("input_size", "crop_pct", *IMAGENET)}
        return f"pretrained_cfg says {str(wrong)[:200]}, which is no rule for 1 or 3 channels"


def hf_facts(folder: Path) -> FolderFacts:
    """From ``config.json`` of a transformers image classifier, and its image processor."""
    path = folder / CONFIG
    config = read_json(path)
    if "model_type" not in config and "architecture" in config:
        raise DataError(f"{path} is of timm, not of transformers: name it timm:{folder}")
    key = "id2label" if config.get("id2label") else "label_names"  # of its wrapper of timm
    labels = config.get(key)
    if isinstance(labels, Mapping) and (gaps := [i for i in range(len(labels)) if str(i) not in labels]):
        raise DataError(f"{path}: {key} has no entry {gaps[0]}")
    names, of_classes = listed_names(labels, None, f"{key} of {CONFIG}")
    processor = next((name for name in PROCESSORS if (folder / name).is_file()), None)
    rule: InputSettings | str = f"there is no {PROCESSORS[0]}"
    if processor:
        from stages.models.processors import processor_input  # runs torch

        rule = processor_input(folder, processor, read_json(folder / processor), config.get("num_channels", 3))
    return FolderFacts(
        num_classes=len(names) if names else config.get("num_labels", config.get("num_classes")),
        class_names=names,
        input=None if isinstance(rule, str) else rule,
        half_precision=config.get("dtype", config.get("torch_dtype")) not in (None, "float32"),
        decisions={
            "architecture": f"{CONFIG} of {folder}",
            "input": rule if isinstance(rule, str) else str(processor),
            "classes": of_classes,
        },
    )
