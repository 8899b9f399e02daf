"""A frozen classifier with its own input rule: the private teacher, or a frozen student used as adversary."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from manifests.errors import DataError, FactoryError
from stages.micro_batches import in_micro_batches, moment_sums, moments
from stages.models.inputs import InputSpec
from stages.models.outputs import require_finite, require_finite_weights
from stages.models.settings import InputSettings
from stages.models.taps import head_of, head_path, inputs_of, outputs_of, stage_paths


class Teacher:
    """Images in [−1, 1] in, float32 logits out. Always in eval mode; parameters never receive gradients."""

    differentiable = True
    batch_limit: int | None = None  # most images at once, where all of a group do not fit the memory

    def __init__(self, net: nn.Module, spec: InputSettings, class_names: Sequence[str], identity: dict[str, Any]):
        self.net = net.eval().requires_grad_(False)
        self.input = InputSpec(spec)
        self.class_names = tuple(class_names)
        self.num_classes = len(self.class_names)
        self.identity = identity
        norms = [m for m in net.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
        self._norms: list[nn.Module] = list(norms)
        self._head = head_of(net) if head_path(net) is not None else None

    @property
    def what(self) -> str:
        """How errors name it."""
        return f"teacher '{self.identity.get('architecture')}'"

    @property
    def has_batchnorm(self) -> bool:
        """Whether the feature-statistics term has anything to match."""
        return bool(self._norms)

    @property
    def batchnorms(self) -> list[tuple[Tensor, Tensor]]:
        """(running mean, running variance), each ``[c]``, of every BatchNorm layer, in the order of the network."""
        return [(norm.running_mean, norm.running_var) for norm in self._norms]  # type: ignore[misc]

    @property
    def class_weights(self) -> Tensor | None:
        """Weight of the last linear layer, ``[C, D]``; None where there is no such layer."""
        weight = self._head.weight if self._head is not None else None
        assert weight is None or isinstance(weight, Tensor)
        return weight

    def logits(self, x: Tensor) -> Tensor:
        """``[n, 3, h, w]`` in [−1, 1] to ``[n, C]``. Raises DataError for NaN, except under guidance."""
        out: Tensor = in_micro_batches(self._logits, self.batch_limit, x)
        return out

    def _logits(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(self.input(x)).float()
        return out if out.requires_grad else require_finite(out, self.what)

    def look(
        self, x: Tensor, features: bool = True, batchnorm: bool = True
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Logits, penultimate features ``[n, D]`` (what the last linear layer sees) and the inputs of every BatchNorm
        layer, in the order of :attr:`batchnorms`, all from one pass. What is not asked for is not kept in memory:
        features are then None, as where there is no such layer, and inputs an empty list.

        A layer used twice shows its inputs as one, flattened to ``[n, c, …]``; one never used is left out of both.
        Raises DataError for NaN logits, except under guidance.
        """
        heads = [self._head] if features and self._head is not None else []
        norms = self._norms if batchnorm else []
        with inputs_of(heads) as shown, inputs_of(norms) as seen:
            logits = self._logits(x)
        if not all(seen):
            self._norms = [norm for norm, found in zip(norms, seen, strict=True) if found]
        return (
            logits,
            shown[0][-1].flatten(1).float() if shown else None,
            [_joined(found) for found in seen if found],
        )

    def with_features(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits and features as :meth:`look` has them, at most ``batch_limit`` images at once."""
        if self._head is None:
            return self.logits(x), None
        logits, features = in_micro_batches(lambda x: self.look(x, batchnorm=False)[:2], self.batch_limit, x)
        return logits, features

    def with_batchnorm_inputs(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits and the inputs of every BatchNorm layer as :meth:`look` has them."""
        logits, _, inputs = self.look(x, features=False)
        return logits, inputs

    def with_moments(self, x: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Logits, and mean and biased variance ``[c]`` over the batch of the inputs of every BatchNorm layer, in the
        order of :attr:`batchnorms`; exact and differentiable where the batch is seen in parts, too."""
        if self.batch_limit is None or len(x) <= self.batch_limit:
            logits, inputs = self.with_batchnorm_inputs(x)
            return logits, [mean_and_variance(y.to(m.dtype)) for y, (m, _) in zip(inputs, self.batchnorms, strict=True)]

        def part(x: Tensor) -> tuple[Tensor, ...]:
            logits, inputs = self.with_batchnorm_inputs(x)
            return logits, *(moment_sums(y, mean) for y, (mean, _) in zip(inputs, self.batchnorms, strict=True))

        logits, *sums = in_micro_batches(part, self.batch_limit, x)
        return logits, [moments(total, mean, len(x)) for total, (mean, _) in zip(sums, self.batchnorms, strict=True)]

    @torch.no_grad()
    def check(self) -> "Teacher":
        """Let it answer two images; a network that cuts gradients off becomes not ``differentiable``.

        Raises DataError where it fails, returns something else than logits of each image, or NaN.
        """
        require_finite_weights(self.net, self.what)
        settings = self.input.settings
        x = torch.linspace(-1, 1, 6 * settings.size**2).view(2, 3, settings.size, settings.size)
        x = x.to(next(self.net.parameters(), x).device).requires_grad_()
        try:
            with torch.enable_grad(), inputs_of([self._head] if self._head is not None else []) as seen:
                logits = self.logits(x)
        except FactoryError:
            raise
        except Exception as error:  # whatever a foreign network does
            shape = f"{settings.channels}×{settings.size}×{settings.size}"
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DataError(f"{self.what} cannot take images of {shape}: {reason}") from error
        if len(require_finite(logits, self.what)) != len(x):
            raise DataError(f"{self.what} answers {len(x)} images with {len(logits)} rows of logits")
        self.differentiable = logits.requires_grad
        if any(len(found) != 1 or found[0].flatten(1).shape != (2, self._head_width) for found in seen):
            self._head = None  # it looked like the last layer, but does not turn features into logits
        return self

    @property
    def _head_width(self) -> int:
        weight = self.class_weights
        return -1 if weight is None else weight.shape[1]

    def with_stages(self, x: Tensor, paths: Sequence[str] | None = None) -> tuple[Tensor, list[Tensor]]:
        """Logits and the outputs of the modules at ``paths`` (default: the network's own stages).

        Outputs carry a graph where ``x`` requires gradients: class activation gradients need that.
        """
        paths = stage_paths(self.net) if paths is None else list(paths)
        with outputs_of(self.net, paths) as seen:
            logits = self._logits(x)
        return logits, [seen[path] for path in paths]

    def to(self, device: str | torch.device | None = None, memory_format: Any = None) -> "Teacher":
        """Move the network, or lay its weights out anew (its inputs follow them); returns self."""
        self.net.to(device)
        if memory_format is not None:
            self.net.to(memory_format=memory_format)
        return self


def mean_and_variance(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance ``[c]`` of ``[n, c, …]``."""
    variance, mean = torch.var_mean(x, [axis for axis in range(x.ndim) if axis != 1], correction=0)
    return mean, variance


def _joined(inputs: list[Tensor]) -> Tensor:
    return inputs[0] if len(inputs) == 1 else torch.cat([x.flatten(2) for x in inputs], 2)
