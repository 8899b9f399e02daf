"""From a model's name to its :class:`ModelSource`: configuration, files, checksums. Imports no torch.

A run resolves each name once (:func:`resolve`) and passes the source on: it reads and hashes the weights once.
"""

import hashlib
import operator
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from manifests.checked_json import dump_checked, first_fault, load_checked
from manifests.errors import DataError, UsageError, suggest
from manifests.plain_files import MAX_SETTINGS, load_yaml_file, read_regular
from stages.hub import inside
from stages.models.folders import (
    CONFIG,
    WEIGHTS,
    FolderFacts,
    fetch,
    hf_facts,
    read_weights,
    shards,
    timm_facts,
    timm_input,
    timm_layout,
    weights_in,
)
from stages.settings import MAX_CLASSES, SMALL, InputSettings, ModelSettings, Settings, Stem

Scheme = Literal["builtin", "timm", "torchvision", "hf", "onnx", "code"]
ASSETS = Path(__file__).resolve().parent.parent / "assets"
EMBEDDED = {"embedded:digits": ASSETS / "digits-teacher"}
WEIGHTS_SHA256 = "weights_sha256"
IMAGENET_NETS = ("resnet18", "resnet34", "vgg11", "mobilenetv2", "shufflenetv2")
"""Built-in networks whose first layers can be changed for small images (``stem``)."""
TIMM_HUB = ("hf-hub:", "hf_hub:", "local-dir:")
"""Prefixes of folders and hub ids in timm's own names."""
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


def is_self_contained(name: str) -> bool:
    """Whether the files behind ``name`` hold weights, input and classes, so that no further setting is needed.

    >>> is_self_contained("timm:someone/pets"), is_self_contained("timm:resnet18"), is_self_contained("resnet20")
    (True, False, False)
    """
    scheme, rest = split_name(name)
    if scheme == "timm":
        return is_timm_home(rest) or "." in rest
    return scheme == "hf" or name.startswith("embedded:") or name.endswith((".yaml", ".yml")) or Path(name).is_dir()


def is_timm_home(rest: str) -> bool:
    """Whether what follows ``timm:`` is a folder or a hub id, not one of timm's own names."""
    return bool(rest) and (Path(rest).is_dir() or "/" in rest or rest.startswith(TIMM_HUB))


def buildable_from_file(name: str) -> bool:
    """Whether a network may be built because a file names it: nothing is fetched and no foreign code runs.

    That holds for built-in, timm and torchvision architectures, and for transformers ones in a local folder.
    """
    scheme, rest = split_name(name)
    return scheme in ("builtin", "timm", "torchvision") or (scheme == "hf" and Path(rest).is_dir())


def default_stem(name: str, size: int, student: bool = False) -> Stem:
    """``small`` for ImageNet networks on images of up to 64 px: always for built-ins, for students also of timm and
    torchvision. A teacher's weights were trained with one stem or the other: its user says which.
    """
    scheme, rest = split_name(name)
    adaptable = rest in IMAGENET_NETS if scheme == "builtin" else student and scheme in ("timm", "torchvision")
    return "small" if adaptable and size <= SMALL else "native"


def source_file(name: str) -> Path:
    """The file of the module in ``module.path:function``, searched without running it: here, then on ``sys.path``.

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


class ModelConfig(Settings):
    """What ``config.json`` of a model folder holds: enough to rebuild the network around its weights.

    It may come from anybody's file, so only architectures that are :func:`buildable_from_file` are built from it.
    """

    architecture: str
    num_classes: int = Field(gt=0, le=MAX_CLASSES)
    channels: int = Field(gt=0, le=3)
    input: InputSettings
    class_names: tuple[str, ...]
    stem: Stem = "native"


class NamedConfig(ModelConfig):
    """A configuration whose architecture the user wrote, never a file: it may be code, a hub id or ONNX.

    ``arguments``: of timm's builder, as the model folder has them beside the architecture."""

    arguments: dict[str, Any] = Field(default_factory=dict, exclude_if=operator.not_)


