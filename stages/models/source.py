"""Which classifier is meant, and which weights exactly: names, configurations, checksums. Imports no torch."""

import hashlib
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from manifests.checked_json import dump_checked, load_checked
from manifests.errors import DataError, UsageError
from stages.settings import SMALL, InputSettings, ModelSettings, Settings, Stem

Scheme = Literal["builtin", "timm", "torchvision", "hf", "onnx", "code"]
IMAGENET_NETS = ("resnet18", "resnet34", "vgg11", "mobilenetv2", "shufflenetv2")  # built-ins with a stem to adapt
_CODE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def split_name(name: str) -> tuple[Scheme, str]:
    """The scheme of an architecture's name, and the rest of it.

    >>> split_name("timm:resnet18"), split_name("my.nets:build"), split_name("wrn-16-1")
    (('timm', 'resnet18'), ('code', 'my.nets:build'), ('builtin', 'wrn-16-1'))
    """
    prefix, colon, rest = name.partition(":")
    if colon and prefix in ("timm", "torchvision", "hf", "onnx"):
        return prefix, rest  # type: ignore[return-value]
    if name.endswith(".onnx"):
        return "onnx", name
    return ("code", name) if _CODE.fullmatch(name) and prefix != "embedded" else ("builtin", name)


def tells_all(name: str) -> bool:
    """True where the files that ``name`` stands for tell weights, input and classes by themselves.

    >>> tells_all("embedded:digits"), tells_all("hf:microsoft/resnet-18"), tells_all("resnet20")
    (True, True, False)
    """
    scheme, rest = split_name(name)
    if scheme == "timm":
        return "." in rest or Path(rest).is_dir()
    return scheme == "hf" or name.startswith("embedded:") or name.endswith((".yaml", ".yml")) or Path(name).is_dir()


def only_named(name: str) -> bool:
    """Whether only the user may name it: loading it runs foreign code, or fetches something.

    Built-in, timm and torchvision architectures are built without weights; ``hf:`` from a local folder.
    """
    scheme, rest = split_name(name)
    return scheme in ("code", "onnx") or (scheme == "hf" and not Path(rest).is_dir())


def check_stored(name: str, where: str) -> None:
    """Refuse to build what a stored file names where that is :func:`only_named`.

    Raises UsageError saying how to load it by name instead.
    """
    if only_named(name):
        what = "is your own code" if split_name(name)[0] == "code" else "is not at hand here"
        raise UsageError(
            f"{where} names '{name}', which {what} and is never loaded because a file says so: "
            f"name it yourself, in a FILE.yaml with name: {name}, weights, input and num_classes"
        )


def default_stem(name: str, size: int, student: bool = False) -> Stem:
    """``small`` where an ImageNet network meets images of up to 64 px: always for built-ins, for students of others.

    A teacher from outside has weights that were trained with one stem or the other: its user says which.
    """
    scheme, rest = split_name(name)
    adaptable = rest in IMAGENET_NETS if scheme == "builtin" else student and scheme in ("timm", "torchvision")
    return "small" if adaptable and size <= SMALL else "native"


def source_file(name: str) -> Path:
    """The file of the module in ``module.path:function``, found without running it: here first, then ``sys.path``.

    Raises DataError where there is none.
    """
    module = name.partition(":")[0]
    path: list[str] | None = [str(Path.cwd()), *sys.path]
    spec = None
    for part in module.split("."):  # not the full name: namespace packages look for their parent in sys.modules
        spec = PathFinder.find_spec(part, path) if path is not None else None
        if spec is None:
            break
        path = list(spec.submodule_search_locations) if spec.submodule_search_locations is not None else None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise DataError(f"'{name}': no Python file for module {module}, neither in {Path.cwd()} nor on sys.path")
    return Path(spec.origin)


# What classifiers of timm and transformers say of themselves in the files beside their weights. Imports no torch.


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


# Which classifier is meant, and which weights exactly. Imports no torch: plans are made without it.


ASSETS = Path(__file__).resolve().parent.parent / "assets"
EMBEDDED = {"embedded:digits": ASSETS / "digits-teacher"}
CONFIG, WEIGHTS = "config.json", "model.safetensors"
WEIGHTS_SHA256 = "weights_sha256"
MAX_CLASSES = 100_000


class ModelConfig(Settings):
    """What ``config.json`` of a model folder holds: enough to rebuild the network around its weights."""

    architecture: str
    num_classes: int
    channels: int
    input: InputSettings
    class_names: tuple[str, ...]
    stem: Stem = "native"


