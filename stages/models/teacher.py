"""A frozen classifier with its own input rule: the private teacher, or a frozen student used as adversary."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from stages.models.inputs import InputSpec
from stages.models.settings import InputSettings
from stages.models.taps import head_of, inputs_of, outputs_of, stage_paths


class Teacher:
    """Images in [−1, 1] in, float32 logits out. Always in eval mode; parameters never receive gradients."""

    differentiable = True

    def __init__(self, net: nn.Module, spec: InputSettings, class_names: Sequence[str], identity: dict[str, Any]):
        self.net = net.eval().requires_grad_(False)
        self.input = InputSpec(spec)
        self.class_names = tuple(class_names)
        self.num_classes = len(self.class_names)
        self.identity = identity
        self._norms = [module for module in net.modules() if isinstance(module, _BatchNorm)]
        self._head = head_of(net)

    @property
    def has_batchnorm(self) -> bool:
        """Whether the feature-statistics term has anything to match."""
        return bool(self._norms)

    @property
    def batchnorms(self) -> list[tuple[Tensor, Tensor]]:
        """(running mean, running variance), each ``[c]``, of every BatchNorm layer, in the order of the network."""
        return [(norm.running_mean, norm.running_var) for norm in self._norms]  # type: ignore[misc]

    @property
    def class_weights(self) -> Tensor:
        """Weight of the last linear layer, ``[C, D]``."""
        weight = self._head.weight
        assert isinstance(weight, Tensor)
        return weight

    def logits(self, x: Tensor) -> Tensor:
        """``[n, 3, h, w]`` in [−1, 1] to ``[n, C]``."""
        out: Tensor = self.net(self.input(x))
        return out.float()

    def features(self, x: Tensor) -> Tensor:
        """Penultimate features ``[n, D]``: what the last linear layer sees."""
        with inputs_of([self._head]) as seen:
            self.net(self.input(x))
        return seen[0].flatten(1).float()

    def with_batchnorm_inputs(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits and the inputs of every BatchNorm layer, in the order of :attr:`batchnorms`."""
        with inputs_of(self._norms) as seen:
            logits = self.logits(x)
        return logits, seen

    def with_stages(self, x: Tensor, paths: Sequence[str] | None = None) -> tuple[Tensor, list[Tensor]]:
        """Logits and the outputs of the modules at ``paths`` (default: the network's own stages).

        Outputs carry a graph where ``x`` requires gradients: class activation gradients need that.
        """
        paths = stage_paths(self.net) if paths is None else list(paths)
        with outputs_of(self.net, paths) as seen:
            logits = self.logits(x)
        return logits, [seen[path] for path in paths]

    def to(self, device: str | torch.device) -> "Teacher":
        """Move the network; returns self."""
        self.net.to(device)
        return self
