"""What BatchNorm layers see of a whole dataset, against what they saw in training. Used by both stages."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Moments:
    """Mean and biased variance per channel of what each BatchNorm layer sees, over all images added."""

    def __init__(self) -> None:
        self.count: list[int] = []
        self.sums: list[Tensor] = []
        self.squares: list[Tensor] = []

    def add(self, inputs: Sequence[Tensor]) -> None:
        """``inputs`` of a batch: ``[n, c, …]`` for each layer."""
        for layer, x in enumerate(inputs):
            flat = x.detach().transpose(0, 1).flatten(1).double()
            if layer == len(self.count):
                self.count.append(0)
                self.sums.append(flat.new_zeros(len(flat)))
                self.squares.append(flat.new_zeros(len(flat)))
            self.count[layer] += flat.shape[1]
            self.sums[layer] += flat.sum(1)
            self.squares[layer] += flat.square().sum(1)

    def gap(self, running: Sequence[tuple[Tensor, Tensor]]) -> float | None:
        """Distance to the ``running`` (mean, variance): mean over layers of RMS_c((μ − m)/s) + RMS_c((σ² − s²)/s²),
        what guidance calls ``bn`` (DiffDFKD, equation 6), here over the dataset. None without BatchNorm layers."""
        terms = []
        for count, total, square, (mean, variance) in zip(self.count, self.sums, self.squares, running, strict=True):
            own_mean = total / count
            own_variance = square / count - own_mean.square()
            scale = variance.double().clamp_min(1e-5)
            shift, spread = (own_mean - mean) / scale.sqrt(), (own_variance - variance) / scale
            terms.append(shift.square().mean().sqrt() + spread.square().mean().sqrt())
        return float(torch.stack(terms).mean()) if terms else None
