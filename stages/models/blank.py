"""A classifier without its weights, by default shapes alone on the meta device: for counting what it costs."""

import torch
from torch import nn

from stages.models import foreign, registry
from stages.models.identity import ModelConfig, resolve
from stages.models.schemes import split_name
from stages.models.settings import ModelSettings
from stages.models.teacher import Teacher


def blank_teacher(settings: ModelSettings, device: str = "meta") -> Teacher | None:
    """The classifier that ``settings`` name, ready for meta tensors; None for a black box, whose inside is unknown.

    On another ``device`` its weights are random. Reads its configuration, never its weights. Raises UsageError where it
    cannot be built.
    """
    source = resolve(settings)
    return blank(source.config, source.named, device)


def blank(config: ModelConfig, named: bool = False, device: str = "meta") -> Teacher | None:
    """As :func:`blank_teacher`, from a config; ``named`` tells that the user wrote the name, so that it may be code."""
    scheme, _ = split_name(config.architecture)
    if scheme == "onnx" and named:
        return None
    if scheme == "code" and named:  # may build its network from files, which a default device would break
        made = foreign.call_code(config)
        if not isinstance(made, nn.Module):
            return None
        net = foreign.finish(made, config).to(device)
    else:
        with torch.device(device):
            net = registry.build_net(config, named)
    return Teacher(net, config.input, config.class_names, {"architecture": config.architecture})
