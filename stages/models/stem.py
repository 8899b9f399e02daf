"""Fit the first layers of a foreign ImageNet network to images of up to 64 px, and say what was changed.

Used for students named ``timm:…`` or ``torchvision:…``, and for teachers with ``stem: small``.
"""

import torch
from torch import nn


def adapt(net: nn.Module, channels: int, size: int) -> str:
    """Take two halvings out of ``net``'s first layers, in place; returns what was done in words, empty if nothing.

    First the first convolution (3×3 of stride 1, as in CIFAR ResNets), then the max pooling of the stem, or else the
    next convolution with a stride if the network still runs. Patch embeddings stay as they are. The outcome follows
    from the architecture alone.
    """
    convolutions = [(name, m) for name, m in net.named_modules() if isinstance(m, nn.Conv2d)]
    if not convolutions:
        return ""
    name, first = convolutions[0]
    if first.stride[0] < 2 or first.kernel_size[0] <= first.stride[0] or first.groups > 1:
        return ""
    kernel = min(3, first.kernel_size[0])
    layer = nn.Conv2d(channels, first.out_channels, kernel, 1, kernel // 2, bias=first.bias is not None)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    net.set_submodule(name, layer)
    done = [f"{name}: {kernel}×{kernel} of stride 1"]
    pool = _stem_pool(net)
    if pool:
        net.set_submodule(pool, nn.Identity())
        done.append(f"{pool}: left out")
    else:
        strided = [(n, m) for n, m in convolutions[1:] if m.stride[0] == 2]
        if strided and _runs_with_stride_one(net, strided[0][1], channels, size):
            done.append(f"{strided[0][0]}: stride 1")
    return "; ".join(done)


def _stem_pool(net: nn.Module) -> str:
    """The max pooling that no more than three convolutions precede."""
    convolutions = 0
    for name, module in net.named_modules():
        convolutions += isinstance(module, nn.Conv2d)
        if convolutions > 3:
            return ""
        if isinstance(module, nn.MaxPool2d) and convolutions and module.stride in (2, (2, 2)):
            return name
    return ""


def _runs_with_stride_one(net: nn.Module, layer: nn.Conv2d, channels: int, size: int) -> bool:
    """Set ``layer``'s stride to 1, or leave it where the network does not run so (a parallel shortcut strides too)."""
    before, training = layer.stride, net.training
    layer.stride = (1, 1)
    try:
        with torch.no_grad():
            net.eval()(torch.zeros(1, channels, size, size))
    except RuntimeError:
        layer.stride = before
        return False
    finally:
        net.train(training)
    return True
