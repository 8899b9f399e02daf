"""ResNets for 32×32 images (He et al. 2015, section 4.2): 6n + 2 layers, parameter-free option-A shortcuts."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

Norm = Callable[[int], nn.Module]


def group_norm(channels: int) -> nn.Module:
    """Eight groups: a norm that does not look at the rest of the batch."""
    return nn.GroupNorm(8, channels)


class Block(nn.Module):
    """Two 3×3 convolutions; the shortcut takes every second pixel and pads the channels equally on both sides."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = norm(outputs)
        self.stride, self.padding = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(x + y)


class ResNetCifar(nn.Module):
    """A 3×3 stem and three stages of 16, 32 and 64 channels with ``blocks`` blocks each."""

    stages = ("layer1", "layer2", "layer3")
    head = "linear"

    def __init__(self, num_classes: int, channels: int, blocks: int, norm: Norm = nn.BatchNorm2d):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.bn1 = norm(16)
        self.layer1 = self._stage(16, 16, 1, blocks, norm)
        self.layer2 = self._stage(16, 32, 2, blocks, norm)
        self.layer3 = self._stage(32, 64, 2, blocks, norm)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(inputs: int, outputs: int, stride: int, blocks: int, norm: Norm) -> nn.Sequential:
        rest = (Block(outputs, outputs, 1, norm) for _ in range(blocks - 1))
        return nn.Sequential(Block(inputs, outputs, stride, norm), *rest)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        out: Tensor = self.linear(x.mean((2, 3)))
        return out