OWN = "dfkd_factory"
"""The key of what is ours in a ``config.json`` of timm's layout."""


def config_json(config: ModelConfig, weights: bytes) -> bytes:
    """The ``config.json`` beside ``weights``, with its own checksum and their sha256: of a timm architecture that timm
    builds alike in its own layout, which holds ours under :data:`OWN`."""
    own = config.model_dump(mode="json") | {WEIGHTS_SHA256: hashlib.sha256(weights).hexdigest()}
    layout = layout_of(config)
    return dump_checked(layout | {OWN: own} if layout else own)


def layout_of(config: ModelConfig) -> dict[str, Any] | None:
    """timm's ``config.json`` of the model, None where that is not one of timm's as timm builds it."""
    scheme, name = split_name(config.architecture)
    if scheme != "timm" or config.stem != "native" or is_timm_home(name):
        return None
    arguments = config.arguments if isinstance(config, NamedConfig) else {}
    return timm_layout(name, config.num_classes, config.class_names, config.input, arguments)


def parse_config(data: bytes, where: str) -> tuple[ModelConfig, str | None]:
    """A ``config.json`` and the sha256 it records of the weights. Raises DataError saying what is wrong with it."""
    try:
        values = load_checked(data)
    except ValueError as error:
        raise DataError(f"{where} is no model config: {error}") from None
    values = values[OWN] if isinstance(values.get(OWN), dict) else values
    recorded = values.pop(WEIGHTS_SHA256, None)
    return check_config(values, where), None if recorded is None else str(recorded)


def check_config(values: Any, where: str) -> ModelConfig:
    """The configuration in a file's ``values``. Raises DataError where they are none, or contradict themselves."""
    try:
        config = ModelConfig.model_validate(values)
    except ValidationError as error:
        raise DataError(f"{where} is no model config: {first_fault(error)}") from None
    if len(config.class_names) != config.num_classes:
        raise DataError(f"{where}: {len(config.class_names)} class names for {config.num_classes} classes")
    check_class_count(config.num_classes, where)
    if config.channels != config.input.channels:
        raise DataError(f"{where}: channels is {config.channels}, but input.channels is {config.input.channels}")
    return config


def check_class_count(value: Any, where: str) -> int:
    """``value``, the number of classes in ``where``. Raises DataError where it is none."""
    if not isinstance(value, int) or not 1 < value <= MAX_CLASSES:
        raise DataError(f"{where}: number of classes is {value!r}; expected 2 to {MAX_CLASSES}")
    return value


