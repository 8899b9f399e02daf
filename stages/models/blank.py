"""A classifier's shapes without its weights, on the meta device: for counting what it costs."""

import torch
from torch import nn

from stages.models import foreign, registry
from stages.models.identity import resolve
from stages.models.schemes import split_name
from stages.models.settings import ModelSettings
from stages.models.teacher import Teacher


def blank_teacher(settings: ModelSettings) -> Teacher | None:
    """The classifier that ``settings`` name, ready for meta tensors; None for a black box, whose inside is unknown.

    Reads its configuration, never its weights. Raises UsageError where it cannot be built.
    """
    source = resolve(settings)
    config, (scheme, _) = source.config, split_name(source.config.architecture)
    if scheme == "onnx":
        return None
    if scheme == "code":  # may build its network from files, which a default device would break
        made = foreign.call_code(config)
        if not isinstance(made, nn.Module):
            return None
        net = foreign.finish(made, config).to("meta")
    else:
        with torch.device("meta"):
            net = registry.build_net(config, source.named)
    return Teacher(net, config.input, config.class_names, {"architecture": config.architecture})
