"""Load and save classifiers: model folders, safetensors, ``weights_only`` checkpoints. Nothing is ever unpickled."""

import hashlib
import io
import os
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from manifests.errors import DataError, UsageError
from manifests.reader import Manifest
from stages.models.build import build_hf, build_net, call_code, finish, refuse_misfits, require_buildable
from stages.models.folders import CONFIG, WEIGHTS, fetch
from stages.models.hooks import head_path
from stages.models.nets import torchvision_names
from stages.models.source import (
    IMAGENET_NETS,
    ModelConfig,
    ModelSource,
    NamedConfig,
    check_config,
    config_json,
    identity_of,
    resolve,
    split_name,
)
from stages.models.teacher import (
    Answer,
    BlackBox,
    Teacher,
    kind_of_answers,
    log_probabilities,
    onnx_answer,
)
from stages.settings import ModelSettings

WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel and torch.compile
CIFAR_NAMES = ("resnet18", "resnet34")  # also circulate with names of CIFAR code bases
NESTED = ("state_dict", "model", "net")  # keys under which checkpoints keep the weights


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
    if not isinstance(state, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise DataError(f"{where} holds no table of named tensors")
    return unwrapped(state)


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


def fill(net: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Load ``state`` into ``net``, all or nothing. Raises DataError naming keys and shapes that do not fit.

    A ``net`` on the meta device is only compared with it.
    """
    expected = net.state_dict()
    optional = {name for name in expected if name.endswith("num_batches_tracked")}  # old checkpoints lack it
    problems = {
        "missing": sorted(expected.keys() - state.keys() - optional),
        "unexpected": sorted(state.keys() - expected.keys()),
        "of another shape": [
            f"{name} {tuple(value.shape)} for {tuple(expected[name].shape)}"
            for name, value in state.items()
            if name in expected and value.shape != expected[name].shape
        ],
    }
    refuse_misfits(problems, type(net).__name__, where)
    if not any(value.is_meta for value in expected.values()):
        net.load_state_dict(dict(state), strict=not (optional - state.keys()))


def filled(net: nn.Module, config: ModelConfig, state: Mapping[str, Tensor], where: str) -> nn.Module:
    """``net``, built from ``config``, with the weights in ``state``. Raises DataError where they do not fit."""
    if config.architecture in CIFAR_NAMES:
        state = torchvision_names(state)
    head = state.get(f"{head_path(net)}.weight")
    if head is not None and head.shape[0] != config.num_classes:
        raise DataError(f"{where} has {head.shape[0]} classes, but {config.num_classes} were asked for")
    try:
        fill(net, state, where)
    except DataError as error:
        scheme, rest = split_name(config.architecture)
        if scheme not in ("timm", "torchvision") and rest not in IMAGENET_NETS:
            raise
        other = "small" if config.stem == "native" else "native"
        raise DataError(
            f"{error} (built with stem: {config.stem}; if it was trained with the other one, set stem: {other})"
        ) from None
    return net


def build_from(config: ModelConfig, weights: bytes, where: str) -> nn.Module:
    """The network of ``config`` around ``weights``, the content of the file ``where``, on the CPU.

    Raises DataError where they do not fit, UsageError where a file names what only the user may name.
    """
    require_buildable(config, where)
    state = parse_weights(weights, where)
    scheme, rest = split_name(config.architecture)
    if scheme == "hf":
        return build_hf(config, fetch(rest, "classifier"), state, where)
    return filled(build_net(config), config, state, where)


def load_network(source: ModelSource) -> nn.Module | Answer:
    """The network of ``source`` with its weights, on the CPU; of a black box, the function that answers.

    Own code and ONNX that answer probabilities answer their logarithms from here on, which ``source.decisions`` say.
    """
    config, data, where = source.config, source.read(), source.where
    scheme = split_name(config.architecture)[0] if isinstance(config, NamedConfig) else "builtin"
    if scheme == "onnx":
        return _logits_from(onnx_answer(data, where, source.external()), source)
    if scheme == "code":
        made = call_code(config)
        if isinstance(made, nn.Module):
            net = finish(made, config)
            net = filled(net, config, parse_weights(data, where), where) if source.weights else net
            return _logits_from(net.eval(), source)
        if not callable(made) or data:
            what = "weights cannot be loaded into it" if data else "expected a network or a function"
            raise UsageError(f"'{config.architecture}' returns {type(made).__name__}: {what}")
        return _logits_from(made, source)
    if source.folder:
        return build_hf(config, source.folder, parse_weights(data, where), where)
    return build_from(config, data, where)


def _logits_from(answer: Any, source: ModelSource) -> Any:
    """``answer`` again, or the logarithm of its probabilities."""
    config = source.config
    kind = kind_of_answers(answer, config.input, config.num_classes)
    if kind != "probabilities":
        if kind == "unit":
            source.decisions["outputs"] = (
                "in [0, 1] without a sum of 1, taken as logits: return logits if they are none"
            )
        return answer
    source.decisions["outputs"] = "probabilities (in [0, 1], sum 1): their logarithms are taken as logits"
    change = partial(log_probabilities, num_classes=config.num_classes, what=f"'{config.architecture}'")
    if isinstance(answer, nn.Module):
        answer.register_forward_hook(lambda _module, _inputs, out: change(out))
        return answer
    return lambda x: change(answer(x))


def load_model(name: str | Path | ModelSource) -> tuple[nn.Module, ModelConfig]:
    """The network of a model folder, or of a YAML file that names one, on the CPU in eval mode; its configuration.

    Raises UsageError for a black box, and where the folder names code or a hub id: those are loaded by name only.
    """
    source = name if isinstance(name, ModelSource) else resolve(ModelSettings(name=str(name)))
    net = load_network(source)
    if not isinstance(net, nn.Module):
        what = f"'{source.config.architecture}'"
        raise UsageError(f"{what} is a black box: it scores images as a teacher, and nothing else")
    return net.eval(), source.config


def load_teacher(model: ModelSettings | ModelSource, device: str | torch.device = "cpu") -> Teacher:
    """The classifier ``model``, frozen. Its identity is that of the very bytes that were loaded."""
    source = model if isinstance(model, ModelSource) else resolve(model)
    config, identity, net = source.config, source.identity, load_network(source)
    if isinstance(net, nn.Module):
        return Teacher(net.to(device), config.input, config.class_names, identity).check()
    return BlackBox(net, config.input, config.class_names, identity).check()


def untrained_teacher(model: ModelSource | ModelConfig, device: str = "meta") -> Teacher | None:
    """The network of ``model`` with random weights, by default as shapes alone, to count what it costs; None for a
    black box. Reads no weights. Raises UsageError where it cannot be built.
    """
    config, folder = (model.config, model.folder) if isinstance(model, ModelSource) else (model, None)
    scheme = split_name(config.architecture)[0] if isinstance(config, NamedConfig) else None
    if scheme == "onnx":
        return None
    if scheme == "code":  # may build its network from files, which a default device would break
        made = call_code(config)
        if not isinstance(made, nn.Module):
            return None
        net = finish(made, config).to(device)
    else:
        with torch.device(device):
            net = build_hf(config, folder) if folder else build_net(config)
    return Teacher(net, config.input, config.class_names, {"architecture": config.architecture})


def model_files(net: nn.Module, config: ModelConfig) -> dict[str, bytes]:
    """What a model folder holds, by file name, in the order to write it."""
    state = {name: value.detach().cpu().contiguous() for name, value in unwrapped(net.state_dict()).items()}
    weights = safetensors.torch.save(state)
    return {WEIGHTS: weights, CONFIG: config_json(config, weights)}


def source_files(source: ModelSource) -> dict[str, bytes]:
    """:func:`model_files` of a built-in ``source``: its own bytes if they are safetensors, else converted.

    Raises DataError where the weights are damaged or do not fit.
    """
    config, data = source.config, source.read()
    if not source.where.endswith(".safetensors"):
        return model_files(build_from(config, data, source.where), config)
    with torch.device("meta"):
        net = build_net(config)
    filled(net, config, parse_weights(data, source.where), source.where)
    return {WEIGHTS: data, CONFIG: config_json(config, data)}


def save_model(folder: str | Path, net: nn.Module, config: ModelConfig) -> None:
    """Write a model folder; each file is replaced atomically."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, data in model_files(net, config).items():
        path = Path(folder) / name
        part = path.with_name(f".{path.name}.{os.getpid()}")
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)


ASK = "name the teacher with --teacher"


def dataset_teacher(manifest: Manifest, device: str | torch.device = "cpu", ask: str = ASK) -> Teacher:
    """The frozen built-in teacher whose weights lie beside ``manifest``, loaded after a check of their sha256.

    Raises DataError where there is none or its files were altered; ``ask`` says what would help.
    """
    identity: dict[str, Any] = manifest.info.teacher
    sha256 = identity.get("sha256")
    if identity.get("kind") != "builtin" or not isinstance(identity.get("path"), str):
        known = f"its sha256 is {sha256}" if sha256 else "its checksum is not recorded"
        raise DataError(f"{manifest.url} does not carry its teacher, {known}: {ask}")
    where, config = manifest.storage.path(identity["path"]), dataset_teacher_config(manifest, ask)
    weights = manifest.storage.read(identity["path"])
    actual = hashlib.sha256(weights).hexdigest()
    if actual != sha256:  # before anything is built from them
        raise DataError(f"{where} was altered: sha256 {actual}, expected {sha256}; restore it, or {ask}")
    net = build_from(config, weights, where)
    return Teacher(net.to(device), config.input, config.class_names, identity_of(config, weights)).check()


def dataset_teacher_config(manifest: Manifest, ask: str = ASK) -> ModelConfig:
    """The config of the built-in teacher of ``manifest``. Raises DataError where that is damaged or another kind."""
    try:
        config = check_config(manifest.info.teacher.get("config"), f"{manifest.url}: its teacher's config")
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