@dataclass
class ModelSource:
    """A classifier's configuration and files. The weights are read and hashed once, when first needed.

    ``weights``, a file or the index of shards, is None where ``code``, the user's Python file, brings its own.
    ``folder``: that of a transformers model. ``checkpoint_key``: the table in the weights that the user named.
    ``sha256``: of the weights, as the model folder records it or as they were when first read. ``decisions``: what was
    settled and from what, for people (``architecture``, ``weights``, ``input``, ``classes``); what the loading settles
    is there once it is done.
    """

    config: ModelConfig
    weights: Path | None
    code: Path | None = None
    folder: Path | None = None
    half_precision: bool = False
    sha256: str | None = None
    checkpoint_key: str | None = None
    decisions: dict[str, str] = field(default_factory=dict, compare=False)
    _data: bytes | None = field(default=None, init=False, repr=False, compare=False)
    _external: dict[str, bytes] | None = field(default=None, init=False, repr=False, compare=False)
    _external_sha256: str | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def where(self) -> str:
        """The file that errors name."""
        return str(self.weights or self.code)

    def read(self) -> bytes:
        """The weights file, b"" where code brings its own; kept until :meth:`release`.

        Raises DataError if it cannot be read, or is not what the folder records or what was read before.
        """
        if self._data is None:
            data = read_weights(self.weights) if self.weights else b""
            sha256 = hashlib.sha256(data).hexdigest()
            if self.sha256 not in (None, sha256):
                raise DataError(
                    f"{self.weights} is truncated or was altered: its sha256 is {sha256}, expected {self.sha256}"
                )
            self._data, self.sha256 = data, sha256
        return self._data

    def external(self) -> dict[str, bytes]:
        """Files that the weights refer to, by the names in them: shards of an index, data of an ONNX model.

        Read, kept and compared like the weights.
        """
        if self._external is None:
            found = self._read_external()
            digests = "".join(f" {name} {hashlib.sha256(data).hexdigest()}" for name, data in found.items())
            if self._external_sha256 not in (None, digests):
                raise DataError(f"{self.weights}: the files that it refers to were altered while in use")
            self._external, self._external_sha256 = found, digests
        return self._external

    def _read_external(self) -> dict[str, bytes]:
        if self.weights is None:
            return {}
        if isinstance(self.config, NamedConfig) and split_name(self.config.architecture)[0] == "onnx":
            from stages.models.onnx_data import external_data

            return external_data(self.read(), self.weights)
        return {path.name: read_weights(path) for path in shards(self.weights)}

    def release(self) -> None:
        """Free the memory of what was read; a later :meth:`read` must find the same bytes."""
        self._data = self._external = None

    @cached_property
    def identity(self) -> dict[str, Any]:
        """JSON-able identity, as manifests store it. ``sha256`` covers all that decides the logits: the weights and the
        files that they refer to, the user's code, and the change of precision or the table among others where there is
        one."""
        found = identity_of(self.config, self.read())
        if self.code:
            try:
                code = hashlib.sha256(read_regular(self.code)).hexdigest()
            except OSError as error:
                raise DataError(f"cannot read {self.code}: {error.strerror}") from None
            found["sha256"] = hashlib.sha256(f"{code} {found['sha256']}".encode()).hexdigest()
        if self.external():
            found["sha256"] = hashlib.sha256(f"{found['sha256']}{self._external_sha256}".encode()).hexdigest()
        if self.half_precision:  # data made in the precision of the files is another teacher's
            found["sha256"] = hashlib.sha256(f"float32 {found['sha256']}".encode()).hexdigest()
        if self.checkpoint_key is not None:
            found["sha256"] = hashlib.sha256(f"{self.checkpoint_key} of {found['sha256']}".encode()).hexdigest()
        return found


