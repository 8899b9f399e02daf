"""Which classifier is meant, and which weights exactly. Imports no torch: plans are made without it."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from manifests.errors import DataError, UsageError
from manifests.sealed import seal, unseal
from stages.models.own_configs import Facts, fetch, hf_facts, timm_facts
from stages.models.schemes import default_stem, source_file, split_name
from stages.models.settings import InputSettings, ModelSettings, Settings, Stem

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
    return seal(config.model_dump(mode="json") | {WEIGHTS_SHA256: hashlib.sha256(weights).hexdigest()})


def parse_config(data: bytes, where: str) -> tuple[ModelConfig, str | None]:
    """A ``config.json`` and the sha256 it records of the weights. Raises DataError saying what is wrong with it."""
    try:
        values = unseal(data)
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
