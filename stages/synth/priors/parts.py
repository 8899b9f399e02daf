"""The networks in a prior's folder: loaded with every weight that their configuration calls for, or refused."""

import logging
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import AutoencoderDC, AutoencoderKL
from diffusers.utils import logging as diffusers_logging
from safetensors import safe_open
from transformers.utils import logging as transformers_logging

from manifests.errors import DataError
from stages.settings import PriorSettings
from stages.synth.priors.files import loading, weight_files

log = logging.getLogger(__name__)


VAES = {"AutoencoderKL": AutoencoderKL, "AutoencoderDC": AutoencoderDC}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHOWN = 3  # keys that a line names


def frozen(network: Any, device: str) -> Any:
    """``network`` on ``device``, in eval mode and without gradients of its own."""
    if device.startswith("cuda"):  # what tensor cores want of convolutions; a CPU's sums would come out otherwise
        network = network.to(memory_format=torch.channels_last)
    return network.to(device).eval().requires_grad_(False)


class PriorFolder(Protocol):
    """Where the parts of a prior are, what its index says of them, and how they are wanted."""

    folder: Path
    index: dict[str, Any]
    settings: PriorSettings
    device: str


def load_part(prior: PriorFolder, name: str, classes: dict[str, Any]) -> Any:
    """Component ``name`` of a prior's folder, if ``model_index.json`` gives it one of ``classes``."""
    _, kind = prior.index.get(name) or (None, None)
    if kind not in classes:
        raise DataError(f"prior {prior.folder}: {name} is a {kind}, expected {' or '.join(classes)}")
    where = {"subfolder": name, **loading(prior.folder / name, prior.settings.variant)}
    return load_network(classes[kind], prior.folder, DTYPES[prior.settings.dtype], prior.device, **where)


def load_network(kind: Any, folder: Path, dtype: torch.dtype, device: str, **where: Any) -> Any:
    """A diffusers network of class ``kind`` from its folder; on the device ``meta`` shapes alone, from the config.

    Raises DataError as :func:`load_whole`.
    """
    if device == "meta":
        config = kind.load_config(str(folder), **where)
        with torch.device("meta"):
            return torch.nn.Module.to(kind.from_config(config), dtype)
    # without low_cpu_mem_usage a weight that no file holds would keep random values
    return load_whole(kind, folder, torch_dtype=dtype, low_cpu_mem_usage=True, **where)


def load_encoder(prior: PriorFolder, name: str, kind: Any) -> Any:
    """Transformers encoder ``name`` of a prior's folder, as :func:`load_network`.

    Another model type than that of ``kind`` is refused (DataError), another class of the same type is logged.
    """
    dtype, where = DTYPES[prior.settings.dtype], {"subfolder": name, "local_files_only": True}
    _check_kind(prior, name, kind)
    if prior.device == "meta":
        config = kind.config_class.from_pretrained(str(prior.folder), **where)
        with torch.device("meta"):
            return kind(config).to(dtype)
    where |= loading(prior.folder / name, prior.settings.variant)
    return load_whole(kind, prior.folder, dtype=dtype, **where)


def load_tokenizer(prior: PriorFolder, name: str, kind: Any) -> Any:
    """Tokenizer ``name`` of a prior's folder."""
    return kind.from_pretrained(str(prior.folder), subfolder=name, local_files_only=True)