@dataclass(frozen=True)
class Source:
    """A classifier at hand: its configuration, and the files that belong to it.

    ``code`` is the user's own Python file (also ``weights``, where it brings its own); ``named`` tells that the user
    wrote the architecture's name, not a file; ``recorded`` is the sha256 that a model folder tells of its weights;
    ``cast`` tells that its files ask for another precision than the float32 that it runs in.
    """

    config: ModelConfig
    weights: Path
    code: Path | None = None
    named: bool = False
    recorded: str | None = None
    cast: bool = False

    def read(self) -> bytes:
        """The weights file; empty where code brings its own. Raises DataError if it cannot be read or was altered."""
        try:
            data = self.weights.read_bytes() if self.weights != self.code else b""
        except OSError as error:
            raise DataError(f"cannot read teacher weights {self.weights}: {error.strerror}") from None
        if self.recorded is not None and hashlib.sha256(data).hexdigest() != self.recorded:
            raise DataError(f"{self.weights} is truncated or was altered: {CONFIG} beside it records another sha256")
        return data

    def identity(self, weights: bytes) -> dict[str, Any]:
        """JSON-able identity with these ``weights``: their sha256, or that of what else decides the answers with it."""
        found = identity_of(self.config, weights)
        if self.code:
            try:
                own = hashlib.sha256(self.code.read_bytes()).hexdigest()
            except OSError as error:
                raise DataError(f"cannot read {self.code}: {error.strerror}") from None
            found["sha256"] = hashlib.sha256(f"{own} {found['sha256']}".encode()).hexdigest()
        if self.cast:  # data made in the precision of the files is another teacher's
            found["sha256"] = hashlib.sha256(f"float32 {found['sha256']}".encode()).hexdigest()
        return found


def config_json(config: ModelConfig, weights: bytes) -> bytes:
    """The ``config.json`` beside ``weights``: sealed, and with their sha256."""
    return dump_checked(config.model_dump(mode="json") | {WEIGHTS_SHA256: hashlib.sha256(weights).hexdigest()})


def parse_config(data: bytes, where: str) -> tuple[ModelConfig, str | None]:
    """A ``config.json`` and the sha256 it records of the weights. Raises DataError saying what is wrong with it."""
    try:
        values = load_checked(data)
    except ValueError as error:
        raise DataError(f"{where} is no model config: {error}") from None
    recorded = values.pop(WEIGHTS_SHA256, None)
    return stored_config(values, where), None if recorded is None else str(recorded)


def stored_config(values: Any, where: str) -> ModelConfig:
    """The configuration that a file holds. Raises DataError where it is none, or larger than any of ours."""
    try:
        config = ModelConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"{where} is no model config: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if len(config.class_names) != config.num_classes:
        raise DataError(f"{where}: {len(config.class_names)} class names for {config.num_classes} classes")
    class_count(config.num_classes, where)
    if config.channels != config.input.channels:
        raise DataError(f"{where}: channels is {config.channels}, but input.channels is {config.input.channels}")
    return config


def class_count(value: Any, where: str) -> int:
    """``value``, which ``where`` gives as the number of classes. Raises DataError where there is no choice."""
    if not isinstance(value, int) or not 1 < value <= MAX_CLASSES:
        raise DataError(f"{where}: number of classes is {value!r}; expected 2 to {MAX_CLASSES}")
    return value


