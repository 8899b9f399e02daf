"""Load and save classifiers: model folders, weights files of any origin. Nothing is ever unpickled."""

import hashlib
import os
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from manifests.errors import DataError, FactoryError, UsageError
from manifests.reader import Manifest
from stages.models import nets
from stages.models.build import TRANSFORMED, build_hf, build_net, call_code, finish, require_buildable
from stages.models.checkpoints import Checkpoint, read_checkpoint
from stages.models.folders import CONFIG, WEIGHTS, fetch
from stages.models.hooks import head_path
from stages.models.matching import Misfit, Weights, find_weights, largest_table
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
from stages.settings import ModelSettings, Stem


def fill(net: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy ``weights``, all tensors of ``net`` as :func:`find_weights` gives them, into it. On the meta device there is
    nothing to copy to."""
    current = net.state_dict()
    if any(isinstance(value, Tensor) and value.is_meta for value in current.values()):
        return
    state = type(current)(current)  # with what old files lack: num_batches_tracked
    state.update(weights)
    state._metadata = current._metadata  # type: ignore[attr-defined]  # versions, without which MNASNet refuses
    net.load_state_dict(state)


def filled(
    net: nn.Module, config: ModelConfig, checkpoint: Checkpoint, key: str | None = None
) -> tuple[nn.Module, Weights]:
    """``net``, built from ``config``, with its weights in ``checkpoint``; what these were.

    A built-in network whose layers differ elsewhere under the same name is built as the weights have it. Raises
    DataError where they do not fit; UsageError where ``checkpoint`` lacks the table ``key``.
    """
    try:
        weights = find_weights(checkpoint, net, key, _biases(net, config))
    except Misfit as misfit:
        other = _variant(net, config, checkpoint, key)
        if other is not None:
            return other
        head = misfit.state.get(f"{head_path(net)}.weight")
        if head is not None and head.ndim and head.shape[0] != config.num_classes:
            classes = f"{len(head)} classes, but {config.num_classes} were asked for"
            raise DataError(f"{checkpoint.where} has {classes}") from None
        if stem := _fitting_stem(config, checkpoint, key):
            raise DataError(f"{misfit} (it was trained with the other first layers: set stem: {stem})") from None
        raise
    fill(net, weights.state)
    return net, weights


def _biases(net: nn.Module, config: ModelConfig) -> dict[str, str]:
    return nets.biases_before_norm(net) if split_name(config.architecture)[0] == "builtin" else {}


def _variant(
    net: nn.Module, config: ModelConfig, checkpoint: Checkpoint, key: str | None
) -> tuple[nn.Module, Weights] | None:
    if config.architecture not in nets.VARIANTS:
        return None
    with next(net.parameters()).device:
        other = build_net(config, variant=True)
    try:
        weights = find_weights(checkpoint, other, key, _biases(other, config))
    except Misfit:
        return None
    fill(other, weights.state)
    text = f"{weights.line or checkpoint.where}, built with {nets.VARIANTS[config.architecture].what}"
    return other, replace(weights, line=text)


def _fitting_stem(config: ModelConfig, checkpoint: Checkpoint, key: str | None) -> Stem | None:
    """The other stem, where the weights fit a network with that."""
    scheme, rest = split_name(config.architecture)
    if scheme not in ("timm", "torchvision") and rest not in IMAGENET_NETS:
        return None
    stem: Stem = "native" if config.stem == "small" else "small"
    for variant in {False, config.architecture in nets.VARIANTS}:
        with suppress(FactoryError):
            with torch.device("meta"):
                net = build_net(config.model_copy(update={"stem": stem}), variant)
            find_weights(checkpoint, net, key, _biases(net, config))
            return stem
    return None


def build_from(
    config: ModelConfig, files: Mapping[str, bytes], where: str, key: str | None = None
) -> tuple[nn.Module, Weights]:
    """The network of ``config``, on the CPU, around the weights in ``files``, which errors call ``where``.

    Raises DataError where they do not fit, UsageError where a file names what only the user may name.
    """
    require_buildable(config, where)
    checkpoint = read_checkpoint(files, where)
    scheme, rest = split_name(config.architecture)
    if scheme == "hf":
        return _hf(config, fetch(rest, "classifier"), checkpoint, key)
    return filled(build_net(config), config, checkpoint, key)


def _hf(config: ModelConfig, folder: Path, checkpoint: Checkpoint, key: str | None) -> tuple[nn.Module, Weights]:
    """A transformers network, which renames parameters of older versions itself: only other tables are searched."""
    weights = Weights(largest_table(checkpoint), "")
    if key is not None or len(checkpoint.tables) > 1 or checkpoint.contents:
        with torch.device("meta"):
            weights = find_weights(checkpoint, build_hf(config, folder), key)
    return build_hf(config, folder, weights.state, checkpoint.where), weights


def load_network(source: ModelSource) -> nn.Module | Answer:
    """The network of ``source`` with its weights, on the CPU; of a black box, the function that answers.

    Own code and ONNX that answer probabilities answer their logarithms from here on, which ``source.decisions`` say.
    """
    config, data, where, key = source.config, source.read(), source.where, source.checkpoint_key
    scheme = split_name(config.architecture)[0] if isinstance(config, NamedConfig) else None
    if scheme == "onnx":
        return _logits_from(onnx_answer(data, where, source.external()), source)
    files = source.external() or {where: data}
    if scheme == "code":
        made = call_code(config)
        if not isinstance(made, nn.Module):
            if not callable(made) or data:
                what = "weights cannot be loaded into it" if data else "expected a network or a function"
                raise UsageError(f"'{config.architecture}' returns {type(made).__name__}: {what}")
            return _logits_from(made, source)
        net, line = finish(made, config), ""
        if source.weights is not None:
            net, weights = filled(net, config, read_checkpoint(files, where), key)
            line = weights.line
        net = _logits_from(net.eval(), source)
    elif scheme and source.folder:
        net, weights = _hf(config, source.folder, read_checkpoint(files, where), key)
        line = weights.line
    else:
        net, weights = build_from(config, files, where, key)
        line = weights.line
    lines = [line] if line else []
    if config.architecture in TRANSFORMED and config.input.mean != (0.5,) * 3:
        lines.append("weights that began as torchvision's own take mean and std of 0.5 here (its transform_input)")
    if lines:
        source.decisions["weights"] = "; ".join(lines)
    return net


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
    state = {name: value.detach().cpu().contiguous() for name, value in net.state_dict().items()}
    weights = safetensors.torch.save(state)
    return {WEIGHTS: weights, CONFIG: config_json(config, weights)}


def source_files(source: ModelSource) -> dict[str, bytes]:
    """:func:`model_files` of a built-in ``source``: its own bytes if they are safetensors and nothing else than its
    network's tensors, else converted.

    Raises DataError where the weights are damaged or do not fit.
    """
    config, data = source.config, source.read()
    files, key = source.external(), source.checkpoint_key
    checkpoint = read_checkpoint(files or {source.where: data}, source.where)
    with torch.device("meta"):  # to compare names and shapes
        net = build_net(config)
    _, weights = filled(net, config, checkpoint, key)
    if weights.line or files or not source.where.endswith(".safetensors"):
        return model_files(filled(build_net(config), config, checkpoint, key)[0], config)
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


ASK = "name the teacher with --teacher, or give the recipe that describes it, -c FILE"


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
    weights = manifest.storage.read(identity["path"], most=None)
    actual = hashlib.sha256(weights).hexdigest()
    if actual != sha256:  # before anything is built from them
        raise DataError(f"{where} was altered: sha256 {actual}, expected {sha256}; restore it, or {ask}")
    net, _ = build_from(config, {WEIGHTS: weights}, where)
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
