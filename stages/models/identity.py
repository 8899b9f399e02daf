"""Which classifier is meant, and which weights exactly. Imports no torch: plans are made without it."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from manifests.errors import DataError, UsageError
from stages.models.settings import InputSettings, ModelSettings, Settings

ASSETS = Path(__file__).resolve().parent.parent / "assets"
EMBEDDED = {"embedded:digits": ASSETS / "digits-teacher"}
CONFIG, WEIGHTS = "config.json", "model.safetensors"


class ModelConfig(Settings):
    """What ``config.json`` of a model folder holds: enough to rebuild the network around its weights."""

    architecture: str
    num_classes: int
    channels: int
    input: InputSettings
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """A classifier on disk: its configuration and the weights that belong to it."""

    config: ModelConfig
    weights: Path

    def read(self) -> bytes:
        """The weights file. Raises DataError if it cannot be read."""
        try:
            return self.weights.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read teacher weights {self.weights}: {error.strerror}") from None


def parse_config(data: bytes, where: str) -> ModelConfig:
    """A ``config.json``. Raises DataError saying what is wrong with it."""
    try:
        config = ModelConfig.model_validate(json.loads(data))
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"{where} is no model config: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except ValueError as error:
        raise DataError(f"{where} is not JSON: {error}") from None
    if len(config.class_names) != config.num_classes:
        raise DataError(f"{where}: {len(config.class_names)} class names for {config.num_classes} classes")
    return config


def resolve(settings: ModelSettings) -> Source:
    """Find the configuration and weights that ``settings`` name.

    Raises UsageError where the name needs more settings, DataError where files are missing or do not fit.
    """
    folder = EMBEDDED.get(settings.name, Path(settings.name))
    if folder.is_dir():
        try:
            config = parse_config((folder / CONFIG).read_bytes(), str(folder / CONFIG))
        except OSError:
            raise DataError(f"{folder} is no model folder: it has no {CONFIG}") from None
        weights = Path(settings.weights) if settings.weights else folder / WEIGHTS
        return Source(_overridden(config, settings), weights)
    if settings.name.startswith("embedded:"):
        raise UsageError(f"unknown model '{settings.name}': embedded are {', '.join(EMBEDDED)}")
    if "/" in settings.name or settings.name.startswith("."):
        raise DataError(f"model folder {settings.name} does not exist")
    missing = [key for key in ("weights", "input", "num_classes") if getattr(settings, key) is None]
    if missing:
        raise UsageError(f"model '{settings.name}' is no folder; an architecture needs {', '.join(missing)} too")
    assert settings.weights is not None
    assert settings.input is not None
    assert settings.num_classes is not None
    names = settings.class_names or tuple(f"class {i}" for i in range(settings.num_classes))
    config = ModelConfig(
        architecture=settings.name,
        num_classes=settings.num_classes,
        channels=settings.input.channels,
        input=settings.input,
        class_names=names,
    )
    return Source(_overridden(config, settings), Path(settings.weights))


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
    return config.model_copy(update={"class_names": names, "input": picked})


def identity_of(config: ModelConfig, weights: bytes) -> dict[str, Any]:
    """JSON-able identity of a built-in architecture with these weights, as manifests store it."""
    return {
        "kind": "builtin",
        "architecture": config.architecture,
        "sha256": hashlib.sha256(weights).hexdigest(),
        "config": config.model_dump(mode="json"),
    }


def teacher_identity(settings: ModelSettings) -> dict[str, Any]:
    """Identity of the classifier that ``settings`` name; reads and hashes its weights file."""
    source = resolve(settings)
    return identity_of(source.config, source.read())
