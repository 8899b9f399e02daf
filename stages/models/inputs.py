"""From stored or decoded images to what a classifier expects: size, channels, normalisation."""

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.models.settings import InputSettings

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
        """``[n, 3, h, w]`` in [−1, 1] to ``[n, channels, size, size]``, normalised."""
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
