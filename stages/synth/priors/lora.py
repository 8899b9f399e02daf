"""Merge LoRA files into a prior's networks: W ← W + weight·(α/r)·B·A (Hu et al. 2021, equation 3).

Read are the key names of diffusers, PEFT and kohya's scripts, from safetensors alone. Every key must fit a layer: a
file for another network, or of another kind (DoRA, LoHa, LoKr), is refused and never merged in part.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from manifests.checked_json import load_tree
from manifests.errors import DataError, first_line

# How files name the networks of a pipeline.
PREFIXES = {
    "unet": ("unet.", "lora_unet_", "base_model.model."),
    "transformer": ("transformer.", "lora_transformer_"),
    "text_encoder": ("text_encoder.", "lora_te_", "lora_te1_"),
    "text_encoder_2": ("text_encoder_2.", "lora_te2_"),
}
_FACTOR = re.compile(r"(?P<layer>.+?)[._]lora(?:_linear_layer)?[._](?P<factor>A|B|down|up)(?:\.default)?\.weight")
_ALPHA = re.compile(r"(?P<layer>.+)\.alpha")
_UNLIKE_LORA = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern")  # of PEFT's configuration


@dataclass
class Factors:
    """Of one layer: A ``[r, in, …]``, B ``[out, r, …]``, and α (None: r)."""

    a: Tensor | None = None
    b: Tensor | None = None
    alpha: float | None = None

    def change(self, shape: torch.Size) -> Tensor | None:
        """(α/r)·B·A in the ``shape`` of the layer's weight; None where it does not have that shape."""
        if self.a is None or self.b is None or self.a.shape[0] != self.b.shape[1]:
            return None
        rank = len(self.a)
        product = self.b.float().flatten(1) @ self.a.float().flatten(1)
        if self.b.numel() != len(self.b) * rank or product.numel() != shape.numel() or len(product) != shape[0]:
            return None
        return product.view(shape) * ((rank if self.alpha is None else self.alpha) / rank)


@torch.no_grad()
def merge_lora(file: Path, weight: float, networks: Mapping[str, nn.Module]) -> int:
    """Merge ``file`` times ``weight`` into ``networks`` (by their names in the pipeline), in place; returns the number
    of layers that changed.

    Raises DataError where it is damaged, holds other things than LoRA factors, or does not fit.
    """
    layers = {name: _layers(network) for name, network in networks.items()}
    changes: list[tuple[Tensor, Tensor]] = []
    for (name, layer), factors in _read(file).items():
        if name not in networks:
            raise DataError(f"{file} holds LoRA layers of {name}, which this prior does not have")
        target = layers[name].get(layer, layers[name].get(f"{layer}_0"))  # diffusers' older to_out
        if target is None:
            raise DataError(f"{file} is made for another network: {name} has no layer {layer}")
        change = factors.change(target.shape)
        if change is None:
            raise DataError(f"{file} is made for another network: its {layer} does not fit {list(target.shape)}")
        if not bool(change.isfinite().all()):
            raise DataError(f"{file}: {layer} holds NaN or infinite values")
        changes.append((target, change))
    if not changes:
        raise DataError(f"{file} holds no LoRA layers")
    for target, change in changes:  # only now: all or nothing
        target += (weight * change).to(target.device, target.dtype)
    return len(changes)


def _layers(network: nn.Module) -> dict[str, Tensor]:
    """Weights of linear and convolutional layers, by their names with underscores, as kohya's files have them."""
    return {
        _plain(name): module.weight
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }


def _plain(layer: str) -> str:
    """A layer's name however it is written: ``_`` for dots, without the wrappers of some versions.

    >>> _plain("attn1.processor.to_q"), _plain("text_model.encoder.layers.0.q_proj")
    ('attn1_to_q', 'encoder_layers_0_q_proj')
    """
    return layer.replace(".", "_").replace("_processor_", "_").removeprefix("text_model_")


def _read(file: Path) -> dict[tuple[str, str], Factors]:
    """The factors in ``file`` by network and layer."""
    try:
        with safe_open(file, framework="pt") as opened:
            state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (no mapping)
            config = load_tree((opened.metadata() or {}).get("lora_adapter_metadata", "{}").encode())
    except (OSError, SafetensorError, ValueError) as error:
        raise DataError(f"LoRA {file} cannot be read as safetensors: {first_line(error)}") from None
    config = config if isinstance(config, dict) else {}
    if others := [key for key, value in config.items() if value and key.rpartition(".")[2] in _UNLIKE_LORA]:
        raise DataError(f"{file} is no plain LoRA: its configuration has {', '.join(others)}")
    found: dict[tuple[str, str], Factors] = {}
    for key, value in state.items():
        factor, alpha = _FACTOR.fullmatch(key), _ALPHA.fullmatch(key)
        if factor is None and alpha is None:
            raise DataError(f"{file} holds {key!r}, which is no LoRA factor (DoRA, LoHa and LoKr are not supported)")
        name, layer = _owner((factor or alpha)["layer"], file)  # type: ignore[index]
        factors = found.setdefault((name, layer), Factors(alpha=_configured(config, name)))
        if alpha is not None:
            factors.alpha = float(value)
        elif factor["factor"] in ("A", "down"):  # type: ignore[index]
            factors.a = value
        else:
            factors.b = value
    return found


def _owner(layer: str, file: Path) -> tuple[str, str]:
    """The network of a layer, and its name there as :func:`_plain` writes it."""
    for name, prefixes in PREFIXES.items():
        for prefix in prefixes:
            if layer.startswith(prefix):
                rest = layer.removeprefix(prefix)
                if rest.startswith(("input_blocks", "output_blocks", "middle_block")):
                    raise DataError(
                        f"{file} names layers as the original SDXL code does ({layer}): load it in diffusers' pipeline "
                        "(load_lora_weights) and save it again (save_lora_weights)"
                    )
                return name, _plain(rest)
    expected = ", ".join(prefix for prefixes in PREFIXES.values() for prefix in prefixes)
    raise DataError(f"{file}: {layer!r} names no network: expected {expected}")


def _configured(config: Mapping[str, Any], name: str) -> float | None:
    """α that PEFT's configuration in the file gives network ``name``."""
    value = config.get(f"{name}.lora_alpha", config.get("lora_alpha"))
    return float(value) if isinstance(value, int | float) else None
