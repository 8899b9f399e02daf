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


MAX_RESIZED = 2**26
"""Pixels of a resized picture: of a longer one only the middle is resized, more than a center crop leaves."""


class InputSpec:
    """Maps images in [−1, 1] to a classifier's own input. Differentiable; antialiased where it shrinks.

    Pictures from elsewhere go through :meth:`view` first; images of a dataset are such views already.
    """

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
        x = (x - self._mean) / self._std
        return x.flip(1) if self.settings.channel_order == "bgr" else x

    def view(self, x: Tensor) -> Tensor:
        """What the network sees of pictures ``[n, 3, h, w]`` of any shape: ``[n, 3, size, size]``; both in [−1, 1].

        The sides and the place of the crop are those of ``Resize`` and ``CenterCrop`` of torchvision (of an image
        processor of transformers where ``crop_rounding`` is ``down``), and like them it ends at black and white.
        """
        size, target = self.size, self.settings.resize_size or (self.size, self.size)
        if isinstance(target, int):
            longest = MAX_RESIZED // target**2 * min(x.shape[-2:])
            x = center_crop(x, min(x.shape[-2], longest), min(x.shape[-1], longest))
            short = min(x.shape[-2:])
            target = (int(target * x.shape[-2] / short), int(target * x.shape[-1] / short))
        if self.settings.resize == "bicubic":  # rows, then columns, as Pillow: each ends at black and white
            x = resized(x, (x.shape[-2], target[1]), "bicubic").clamp(-1, 1)
        x = resized(x, target, self.settings.resize).clamp(-1, 1)
        return center_crop(x, size, size, self.settings.crop_rounding)


def center_crop(x: Tensor, height: int, width: int, rounding: str = "even") -> Tensor:
    """``[n, c, h, w]`` to its center ``[n, c, height, width]``; half a pixel is rounded to ``even`` or ``down``."""
    half = [(x.shape[-2] - height) / 2, (x.shape[-1] - width) / 2]
    top, left = (int(margin) if rounding == "down" else round(margin) for margin in half)
    return x[..., top : top + height, left : left + width]


def resized(x: Tensor, size: int | tuple[int, int], rule: str) -> Tensor:
    """``[n, c, h, w]`` at ``size × size`` or ``(height, width)`` by a ``rule`` of ``InputSettings.resize``; as it is
    where it fits."""
    size = (size, size) if isinstance(size, int) else size
    if x.shape[-2:] == size:
        return x
    if rule == "area":
        return F.interpolate(x, size=size, mode="area")
    if rule == "nearest":
        rows, columns = (_nearest(old, new, x.device) for old, new in zip(x.shape[-2:], size, strict=True))
        return x[..., rows[:, None], columns]
    return F.interpolate(x, size=size, mode=rule, antialias=True, align_corners=False)


def _nearest(old: int, new: int, device: torch.device) -> Tensor:
    """Which of ``old`` pixels are nearest to ``new`` ones, as Pillow adds it up; PyTorch's own mode differs by one."""
    steps = torch.full((new,), old / new, dtype=torch.float64)
    steps[0] /= 2
    return steps.cumsum(0).long().clamp(max=old - 1).to(device)


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


def require_finite_weights(net: nn.Module, what: str) -> None:
    """Raises DataError naming a weight or running statistic of ``net`` that holds NaN or infinities."""
    for name, value in net.state_dict().items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise DataError(f"{what}: {name} holds NaN or infinite values")
