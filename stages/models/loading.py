"""Load and save classifiers: model folders, safetensors, ``weights_only`` checkpoints. Nothing is ever unpickled."""

import hashlib
import io
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from manifests.errors import DataError, UsageError
from manifests.reader import Manifest
from stages.models import build
from stages.models.hooks import head_path
from stages.models.nets import torchvision_names
from stages.models.source import (
    CONFIG,
    IMAGENET_NETS,
    WEIGHTS,
    ModelConfig,
    check_stored,
    config_json,
    identity_of,
    resolve,
    split_name,
    stored_config,
)
from stages.models.teacher import BlackBox, Teacher, onnx_answer
from stages.settings import ModelSettings

WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel and torch.compile
CIFAR_NAMES = ("resnet18", "resnet34")  # also circulate with names of CIFAR code bases
NESTED = ("state_dict", "model", "net")  # keys under which checkpoints keep the weights


def unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameter names without wrapper prefixes, however they are nested.

    >>> list(unwrapped({"module._orig_mod.fc.weight": torch.zeros(1)}))
    ['fc.weight']
    """
    clean = {}
    for name, value in state.items():
        while name.startswith(WRAPPERS):
            name = name.split(".", 1)[1]
        clean[name] = value
    return clean


def parse_weights(data: bytes, where: str) -> dict[str, Tensor]:
    """Named tensors of a safetensors or ``torch.save`` file, told apart by content, not by name.

    Raises DataError if it is damaged or holds code.
    """
    try:
        if data[8:9] == b"{" or where.endswith(".safetensors"):  # a JSON object after its length, as no pickle or zip
            state: Any = safetensors.torch.load(data)
        else:
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            for key in NESTED:
                state = state[key] if isinstance(state, Mapping) and isinstance(state.get(key), Mapping) else state
    except SafetensorError as error:
        raise DataError(f"{where} is truncated or no safetensors file: {error}") from None
    except Exception as error:  # torch.load raises pickle, zip, runtime and value errors alike
        reason = (str(error).splitlines() or [type(error).__name__])[0]  # EOFError says nothing
        raise DataError(f"{where} is damaged or holds more than weights: {reason}") from None
    named = isinstance(state, Mapping) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
    if not named:
        raise DataError(f"{where} holds no table of named tensors")
    return unwrapped(state)


def fill(net: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Load ``state`` into ``net``, all or nothing. Raises DataError naming keys and shapes that do not fit."""
    own = net.state_dict()
    optional = {name for name in own if name.endswith("num_batches_tracked")}  # old checkpoints lack it
    missing = sorted(own.keys() - state.keys() - optional)
    unexpected = sorted(state.keys() - own.keys())
    shapes = [
        f"{n} {tuple(v.shape)} for {tuple(own[n].shape)}"
        for n, v in state.items()
        if n in own and v.shape != own[n].shape
    ]
    for what, found in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)):
        if found:
            more = f" and {len(found) - 4} more" if len(found) > 4 else ""
            raise DataError(f"{where} does not fit {type(net).__name__}: {what}: {', '.join(found[:4])}{more}")
    net.load_state_dict(dict(state), strict=not (optional - state.keys()))


def build_from(config: ModelConfig, weights: bytes, where: str, named: bool = False) -> nn.Module:
    """The network of ``config`` around ``weights``, on the CPU. Raises DataError where they do not fit.

    ``named`` tells that the user wrote the architecture's name: only then may it be foreign code.
    """
    if not named:
        check_stored(config.architecture, where)
    state = parse_weights(weights, where)
    if split_name(config.architecture)[0] == "hf":
        return build.build_hf(config, state, where)
    return filled(build.build_net(config, named), config, state, where)


def filled(net: nn.Module, config: ModelConfig, state: Mapping[str, Tensor], where: str) -> nn.Module:
    """``net`` with the weights in ``state``."""
    if config.architecture in CIFAR_NAMES:
        state = torchvision_names(state)
    head = state.get(f"{head_path(net)}.weight")
    if head is not None and head.shape[0] != config.num_classes:
        raise DataError(f"{where} has {head.shape[0]} classes, but {config.num_classes} were asked for")
    try:
        fill(net, state, where)
    except DataError as error:
        raise DataError(f"{error}{stem_hint(config)}") from None
    return net


def stem_hint(config: ModelConfig) -> str:
    """What to try where weights do not fit an ImageNet network at a small size; empty elsewhere."""
    scheme, rest = split_name(config.architecture)
    if scheme not in ("timm", "torchvision") and rest not in IMAGENET_NETS:
        return ""
    other = "small" if config.stem == "native" else "native"
    return f" (built with stem: {config.stem}; if it was trained with the other one, set stem: {other})"


def load_model(name: str | Path) -> tuple[nn.Module, ModelConfig]:
    """The network of a model folder, or of a YAML file that names one, on the CPU in eval mode; its configuration.

    Raises UsageError where the folder names the user's own code or a hub id: those are loaded by name only.
    """
    source = resolve(ModelSettings(name=str(name)))
    config, data = source.config, source.read()
    if source.named and (split_name(config.architecture)[0] == "onnx" or source.weights == source.code):
        net = build.build_net(config, named=True)  # without weights, or with its own
    else:
        net = build_from(config, data, str(source.weights), source.named)
    return net.eval(), config


