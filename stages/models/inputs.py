"""A classifier's input rule (size, channels, normalization), and the logits in whatever it returns."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manifests.errors import DataError
from stages.settings import InputSettings

LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 ``[n, h, w, 3]`` or ``[n, 3, h, w]`` to float ``[n, 3, h, w]`` in [−1, 1]."""
    if pixels.shape[-1] == 3:
        pixels = pixels.permute(0, 3, 1, 2)
    return pixels.float() / 127.5 - 1


class InputSpec:
    """Maps images in [−1, 1] to a classifier's own input. Differentiable; antialiased where it shrinks."""

    def __init__(self, settings: InputSettings):
        self.settings = settings
        self.size, self.channels = settings.size, settings.channels
        self._mean = torch.tensor(settings.mean).view(1, -1, 1, 1)
        self._std = torch.tensor(settings.std).view(1, -1, 1, 1)
        self._luminance = torch.tensor(LUMINANCE).view(1, 3, 1, 1)

    def __call__(self, x: Tensor) -> Tensor:
        """``[n, 3, h, w]`` in [−1, 1] to ``[n, channels, size, size]``, normalized."""
        if self._mean.device != x.device:  # once: a copy at every call would stop a GPU
            self._mean, self._std, self._luminance = (
                constant.to(x.device) for constant in (self._mean, self._std, self._luminance)
            )
        x = (x.float() + 1) / 2
        if self.channels == 1:
            x = (x * self._luminance).sum(1, keepdim=True)
        x = resized(x, self.size, self.settings.resize)
        return (x - self._mean) / self._std


def resized(x: Tensor, size: int, rule: str) -> Tensor:
    """``[n, c, h, w]`` at ``size × size`` by a ``rule`` of ``InputSettings.resize``; as it is where it fits."""
    if x.shape[-2:] == (size, size):
        return x
    if rule == "area":
        return F.interpolate(x, size=(size, size), mode="area")
    return F.interpolate(x, size=(size, size), mode=rule, antialias=True, align_corners=False)


def logits_of(out: Any, num_classes: int, what: str) -> Tensor:
    """The ``[n, num_classes]`` tensor in ``out``: itself, its ``logits``, or the only one of that width in a tuple.

    Raises DataError where there is none, or where more than one could be meant. ``what`` names the classifier.
    """
    logits = out.get("logits") if isinstance(out, Mapping) else getattr(out, "logits", None)
    if logits is not None:
        out = logits
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


def finite(net: nn.Module) -> bool:
    """Whether no weight or running statistic is NaN or infinite."""
    return all(bool(value.isfinite().all()) for value in net.state_dict().values())


def require_finite_weights(net: nn.Module, what: str) -> None:
    """Raises DataError naming a weight or running statistic of ``net`` that holds NaN or infinities."""
    for name, value in net.state_dict().items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise DataError(f"{what}: {name} holds NaN or infinite values")
