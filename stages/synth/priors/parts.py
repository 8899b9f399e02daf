"""The networks in a prior's folder: loaded with every weight that their configuration calls for, or refused."""

import logging
import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from safetensors import safe_open
from transformers.utils import logging as transformers_logging

from manifests.errors import DataError
from stages.synth.priors.files import weight_files

log = logging.getLogger(__name__)


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHOWN = 3  # keys that a line names


def frozen(network: Any, device: str) -> Any:
    """``network`` on ``device``, in eval mode and without gradients of its own."""
    if device.startswith("cuda"):  # what tensor cores want of convolutions; a CPU's sums would come out otherwise
        network = network.to(memory_format=torch.channels_last)
    return network.to(device).eval().requires_grad_(False)


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing that diffusers and transformers log, warn of or draw is shown: this module reports what matters of it,
    and their lines may hold what stands in a file."""
    libraries: tuple[Any, ...] = (diffusers_logging, transformers_logging)
    before = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity(logging.CRITICAL)
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for library, level in zip(libraries, before, strict=True):
            library.set_verbosity(level)


@quiet()
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


@quiet()
def load_whole(kind: Any, folder: Path, **arguments: Any) -> Any:
    """``kind.from_pretrained`` of diffusers or transformers, where the files hold each weight in its shape.

    Both libraries initialize at random what the files lack, or leave it without storage, and only log it. Weights that
    are tied to others and buffers that are never saved do not count; keys of the files without use are logged.

    Raises:
        DataError: weights that are absent, of another shape, or no floating-point numbers.
    """
    files = weight_files(folder, arguments.get("variant"))
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
    integer = _no_floats(files, network) - set(unused)
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
        raise DataError(f"{folder}: weights {'; '.join(faults)}{_lora(unused)}")
    if unused:
        log.warning(
            "%s: %d keys of the weights are not used by %s, e.g. %s%s",
            folder, len(unused), kind.__name__, _some(unused), _lora(unused),
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


def _some(keys: Collection[str]) -> str:
    names = ", ".join(repr(key) for key in sorted(keys)[:SHOWN])
    return f"{names}, …" if len(keys) > SHOWN else names


def _lora(keys: Collection[str]) -> str:
    layers = any("lora" in key.lower() for key in keys)
    return " (LoRA layers do not apply: merge them and save again)" if layers else ""
