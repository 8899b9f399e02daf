"""A classifier's input rule (size, channels, normalization), and the logits in whatever it returns."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
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

        As torchvision's ``Resize`` and ``CenterCrop`` make it with Pillow, in 8 bits and without gradients (the crop as
        transformers where ``crop_rounding`` is ``down``); pictures that need neither come back as they are.
        """
        size, target = self.size, self.settings.resize_size or (self.size, self.size)
        if x.shape[-2:] == (size, size) == target or x.is_meta:
            return x
        pixels = ((x.detach() + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        views = [np.asarray(self._view(Image.fromarray(picture))) for picture in pixels]
        return to_unit(torch.from_numpy(np.stack(views))).contiguous().to(x.device)

    def _view(self, picture: Image.Image) -> Image.Image:
        size, target = self.size, self.settings.resize_size or (self.size, self.size)
        if isinstance(target, int):
            longest = MAX_RESIZED // target**2 * min(picture.size)
            picture = _center_crop(picture, min(picture.width, longest), min(picture.height, longest))
            short = min(picture.size)
            target = (int(target * picture.height / short), int(target * picture.width / short))
        gray = picture.convert("L") if self.channels == 1 else picture  # before the passes that end at black and white
        picture = gray.resize(target[::-1], PILLOW[self.settings.resize])
        return _center_crop(picture, size, size, self.settings.crop_rounding).convert("RGB")


PILLOW = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "area": Image.Resampling.BOX,
    "nearest": Image.Resampling.NEAREST,
}
"""Interpolations of ``InputSettings.resize`` in Pillow."""


def _center_crop(picture: Image.Image, width: int, height: int, rounding: str = "even") -> Image.Image:
    half = ((picture.width - width) / 2, (picture.height - height) / 2)
    left, top = (int(margin) if rounding == "down" else round(margin) for margin in half)
    return picture.crop((left, top, left + width, top + height))


def resized(x: Tensor, size: int, rule: str) -> Tensor:
    """``[n, c, h, w]`` at ``size × size`` by a ``rule`` of ``InputSettings.resize``; as it is where it fits."""
    if x.shape[-2:] == (size, size):
        return x
    if rule in ("area", "nearest"):
        return interpolated(x, size, mode="area" if rule == "area" else "nearest-exact")
    return interpolated(x, size, mode=rule, antialias=True, align_corners=False)


def interpolated(x: Tensor, size: int, **how: Any) -> Tensor:
    """``F.interpolate(x, (size, size), **how)`` of ``x [n, c, h, w]``.

    Where deterministic algorithms are on, it is two matrix products, the same numbers up to rounding: the way back
    through PyTorch's own kernels adds in any order on a GPU.
    """
    if not torch.are_deterministic_algorithms_enabled():
        return F.interpolate(x, size=(size, size), **how)
    rows, columns = (_resampling(side, size, x.device, tuple(how.items())).to(x) for side in x.shape[-2:])
    return rows @ x @ columns.T


@lru_cache(64)  # a copy from the host at every step would stop a GPU
def _resampling(side: int, size: int, device: torch.device, how: tuple[tuple[str, Any], ...]) -> Tensor:
    """What one axis of ``side`` pixels is multiplied with to have ``size``: ``[size, side]``."""
    one = torch.eye(side, device="cpu")[None, None]
    return F.interpolate(one, size=(size, side), **dict(how))[0, 0].to(device)


def logits_of(out: Any, num_classes: int, what: str) -> Tensor:
    """The ``[n, num_classes]`` tensor in ``out``: itself, its ``logits`` or only value, or the only one of that width
    in a tuple.

    Raises DataError where there is none, or where more than one could be meant. ``what`` names the classifier.
    """
    if isinstance(out, Mapping):
        logits = next(iter(out.values())) if len(out) == 1 else out.get("logits")
    else:
        logits = getattr(out, "logits", None)
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
