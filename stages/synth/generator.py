"""The generator of contrastive inversion: latents to images, re-initialised for every batch (Fang et al. 2021)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

START = 8  # greatest side of the first map


class Generator(nn.Module):
    """``[n, latent]`` to images ``[n, channels, side, side]`` in [−1, 1]: a linear layer to a small map of ``2·width``
    channels, then doublings (at least two) with a convolution each."""

    def __init__(self, latent: int, width: int, channels: int, side: int) -> None:
        super().__init__()
        doublings = max(2, math.ceil(math.log2(side / START)))
        self.sides = [math.ceil(side / 2**i) for i in range(doublings, -1, -1)]
        self.inner = 2 * width
        self.project = nn.Linear(latent, self.inner * self.sides[0] ** 2)
        self.first = nn.BatchNorm2d(self.inner)
        outputs = [self.inner] * (doublings - 1) + [width]
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(self.inner, c, 3, padding=1), nn.BatchNorm2d(c), nn.LeakyReLU(0.2, inplace=True))
            for c in outputs
        )
        self.last = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.first(self.project(z).view(len(z), self.inner, self.sides[0], self.sides[0]))
        for block, side in zip(self.blocks, self.sides[1:], strict=True):
            x = block(F.interpolate(x, size=(side, side), mode="nearest"))
        return torch.tanh(self.last(x))
