"""One table of logits out of whatever a foreign classifier returns."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from manifests.errors import DataError


def logits_of(out: Any, num_classes: int, what: str) -> Tensor:
    """The ``[n, num_classes]`` tensor in ``out``: itself, its ``logits``, or the only one of that width in a tuple.

    Raises DataError where there is none, or where more than one could be meant. ``what`` names the classifier.
    """
    found = out.get("logits") if isinstance(out, Mapping) else getattr(out, "logits", None)
    if found is not None:
        out = found
    elif isinstance(out, tuple | list):
        fitting = [part for part in out if isinstance(part, Tensor) and _fits(part, num_classes)]
        if len(fitting) != 1:
            parts = ", ".join(_describe(part) for part in out)
            raise DataError(
                f"{what} returns ({parts}): {'none' if not fitting else f'{len(fitting)}'} of them may be the logits "
                f"[n, {num_classes}]; return the logits alone"
            )
        out = fitting[0]
    if not isinstance(out, Tensor):
        try:
            out = torch.as_tensor(out)
        except (TypeError, ValueError, RuntimeError):
            raise DataError(f"{what} returns {_describe(out)}, expected logits [n, {num_classes}]") from None
    if not _fits(out, num_classes):
        raise DataError(f"{what} returns {_describe(out)}, expected logits [n, {num_classes}]")
    return out


def _fits(part: Tensor, num_classes: int) -> bool:
    return part.ndim == 2 and part.shape[1] == num_classes


def _describe(part: Any) -> str:
    return f"{list(part.shape)}" if isinstance(part, Tensor) else type(part).__name__


def require_finite(logits: Tensor, what: str) -> Tensor:
    """``logits`` again; raises DataError where they hold NaN or infinities (meta tensors hold nothing)."""
    if not logits.is_meta and not bool(logits.isfinite().all()):
        raise DataError(f"{what} returns NaN or infinite logits: check its weights, dtype and input settings")
    return logits


def require_finite_weights(net: nn.Module, what: str) -> None:
    """Raises DataError naming a weight or running statistic of ``net`` that holds NaN or infinities."""
    for name, value in net.state_dict().items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise DataError(f"{what}: {name} holds NaN or infinite values")