def resolve(settings: ModelSettings) -> Source:
    """Find the configuration and weights that ``settings`` name.

    Raises UsageError where the name needs more settings, DataError where files are missing or do not fit.
    """
    if settings.name.endswith((".yaml", ".yml")):
        settings = _from_file(settings)
    folder = EMBEDDED.get(settings.name, Path(settings.name))
    if folder.is_dir():
        try:
            config, recorded = parse_config((folder / CONFIG).read_bytes(), str(folder / CONFIG))
        except OSError:
            raise DataError(f"{folder} is no model folder: it has no {CONFIG}") from None
        if settings.weights:
            return Source(_overridden(config, settings), Path(settings.weights))
        return Source(_overridden(config, settings), folder / WEIGHTS, recorded=recorded)
    scheme, rest = split_name(settings.name)
    if settings.name.startswith("embedded:"):
        raise UsageError(f"unknown model '{settings.name}': embedded are {', '.join(EMBEDDED)}")
    if scheme == "builtin" and ("/" in rest or rest.startswith(".")):
        raise DataError(f"model folder {rest} does not exist")
    facts: Facts = {}
    path: Path | None = Path(settings.weights) if settings.weights else None
    if scheme == "hf":
        home = fetch(rest, "classifier")
        facts, path = hf_facts(home), path or home / WEIGHTS
    elif scheme == "timm" and (Path(rest).is_dir() or ("." in rest and path is None)):
        home = fetch(rest if Path(rest).is_dir() or "/" in rest else f"timm/{rest}", "timm classifier")
        facts, path = timm_facts(home), path or home / WEIGHTS
    elif scheme == "onnx":
        path = Path(rest)
    if settings.weights and settings.num_classes not in (None, facts.get("num_classes", settings.num_classes)):
        facts = {key: facts[key] for key in facts.keys() - {"num_classes", "class_names"}}  # those of other weights
    _require(settings, facts, path is not None or scheme == "code")
    config = _overridden(_config(settings, facts), settings)
    code = source_file(rest) if scheme == "code" else None
    weights_file = path or code
    assert weights_file is not None
    return Source(config, weights_file, code, named=True, cast=facts.get("cast", False))


def _from_file(settings: ModelSettings) -> ModelSettings:
    """The settings in the YAML file ``settings.name``, under those that ``settings`` itself has."""
    path = Path(settings.name)
    try:
        content = yaml.safe_load(path.read_bytes())
        found = ModelSettings.model_validate(content)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise DataError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"{path} describes no model: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if found.name.endswith((".yaml", ".yml")):
        raise UsageError(f"{path}: name must be a model, not another YAML file")
    own = {key: value for key in ModelSettings.model_fields if (value := getattr(settings, key)) is not None}
    return found.model_copy(update=own | {"name": found.name})


def _require(settings: ModelSettings, facts: Facts, weights: bool) -> None:
    missing = [key for key in ("input", "num_classes") if getattr(settings, key) is None and key not in facts]
    missing = ([] if weights else ["weights"]) + missing
    if missing:
        why = "the files beside its weights do not tell" if facts else "is no folder; an architecture needs"
        raise UsageError(
            f"model '{settings.name}' {why} {', '.join(missing)}{': the recipe must' if facts else ' too'}"
        )


def _config(settings: ModelSettings, facts: Facts) -> ModelConfig:
    wanted = settings.input or facts["input"]  # one of them is there, see _require
    count = class_count(facts.get("num_classes") or settings.num_classes, settings.name)
    return ModelConfig(
        architecture=facts.get("architecture", settings.name),
        num_classes=count,
        channels=wanted.channels,
        input=wanted,
        class_names=settings.class_names or facts.get("class_names") or tuple(f"class {i}" for i in range(count)),
        stem=settings.stem or default_stem(settings.name, wanted.size),
    )


def _overridden(config: ModelConfig, settings: ModelSettings) -> ModelConfig:
    """``config`` with what the user set instead; counts that contradict the model are refused."""
    if settings.num_classes not in (None, config.num_classes):
        raise DataError(f"{settings.name} has {config.num_classes} classes, but num_classes is {settings.num_classes}")
    names = settings.class_names or config.class_names
    if len(names) != config.num_classes:
        raise DataError(f"{settings.name} has {config.num_classes} classes, but {len(names)} class names were given")
    picked = settings.input or config.input
    if picked.channels != config.channels:
        raise DataError(f"{settings.name} takes {config.channels} channels, but input.channels is {picked.channels}")
    stem = settings.stem or config.stem
    return config.model_copy(update={"class_names": names, "input": picked, "stem": stem})


def identity_of(config: ModelConfig, weights: bytes) -> dict[str, Any]:
    """JSON-able identity of an architecture with these weights, as manifests store it.

    ``builtin``: a copy travels with the dataset and is loaded after a hash check; ``external``: only ever named.
    """
    return {
        "kind": "builtin" if split_name(config.architecture)[0] == "builtin" else "external",
        "architecture": config.architecture,
        "sha256": hashlib.sha256(weights).hexdigest(),
        "config": config.model_dump(mode="json"),
    }


def teacher_identity(settings: ModelSettings) -> dict[str, Any]:
    """Identity of the classifier that ``settings`` name; reads and hashes its files."""
    source = resolve(settings)
    return source.identity(source.read())
