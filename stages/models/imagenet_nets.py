"""torchvision's ResNet-18/34, MobileNetV2 and ShuffleNetV2, with stems for small images.

A ``small`` stem takes two halvings out of the first layers, so that 32 px end at 4×4 instead of 1×1: total stride 8
instead of 32. Parameter names are torchvision's. torchvision is imported when the first of them is built.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

SMALL_STEM = {
    "resnet": "3×3 first convolution of stride 1, no max pooling",
    "vgg": "no pooling after the fourth and fifth block",
    "mobilenet": "stride 1 in the first convolution and the first inverted residual stage",
    "shufflenet": "first convolution of stride 1, no max pooling",
}


def resnet(num_classes: int, channels: int, small: bool, blocks: list[int]) -> nn.Module:
    """He et al. 2016 with basic blocks."""
    from torchvision.models.resnet import BasicBlock, ResNet

    net = ResNet(BasicBlock, blocks, num_classes=num_classes)
    if small:
        net.conv1, net.maxpool = _convolution(channels, 64, 3, 1), nn.Identity()
    elif channels != 3:
        net.conv1 = _convolution(channels, 64, 7, 2)
    return _with_parts(net, "fc", ("layer1", "layer2", "layer3", "layer4"))


def mobilenet_v2(num_classes: int, channels: int, small: bool) -> nn.Module:
    """Sandler et al. 2018, width 1."""
    from torchvision.models import MobileNetV2

    first = 1 if small else 2
    rows = [
        (1, 16, 1, 1),
        (6, 24, 2, first),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ]
    net = MobileNetV2(num_classes, inverted_residual_setting=[list(row) for row in rows])
    if small or channels != 3:
        net.features[0][0] = _convolution(channels, 32, 3, first)
    return _with_parts(net, "classifier.1", ("features.3", "features.6", "features.13", "features.18"))


def shufflenet_v2(num_classes: int, channels: int, small: bool) -> nn.Module:
    """Ma et al. 2018, width 1."""
    from torchvision.models import ShuffleNetV2

    net = ShuffleNetV2([4, 8, 4], [24, 116, 232, 464, 1024], num_classes=num_classes)
    if small or channels != 3:
        net.conv1[0] = _convolution(channels, 24, 3, 1 if small else 2)
    if small:
        net.maxpool = nn.Identity()
    return _with_parts(net, "fc", ("stage2", "stage3", "conv5"))


def _convolution(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Conv2d:
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer


def _with_parts(net: Any, head: str, stages: tuple[str, ...]) -> nn.Module:
    net.head, net.stages = head, stages
    out: nn.Module = net
    return out


def torchvision_names(state: Mapping[str, Any]) -> dict[str, Any]:
    """A CIFAR ResNet's parameters under torchvision's names: the same layers, named otherwise.

    >>> list(torchvision_names({"layer2.0.shortcut.0.weight": 1, "linear.bias": 2}))
    ['layer2.0.downsample.0.weight', 'fc.bias']
    """
    renamed = {}
    for name, value in state.items():
        new = name.replace(".shortcut.", ".downsample.")
        renamed["fc." + new.removeprefix("linear.") if new.startswith("linear.") else new] = value
    return renamed