def load_whole(kind: Any, folder: Path, **arguments: Any) -> Any:
    """``kind.from_pretrained`` of diffusers or transformers, where the files hold each weight in its shape.

    Both libraries initialize at random what the files lack, or leave it without storage, and only log it. Weights that
    are tied to others and buffers that are never saved do not count; keys of the files without use are logged.

    Raises:
        DataError: weights that are absent, of another shape, or no floating-point numbers.
    """
    place = folder / arguments.get("subfolder", "")
    with _quiet():
        network, found = kind.from_pretrained(
            str(folder), output_loading_info=True, ignore_mismatched_sizes=True, **arguments
        )
    expected = network.state_dict().keys()
    mismatched = sorted(found["mismatched_keys"])
    tensors = chain(network.named_parameters(), network.named_buffers())
    # a key that a shard index lists and no shard holds does not count as missing in diffusers
    without_storage = {key for key, tensor in tensors if tensor.is_meta}
    missing = (without_storage | set(found["missing_keys"])) - {key for key, _, _ in mismatched}
    unused = found["unexpected_keys"]
    integer = _no_floats(weight_files(place, arguments.get("variant")), network) - set(unused)
    faults = []
    if missing:
        faults.append(f"lack {len(missing)} of {len(expected)} keys of {kind.__name__}, e.g. {_some(missing)}")
    if mismatched:
        key, there, here = mismatched[0]
        faults.append(
            f"have another shape than config.json gives them for {len(mismatched)} of {len(expected)} keys, "
            f"e.g. {key!r}: {list(there)}, expected {list(here)}"
        )
    if integer:
        faults.append(f"are no floating-point numbers in {len(integer)} keys, e.g. {_some(integer)}")
    if faults:
        if unused:
            faults.append(f"hold {len(unused)} keys that it does not have, e.g. {_some(unused)}")
        if missing and len(unused) > len(expected) - len(missing):
            faults.append("are those of another network")
        raise DataError(f"{place}: weights {'; '.join(faults)}{_lora(unused)}")
    if unused:
        log.warning(
            "%s: %d keys of the weights are not used by %s, e.g. %s%s",
            place, len(unused), kind.__name__, _some(unused), _lora(unused),
        )  # fmt: skip
    return network


def _no_floats(files: Iterable[Path], network: Any) -> set[str]:
    """Keys of the files whose values both libraries would cast to floating point, as of a quantized network."""
    kinds: dict[str, bool] = {}
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                kinds |= {key: opened.get_slice(key).get_dtype().startswith(("F", "BF")) for key in list(opened.keys())}
        else:  # torch: no values are read
            state = torch.load(file, map_location="meta", weights_only=True)
            kinds |= {key: value.is_floating_point() for key, value in state.items() if torch.is_tensor(value)}
    counters = {name.rpartition(".")[2] for name, buffer in network.named_buffers() if not buffer.is_floating_point()}
    return {key for key, floating in kinds.items() if not floating and key.rpartition(".")[2] not in counters}


def _check_kind(prior: PriorFolder, name: str, kind: Any) -> None:
    """Compare what ``model_index.json`` and the encoder's ``config.json`` say with the class that is loaded."""
    place, type_ = prior.folder / name, kind.config_class
    config, _ = type_.get_config_dict(str(prior.folder), subfolder=name, local_files_only=True)
    section = config.get(type_.base_config_key)  # of a CLIPConfig the half that is loaded
    model_type = (section if isinstance(section, dict) else config).get("model_type", type_.model_type)
    if model_type != type_.model_type:
        raise DataError(
            f"{place}: config.json describes a model of type {model_type!r}, but {kind.__name__} is of type "
            f"{type_.model_type!r}"
        )
    _, indexed = prior.index.get(name) or (None, None)
    classes = config.get("architectures")
    named = [indexed, *(classes if isinstance(classes, list) else [])]
    if others := sorted({other for other in named if isinstance(other, str) and other != kind.__name__}):
        log.warning("%s is a %s by its configuration, loaded as %s", place, " or ".join(others), kind.__name__)


def _some(keys: Collection[str]) -> str:
    names = ", ".join(repr(key) for key in sorted(keys)[:SHOWN])
    return f"{names}, …" if len(keys) > SHOWN else names


def _lora(keys: Collection[str]) -> str:
    layers = any("lora" in key.lower() for key in keys)
    return " (LoRA layers do not apply: merge them and save again)" if layers else ""


@contextmanager
def _quiet() -> Iterator[None]:
    """The libraries' tables of keys and progress bars are not shown: :func:`load_whole` reports, progress is images."""
    libraries: tuple[Any, ...] = (diffusers_logging, transformers_logging)
    before = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, level in zip(libraries, before, strict=True):
            library.set_verbosity(level)
