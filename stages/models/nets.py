"""The built-in networks: digits CNNs, CIFAR ResNets, wide ResNets, VGG-11, and torchvision's with small stems.

Each has ``stages``, the module paths of its stage outputs, and ``head``, the path of its last linear layer: feature
taps and class activation maps use them (other networks: :mod:`stages.models.hooks`). :func:`build` makes one by name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manifests.errors import UsageError, suggest
from stages.settings import Stem


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


Norm = Callable[[int], nn.Module]


def group_norm(channels: int) -> nn.Module:
    """Eight groups: a norm that does not look at the rest of the batch."""
    return nn.GroupNorm(8, channels)


class Block(nn.Module):
    """Two 3×3 convolutions. Where the width changes, the shortcut takes every second pixel and pads the channels
    equally on both sides (option A of He et al. 2015), or is a 1×1 ``projection`` (option B)."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm, projection: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = norm(outputs)
        self.stride, self.padding = stride, (outputs - inputs) // 2
        self.downsample = None
        if projection and stride != 1:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.downsample is not None:
            x = self.downsample(x)
        elif self.stride != 1:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(x + y)


class ResNetCifar(nn.Module):
    """ResNet for 32×32 images (He et al. 2015, section 4.2), 6·``blocks`` + 2 layers: a 3×3 stem and three stages of
    16, 32 and 64 channels."""

    stages = ("layer1", "layer2", "layer3")
    head = "linear"

    def __init__(
        self, num_classes: int, channels: int, blocks: int, norm: Norm = nn.BatchNorm2d, projection: bool = False
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.bn1 = norm(16)
        self.layer1 = self._stage(16, 16, 1, blocks, norm, projection)
        self.layer2 = self._stage(16, 32, 2, blocks, norm, projection)
        self.layer3 = self._stage(32, 64, 2, blocks, norm, projection)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(inputs: int, outputs: int, stride: int, blocks: int, norm: Norm, projection: bool) -> nn.Sequential:
        rest = (Block(outputs, outputs, 1, norm, projection) for _ in range(blocks - 1))
        return nn.Sequential(Block(inputs, outputs, stride, norm, projection), *rest)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        out: Tensor = self.linear(x.mean((2, 3)))
        return out


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
    """Wide ResNet for 32×32 images (Zagoruyko and Komodakis 2016): a 3×3 stem of 16 channels and three stages of 16k,
    32k and 64k channels (k = ``width``) with (``depth`` − 4)/6 pre-activation blocks each.

    Parameter names are those of the checkpoints in circulation: ``conv1``,
    ``block{1,2,3}.layer.{i}.{bn1,conv1,bn2,conv2}``, ``convShortcut`` where the width changes, ``bn1``, ``fc``.
    """

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


VGG11_WIDTHS = ((64,), (128,), (256, 256), (512, 512), (512, 512))


class Vgg11(nn.Module):
    """VGG-11 with BatchNorm (Simonyan and Zisserman 2015) as used on small images: five blocks of 3×3 convolutions,
    global average, one linear layer, or three (``mlp``). A ``small`` one pools after the first three blocks only: total
    stride 8, not 32.
    """

    stages = ("block2", "block3", "block4")

    def __init__(self, num_classes: int, channels: int, small: bool, mlp: bool = False):
        super().__init__()
        pools = 3 if small else len(VGG11_WIDTHS)
        for number, widths in enumerate(VGG11_WIDTHS):
            layers: list[nn.Module] = []
            for width in widths:
                layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            if number < pools:
                layers.append(nn.MaxPool2d(2))
            self.add_module(f"block{number}", nn.Sequential(*layers))
        last = nn.Linear(channels, num_classes)
        hidden = [layer for _ in range(2 * mlp) for layer in (nn.Linear(channels, channels), nn.ReLU(), nn.Dropout())]
        self.classifier = nn.Sequential(*hidden, last) if mlp else last
        self.head = "classifier.6" if mlp else "classifier"
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        for number in range(len(VGG11_WIDTHS)):
            x = self.get_submodule(f"block{number}")(x)
        out: Tensor = self.classifier(x.mean((2, 3)))
        return out


SMALL_STEM = {
    "resnet": "3×3 first convolution of stride 1, no max pooling",
    "vgg": "no pooling after the fourth and fifth block",
    "mobilenet": "stride 1 in the first convolution and the first inverted residual stage",
    "shufflenet": "first convolution of stride 1, no max pooling",
}
"""What a small stem changes, by family: it takes two halvings out of the first layers, so that 32 px end at 4×4 instead
of 1×1 (total stride 8 instead of 32)."""


def resnet(num_classes: int, channels: int, small: bool, blocks: list[int]) -> nn.Module:
    """torchvision's ResNet with basic blocks (He et al. 2016); all parameter names here are torchvision's."""
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

    net = MobileNetV2(num_classes)
    if small or channels != 3:
        net.features[0][0] = _convolution(channels, 32, 3, 1 if small else 2)
    if small:
        net.features[2].conv[1][0].stride = (1, 1)
    return _with_parts(net, "classifier.1", ("features.3", "features.6", "features.13", "features.18"))


def shufflenet_v2(num_classes: int, channels: int, small: bool, kernel: int = 3) -> nn.Module:
    """Ma et al. 2018, width 1. ``kernel``: of the first convolution."""
    from torchvision.models import ShuffleNetV2

    net = ShuffleNetV2([4, 8, 4], [24, 116, 232, 464, 1024], num_classes=num_classes)
    if small or channels != 3:
        net.conv1[0] = _convolution(channels, 24, kernel, 1 if small else 2)
    if small:
        net.maxpool = nn.Identity()
    return _with_parts(net, "fc", ("stage2", "stage3", "conv5"))


def _convolution(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Conv2d:
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer


def _with_parts(net: nn.Module, head: str, stages: tuple[str, ...]) -> nn.Module:
    net.__dict__.update(head=head, stages=stages)
    return net


def biases_before_norm(net: nn.Module) -> dict[str, str]:
    """For every convolution without a bias that a BatchNorm follows, the name that a bias would have, and that of the
    running mean. The modules of built-in networks are registered in the order in which they run."""
    found = {}
    for path, parent in net.named_modules():
        for (name, module), (norm, follower) in pairwise(parent.named_children()):
            if isinstance(module, nn.Conv2d) and module.bias is None and isinstance(follower, nn.BatchNorm2d):
                below = f"{path}." if path else ""
                found[f"{below}{name}.bias"] = f"{below}{norm}.running_mean"
    return found


ARCHITECTURES: dict[str, Callable[[int, int, bool], nn.Module]] = {
    "digits-cnn": lambda classes, channels, _: DigitsCNN(classes, channels, 32, (3, 2)),
    "digits-cnn-small": lambda classes, channels, _: DigitsCNN(classes, channels, 16, (2, 2)),
    "resnet8": lambda classes, channels, _: ResNetCifar(classes, channels, 1),
    "resnet8-gn": lambda classes, channels, _: ResNetCifar(classes, channels, 1, group_norm),
    "resnet20": lambda classes, channels, _: ResNetCifar(classes, channels, 3),
    "resnet32": lambda classes, channels, _: ResNetCifar(classes, channels, 5),
    "resnet44": lambda classes, channels, _: ResNetCifar(classes, channels, 7),
    "resnet56": lambda classes, channels, _: ResNetCifar(classes, channels, 9),
    "resnet18": lambda classes, channels, small: resnet(classes, channels, small, [2, 2, 2, 2]),
    "resnet34": lambda classes, channels, small: resnet(classes, channels, small, [3, 4, 6, 3]),
    "vgg11": Vgg11,
    "wrn-16-1": lambda classes, channels, _: WideResNet(classes, channels, 16, 1),
    "wrn-16-2": lambda classes, channels, _: WideResNet(classes, channels, 16, 2),
    "wrn-40-1": lambda classes, channels, _: WideResNet(classes, channels, 40, 1),
    "wrn-40-2": lambda classes, channels, _: WideResNet(classes, channels, 40, 2),
    "mobilenetv2": mobilenet_v2,
    "shufflenetv2": shufflenet_v2,
}
"""(number of classes, input channels, small stem or not) to a network."""


@dataclass(frozen=True)
class Variant:
    """Another network that is called the same elsewhere, built where weights have its layers. ``what`` differs."""

    what: str
    build: Callable[[int, int, bool], nn.Module]


def _projected(blocks: int) -> Variant:
    return Variant(
        "1×1 convolutions as shortcuts",
        lambda classes, channels, _: ResNetCifar(classes, channels, blocks, projection=True),
    )


VARIANTS: dict[str, Variant] = {
    **{f"resnet{6 * blocks + 2}": _projected(blocks) for blocks in (1, 3, 5, 7, 9)},
    "vgg11": Variant("three linear layers", lambda classes, channels, small: Vgg11(classes, channels, small, mlp=True)),
    "shufflenetv2": Variant(
        "a 1×1 first convolution of stride 1, no max pooling",
        lambda classes, channels, _: shufflenet_v2(classes, channels, small=True, kernel=1),
    ),
}


def build(name: str, num_classes: int, channels: int = 3, stem: Stem = "native", variant: bool = False) -> nn.Module:
    """A freshly initialized built-in network (from torch's global random state), or its ``variant``.

    ``stem``: ``small`` keeps the resolution in the first layers of ImageNet networks; others ignore it.
    Raises UsageError naming near matches for an unknown name.
    """
    if name not in ARCHITECTURES:
        raise UsageError(f"unknown architecture '{name}': {suggest(name, ARCHITECTURES, len(ARCHITECTURES))}")
    builder = VARIANTS[name].build if variant else ARCHITECTURES[name]
    return builder(num_classes, channels, stem == "small")
