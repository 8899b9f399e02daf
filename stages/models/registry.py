"""Built-in architectures by name.

Every network built here has ``stages``, the module paths of its stage outputs, and ``head``, the path of its last
linear layer: feature taps and class activation maps find their place by them.
"""

import difflib
from collections.abc import Callable

from torch import nn

from manifests.errors import UsageError
from stages.models.digits import DigitsCNN
from stages.models.resnet_cifar import ResNetCifar, group_norm

_BUILDERS: dict[str, Callable[[int, int], nn.Module]] = {
    "digits-cnn": lambda classes, channels: DigitsCNN(classes, channels, 32, (3, 2)),
    "digits-cnn-small": lambda classes, channels: DigitsCNN(classes, channels, 16, (2, 2)),
    "resnet8": lambda classes, channels: ResNetCifar(classes, channels, 1),
    "resnet8-gn": lambda classes, channels: ResNetCifar(classes, channels, 1, group_norm),
    "resnet20": lambda classes, channels: ResNetCifar(classes, channels, 3),
    "resnet32": lambda classes, channels: ResNetCifar(classes, channels, 5),
    "resnet44": lambda classes, channels: ResNetCifar(classes, channels, 7),
    "resnet56": lambda classes, channels: ResNetCifar(classes, channels, 9),
}


def names() -> tuple[str, ...]:
    """Every built-in architecture."""
    return tuple(_BUILDERS)


def build(name: str, num_classes: int, channels: int = 3) -> nn.Module:
    """A freshly initialised network (from torch's global random state).

    Raises UsageError naming near matches for an unknown name.
    """
    if name not in _BUILDERS:
        near = difflib.get_close_matches(name, _BUILDERS, n=3) or list(_BUILDERS)
        raise UsageError(f"unknown architecture '{name}': did you mean {', '.join(near)}?")
    return _BUILDERS[name](num_classes, channels)