def load_teacher(settings: ModelSettings, device: str | torch.device = "cpu") -> Teacher:
    """The classifier that ``settings`` name, frozen. Its identity is that of the very bytes that were loaded."""
    source = resolve(settings)
    data, where, config = source.read(), str(source.weights), source.config
    identity, scheme = source.identity(data), split_name(config.architecture)[0]
    if source.named and scheme == "onnx":
        return BlackBox(onnx_answer(data, where), config.input, config.class_names, identity).check()
    if source.named and scheme == "code":
        made = build.call_code(config)
        if not isinstance(made, nn.Module):
            if not callable(made) or data:
                what = "weights cannot be loaded into it" if data else "expected a network or a function"
                raise UsageError(f"'{config.architecture}' returns {type(made).__name__}: {what}")
            return BlackBox(made, config.input, config.class_names, identity).check()
        net = build.finish(made, config)
        if source.weights != source.code:  # otherwise it brings its own
            net = filled(net, config, parse_weights(data, where), where)
    else:
        net = build_from(config, data, where, source.named)
    return Teacher(net.to(device), config.input, config.class_names, identity).check()


def teacher_from(config: ModelConfig, weights: bytes, where: str, device: str | torch.device = "cpu") -> Teacher:
    """A frozen classifier from bytes that were already read; ``where`` names them in errors. Runs no foreign code."""
    net = build_from(config, weights, where)
    return Teacher(net.to(device), config.input, config.class_names, identity_of(config, weights)).check()


def model_files(net: nn.Module, config: ModelConfig) -> dict[str, bytes]:
    """What a model folder holds, by file name, in the order to write it."""
    state = {name: value.detach().cpu().contiguous() for name, value in unwrapped(net.state_dict()).items()}
    weights = safetensors.torch.save(state)
    return {WEIGHTS: weights, CONFIG: config_json(config, weights)}


def save_model(folder: str | Path, net: nn.Module, config: ModelConfig) -> None:
    """Write a model folder; each file is replaced atomically."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, data in model_files(net, config).items():
        _replace(Path(folder) / name, data)


def _replace(path: Path, data: bytes) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


# The teacher that a dataset carries. Used by ``factory run distill``, ``rescore`` and ``inspect``.


ASK = "name the teacher with --teacher"


def carried_teacher(manifest: Manifest, device: str | torch.device = "cpu", ask: str = ASK) -> Teacher:
    """The frozen built-in teacher whose weights lie beside ``manifest``, loaded after a check of their sha256.

    Raises DataError where the manifest carries none or its files were altered; ``ask`` says what would help.
    """
    identity: dict[str, Any] = manifest.info.teacher
    sha256 = identity.get("sha256")
    if identity.get("kind") != "builtin" or not isinstance(identity.get("path"), str):
        known = f"its sha256 is {sha256}" if sha256 else "its checksum is not recorded"
        raise DataError(f"{manifest.url} does not carry its teacher, {known}: {ask}")
    where, config = manifest.storage.path(identity["path"]), carried_config(manifest, ask)
    weights = manifest.storage.read(identity["path"])
    found = hashlib.sha256(weights).hexdigest()
    if found != sha256:  # before anything is built from them
        raise DataError(f"{where} was altered: sha256 {found}, expected {sha256}; restore it, or {ask}")
    return teacher_from(config, weights, where, device)


def carried_config(manifest: Manifest, ask: str = ASK) -> ModelConfig:
    """The config of the built-in teacher of ``manifest``. Raises DataError where that is damaged or another kind."""
    try:
        config = stored_config(manifest.info.teacher.get("config"), f"{manifest.url}: its teacher's config")
    except DataError as error:
        raise DataError(f"{error}; {ask}") from None
    if split_name(config.architecture)[0] != "builtin":
        raise DataError(f"{manifest.url} calls '{config.architecture}' a built-in teacher, which it is not: {ask}")
    return config


def check_classes(teacher: Teacher, manifest: Manifest) -> None:
    """Raises DataError where ``teacher`` does not know the classes of ``manifest``, in their order."""
    check_class_names(teacher, manifest.info.class_names, manifest.url)


def check_class_names(teacher: Teacher, names: tuple[str, ...], where: str) -> None:
    """Raises DataError where ``teacher`` has another number of classes than ``names`` of ``where``, or has a class of
    them under another number. Other names are no contradiction: a teacher may have none."""
    if len(names) != teacher.num_classes:
        raise DataError(f"{where} has {len(names)} classes, the teacher {teacher.num_classes}")
    if names == teacher.class_names:
        return
    count = Counter((*names, *teacher.class_names))
    numbers = {name: number for number, name in enumerate(teacher.class_names)}
    for number, name in enumerate(names):
        other = numbers.get(name, number)
        if other != number and count[name] == 2:  # a name that several classes have tells nothing
            places = f"{name!r} is class {number} and class {other}"
            raise DataError(f"{where} and the teacher have the same classes in another order: {places}")
