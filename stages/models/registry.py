"""Architectures by name: the built-in ones, and the way to those of timm, torchvision, transformers and users.

Every built-in network has ``stages``, the module paths of its stage outputs, and ``head``, the path of its last linear
layer: feature taps and class activation maps find their place by them (others: see :mod:`stages.models.taps`).
"""

import difflib
from collections.abc import Callable

from torch import nn

from manifests.errors import UsageError
from stages.models import foreign, imagenet_nets
from stages.models.digits import DigitsCNN
from stages.models.identity import ModelConfig
from stages.models.resnet_cifar import ResNetCifar, group_norm
from stages.models.schemes import IMAGENET_NETS, check_stored, split_name
from stages.models.settings import Stem
from stages.models.vgg import Vgg11
from stages.models.wide_resnet import WideResNet

_BUILDERS: dict[str, Callable[[int, int, bool], nn.Module]] = {
    "digits-cnn": lambda classes, channels, _: DigitsCNN(classes, channels, 32, (3, 2)),
    "digits-cnn-small": lambda classes, channels, _: DigitsCNN(classes, channels, 16, (2, 2)),
    "resnet8": lambda classes, channels, _: ResNetCifar(classes, channels, 1),
    "resnet8-gn": lambda classes, channels, _: ResNetCifar(classes, channels, 1, group_norm),
    "resnet20": lambda classes, channels, _: ResNetCifar(classes, channels, 3),
    "resnet32": lambda classes, channels, _: ResNetCifar(classes, channels, 5),
    "resnet44": lambda classes, channels, _: ResNetCifar(classes, channels, 7),
    "resnet56": lambda classes, channels, _: ResNetCifar(classes, channels, 9),
    "resnet18": lambda classes, channels, small: imagenet_nets.resnet(classes, channels, small, [2, 2, 2, 2]),
    "resnet34": lambda classes, channels, small: imagenet_nets.resnet(classes, channels, small, [3, 4, 6, 3]),
    "vgg11": Vgg11,
    "wrn-16-1": lambda classes, channels, _: WideResNet(classes, channels, 16, 1),
    "wrn-16-2": lambda classes, channels, _: WideResNet(classes, channels, 16, 2),
    "wrn-40-1": lambda classes, channels, _: WideResNet(classes, channels, 40, 1),
    "wrn-40-2": lambda classes, channels, _: WideResNet(classes, channels, 40, 2),
    "mobilenetv2": imagenet_nets.mobilenet_v2,
    "shufflenetv2": imagenet_nets.shufflenet_v2,
}


def names() -> tuple[str, ...]:
    """Every built-in architecture."""
    return tuple(_BUILDERS)


def build(name: str, num_classes: int, channels: int = 3, stem: Stem = "native") -> nn.Module:
    """A freshly initialised built-in network (from torch's global random state).

    ``stem``: ``small`` keeps the resolution in the first layers of ImageNet networks; others have none to change.
    Raises UsageError naming near matches for an unknown name.
    """
    if name not in _BUILDERS:
        near = difflib.get_close_matches(name, _BUILDERS, n=3) or list(_BUILDERS)
        raise UsageError(f"unknown architecture '{name}': did you mean {', '.join(near)}?")
    return _BUILDERS[name](num_classes, channels, stem == "small")


def build_net(config: ModelConfig, named: bool = False) -> nn.Module:
    """A freshly initialised network of any scheme, as ``config`` describes it.

    ``named`` tells that the user wrote the name; one from a file must not run foreign code. ``net.adaptation`` says
    in words what a small stem changed, empty where nothing. Raises UsageError where it cannot be built.
    """
    scheme, _ = split_name(config.architecture)
    if not named:
        check_stored(config.architecture, "the stored config")
    if scheme != "builtin":
        return foreign.build_foreign(config)
    net = build(config.architecture, config.num_classes, config.channels, config.stem)
    small = config.stem == "small" and config.architecture in IMAGENET_NETS
    family = config.architecture.rstrip("v0123456789")
    net.__dict__["adaptation"] = imagenet_nets.SMALL_STEM[family] if small else ""
    return net


def adaptation_of(net: nn.Module) -> str:
    """What was changed in the stem for small images, in words; empty where nothing was."""
    return str(net.__dict__.get("adaptation", ""))
