"""A finished student in use: one call loads it, images go in as they are. Also what ``factory export`` writes."""

from pathlib import Path

import torch
from torch import Tensor, nn

from stages.models.identity import ModelConfig
from stages.models.inputs import InputSpec
from stages.models.loading import load_model


class Classifier(nn.Module):
    """Images ``[n, 3, h, w]`` in [0, 1], of any size, to logits ``[n, C]``; resizing and normalisation included."""

    def __init__(self, net: nn.Module, config: ModelConfig):
        super().__init__()
        self.net, self.config, self.spec = net, config, InputSpec(config.input)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(self.spec(images * 2 - 1))
        return logits


class Deployable(nn.Module):
    """Images ``[n, channels, size, size]`` in [0, 1] to logits ``[n, C]``: normalisation included, resizing not."""

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, config: ModelConfig):
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor(config.input.mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(config.input.std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net((images - self.mean) / self.std)
        return logits


def load_student(folder: str | Path) -> Classifier:
    """The student in ``folder``, on the CPU, in eval mode. Raises DataError where it is none.

    >>> load_student("runs/demo/distill/digits-cnn-small")(images).argmax(1)  # doctest: +SKIP
    """
    net, config = load_model(folder)
    return Classifier(net, config).eval()