def identity_of(config: ModelConfig, weights: bytes) -> dict[str, Any]:
    """JSON-able identity of an architecture with these weights.

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
    return resolve(settings).identity


def resolve(settings: ModelSettings) -> ModelSource:
    """The configuration and files of the classifier that ``settings`` name.

    Raises UsageError where the name needs more settings, DataError where files are missing or do not fit.
    """
    if settings.name.endswith((".yaml", ".yml")):
        settings = _from_yaml(settings)
    folder = EMBEDDED.get(settings.name, Path(settings.name))
    if folder.is_dir():
        return _from_folder(folder, settings)
    scheme, rest = split_name(settings.name)
    if settings.name.startswith("embedded:"):
        raise UsageError(f"unknown model '{settings.name}': {suggest(settings.name, EMBEDDED)}")
    if scheme == "builtin" and ("/" in rest or rest.startswith(".")) and not Path(rest).is_file():
        raise DataError(f"model folder {rest} does not exist")
    weights = _weights(settings)
    home, facts = None, FolderFacts()
    if scheme == "hf":
        home = fetch(rest, "classifier")
        facts = hf_facts(home)
    elif scheme == "timm" and (is_timm_home(rest) or ("." in rest and weights is None)):
        hub = rest.partition(":")[2] if rest.startswith(TIMM_HUB) else rest
        if not hub:
            raise UsageError(f"'{settings.name}' names no model: expected a folder, or org/name on the hub")
        home = fetch(hub if is_timm_home(hub) else f"timm/{hub}", "timm classifier")
        facts = timm_facts(home)
    elif scheme == "onnx":
        weights = Path(rest)
        facts = onnx_facts(weights)
    if settings.weights and settings.num_classes not in (None, facts.num_classes or settings.num_classes):
        facts = replace(facts, num_classes=None, class_names=None)  # those of other weights
    if weights is None and home:
        weights = weights_in(home)
    needed = {
        "weights": weights or scheme == "code",
        "input": settings.input or facts.input,
        "num_classes": settings.num_classes or facts.num_classes,
    }
    if missing := [key for key, value in needed.items() if not value]:
        raise UsageError(f"model '{settings.name}' {_why_missing(missing, settings.name, home, facts)}")
    config = _overridden(_named_config(settings, facts), settings)
    code = source_file(rest) if scheme == "code" else None
    return ModelSource(
        config,
        weights,
        code,
        folder=home if scheme == "hf" else None,
        half_precision=facts.half_precision,
        checkpoint_key=settings.checkpoint_key,
        decisions=_decisions(config, settings, facts),
    )


def onnx_facts(path: Path) -> FolderFacts:
    """What an ONNX file that was exported here says of itself; nothing of any other."""
    from stages.models.onnx_data import stated_facts

    facts = stated_facts(path)
    try:
        rule = InputSettings.model_validate(facts["input"])
        names = tuple(map(str, facts["class_names"]))
        count = check_class_count(facts["num_classes"], str(path))
    except (KeyError, TypeError, ValidationError, DataError):
        return FolderFacts()
    stated = f"the metadata of {path}"
    decisions = {"architecture": stated, "input": stated, "classes": f"names from {stated}"}
    return FolderFacts(None, count, names if len(names) == count else None, rule, decisions=decisions)


def _weights(settings: ModelSettings) -> Path | None:
    """The file that the user named, or that in the folder that the user named."""
    path = Path(settings.weights) if settings.weights else None
    return weights_in(path) if path and path.is_dir() else path


def _why_missing(missing: Sequence[str], name: str, home: Path | None, facts: FolderFacts) -> str:
    """What is missing for the model ``name`` besides its ``home``, why, and what would be right."""
    keys = ", ".join(missing)
    if home:
        why = facts.decisions.get("input", "") if "input" in missing else ""
        return f"needs {keys} in its settings: {home} does not say it" + (f" ({why})" if why else "")
    if name.lower().endswith((".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".pth.tar")):
        return f"holds weights: name what they fill, with weights: {name} (factory init {name} writes such a recipe)"
    if re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", name):
        return f"is no folder; own code is named {':'.join(name.rsplit('.', 1))}, with input and num_classes"
    usual = usual_input(name) if "input" in missing else None
    said = f" (with the weights of the library: input: {usual.yaml()})" if usual else ""
    return f"is no folder; an architecture needs {keys} too{said}"


def usual_input(name: str) -> InputSettings | None:
    """What the library's own weights of a torchvision or timm architecture take, where that can be said."""
    scheme, rest = split_name(name)
    try:
        if scheme == "timm":
            import timm

            cfg = timm.get_pretrained_cfg(rest)
            rule = timm_input(cfg.to_dict(), {}) if cfg else None
            return rule if isinstance(rule, InputSettings) else None
        if scheme == "torchvision":
            from torchvision import models

            preset = models.get_model_weights(rest).DEFAULT.transforms()
            values = {"size": preset.crop_size[0], "resize_size": preset.resize_size[0], "mean": preset.mean}
            return InputSettings.model_validate(values | {"std": preset.std, "resize": preset.interpolation.value})
    except (ImportError, AttributeError, KeyError, ValueError, RuntimeError):  # no such name, or none of these fields
        pass
    return None


