"""Small BatchNorm ConvNets for 8×8 digits: the embedded teacher (``digits-cnn``) and its default student."""

import torch
from torch import Tensor, nn


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class DigitsCNN(nn.Module):
    """Two stages of 3×3 convolutions (width, then 2·width at half the side), global average, linear.

    ``depths`` counts the convolutions of each stage.
    """

    stages = ("stage1", "stage2")
    head = "classifier"

    def __init__(self, num_classes: int, channels: int, width: int, depths: tuple[int, int]):
        super().__init__()
        first, second = depths
        self.stage1 = nn.Sequential(_block(channels, width), *(_block(width, width) for _ in range(first - 1)))
        self.stage2 = nn.Sequential(
            nn.MaxPool2d(2), _block(width, 2 * width), *(_block(2 * width, 2 * width) for _ in range(second - 1))
        )
        self.classifier = nn.Linear(2 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.stage1(x))
        out: Tensor = self.classifier(torch.flatten(x.mean((2, 3)), 1))
        return out
