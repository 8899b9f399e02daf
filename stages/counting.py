"""Count work without doing it: FLOPs and saved activations of any call on meta tensors, which have shapes and no data.

Used by ``--dry-run`` of both stages and by ``benchmarks/counted_work.py``. A multiplication and an addition are two
FLOPs; convolutions, matrix products and attention are counted, what works element by element is not.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

META = torch.device("meta")


class Flops(TorchDispatchMode):
    """``total`` of everything that runs within, by PyTorch's own formulas.

    (Its ``FlopCounterMode`` also hooks every module, which ``autograd.grad`` up to a leaf does not survive.)
    """

    total = 0

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += int(formula(*args, **(kwargs or {}), out_val=out))
        return out


class FusedAttention(TorchFunctionMode):
    """Attention as fused kernels compute it. On meta tensors PyTorch itself would take the naive way, in float32 and
    with every attention map saved, which runs on no device."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = args[:3]
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]


def flops(call: Callable[[], object]) -> int:
    """FLOPs of ``call``, backward passes included."""
    with FusedAttention(), Flops() as counter:
        call()
    return counter.total


def saved_bytes(call: Callable[[], object], networks: Iterable[nn.Module | None]) -> int:
    """Bytes that autograd keeps for the backward passes of ``call``: each storage once, no weights of ``networks``."""
    own = {_storage(tensor) for tensor in _tensors(networks)}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in own:
            kept.setdefault(_storage(tensor), tensor)  # held, so that no later storage takes its address
        return tensor

    with FusedAttention(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def weight_bytes(*networks: nn.Module | None) -> int:
    """Bytes of parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(networks))


def _tensors(networks: Iterable[nn.Module | None]) -> Iterable[Tensor]:
    for network in networks:
        if network is not None:
            yield from network.parameters()
            yield from network.buffers()


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