def _decisions(config: ModelConfig, settings: ModelSettings, facts: FolderFacts) -> dict[str, str]:
    """What was settled of ``config``, and from what."""
    arguments = dict(getattr(config, "arguments", {}))
    with_them = f" with {', '.join(f'{key} {value}' for key, value in arguments.items())}" if arguments else ""
    names = ", ".join(config.class_names[:3]) + (", …" if config.num_classes > 3 else "")
    of_names = "names from the settings" if settings.class_names else facts.decisions.get("classes", "without names")
    return {
        "architecture": f"{config.architecture}{with_them}, stem {config.stem}; "
        f"from {facts.decisions.get('architecture', 'the settings')}",
        "input": f"{config.input}; from {'the settings' if settings.input else facts.decisions.get('input', CONFIG)}",
        "classes": f"{config.num_classes} ({names}); {of_names}",
    }


def _from_yaml(settings: ModelSettings) -> ModelSettings:
    """The settings in the YAML file ``settings.name``, or those of the teacher in such a recipe, under those that
    ``settings`` itself has."""
    path = Path(settings.name)
    values = load_yaml_file(path)[0]
    if isinstance(values, dict) and isinstance(synth := values.get("synth"), dict):
        values = synth.get("teacher")
        if values is None:
            raise UsageError(f"{path} is a recipe that names no synth.teacher itself")
    try:
        stored = ModelSettings.model_validate(values)
    except ValidationError as error:
        raise UsageError(f"{path} describes no model: {first_fault(error)}") from None
    if stored.name.endswith((".yaml", ".yml")):
        raise UsageError(f"{path}: name must be a model, not another YAML file")
    given = {key: value for key in ModelSettings.model_fields if (value := getattr(settings, key)) is not None}
    return stored.model_copy(update=given | {"name": stored.name})


def _from_folder(folder: Path, settings: ModelSettings) -> ModelSource:
    try:
        config, recorded = parse_config(read_regular(inside(folder, CONFIG), MAX_SETTINGS), str(folder / CONFIG))
    except FileNotFoundError:
        raise DataError(f"{folder} is no model folder: it has no {CONFIG}") from None
    except OSError as error:
        raise DataError(f"cannot read {folder / CONFIG}: {error.strerror}") from None
    config = _overridden(config, settings)
    stored = f"{CONFIG} of {folder}"
    facts = FolderFacts(decisions={"architecture": stored, "input": stored, "classes": f"names from {stored}"})
    decisions, key = _decisions(config, settings, facts), settings.checkpoint_key
    if weights := _weights(settings):
        return ModelSource(config, weights, checkpoint_key=key, decisions=decisions)
    return ModelSource(config, inside(folder, WEIGHTS), sha256=recorded, checkpoint_key=key, decisions=decisions)


def _named_config(settings: ModelSettings, facts: FolderFacts) -> NamedConfig:
    spec = settings.input or facts.input
    assert spec is not None
    count = check_class_count(facts.num_classes or settings.num_classes, settings.name)
    return NamedConfig(
        architecture=facts.architecture or settings.name,
        num_classes=count,
        channels=spec.channels,
        input=spec,
        class_names=settings.class_names or facts.class_names or tuple(f"class {i}" for i in range(count)),
        arguments=dict(facts.arguments),
        stem=settings.stem or default_stem(settings.name, spec.size),
    )


def _overridden(config: ModelConfig, settings: ModelSettings) -> ModelConfig:
    """``config`` with what the user set instead; counts that contradict the model are refused."""
    if settings.num_classes not in (None, config.num_classes):
        raise DataError(f"{settings.name} has {config.num_classes} classes, but num_classes is {settings.num_classes}")
    names = settings.class_names or config.class_names
    if len(names) != config.num_classes:
        raise DataError(f"{settings.name} has {config.num_classes} classes, but {len(names)} class names were given")
    spec = settings.input or config.input
    if spec.channels != config.channels:
        raise DataError(f"{settings.name} takes {config.channels} channels, but input.channels is {spec.channels}")
    return config.model_copy(update={"class_names": names, "input": spec, "stem": settings.stem or config.stem})
