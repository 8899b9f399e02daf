"""Wide ResNets for 32×32 images (Zagoruyko and Komodakis 2016): depth 6n + 4, pre-activation blocks.

Parameter names are those of the checkpoints in circulation: ``conv1``,
``block{1,2,3}.layer.{i}.{bn1,conv1,bn2,conv2}``, ``convShortcut`` where the width changes, ``bn1``, ``fc``.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class WideBlock(nn.Module):
    """BN, ReLU, convolution, twice. Where the width changes, the shortcut is a 1×1 convolution of what is active."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.convShortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        y: Tensor = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return y + (x if self.convShortcut is None else self.convShortcut(active))


class Stage(nn.Module):
    """``blocks`` blocks, the first with ``stride``."""

    def __init__(self, inputs: int, outputs: int, stride: int, blocks: int):
        super().__init__()
        rest = (WideBlock(outputs, outputs, 1) for _ in range(blocks - 1))
        self.layer = nn.Sequential(WideBlock(inputs, outputs, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


class WideResNet(nn.Module):
    """A 3×3 stem of 16 channels and three stages of 16k, 32k and 64k channels; k = ``width``."""

    stages = ("block1", "block2", "relu")
    head = "fc"

    def __init__(self, num_classes: int, channels: int, depth: int, width: int):
        super().__init__()
        blocks, widths = (depth - 4) // 6, [16, 16 * width, 32 * width, 64 * width]
        self.conv1 = nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False)
        self.block1 = Stage(widths[0], widths[1], 1, blocks)
        self.block2 = Stage(widths[1], widths[2], 2, blocks)
        self.block3 = Stage(widths[2], widths[3], 2, blocks)
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.relu = nn.ReLU()
        self.fc = nn.Linear(widths[3], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        out: Tensor = self.fc(self.relu(self.bn1(x)).mean((2, 3)))
        return out
