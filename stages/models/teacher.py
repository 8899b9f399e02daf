"""Frozen classifiers with their own input rule: teachers, frozen students, black boxes; and BatchNorm moments."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from manifests.errors import DataError, FactoryError, UsageError, first_line, one_line
from stages.memory import in_micro_batches, moment_sums, moments
from stages.models.hooks import head_of, head_path, inputs_of, outputs_of
from stages.models.inputs import InputSpec, logits_of, require_finite, require_finite_weights
from stages.models.onnx_data import with_small_data
from stages.settings import InputSettings

Answer = Callable[[Tensor], Any]
"""Prepared images ``[n, channels, size, size]`` on the CPU to logits ``[n, C]``."""


class Teacher:
    """Images ``[n, 3, h, w]`` in [−1, 1] of any size to float32 logits ``[n, C]``.

    Always in eval mode; parameters never receive gradients. ``batch_limit``: most images in one pass, None for any
    number. ``differentiable``: whether logits carry gradients to the images.
    """

    differentiable = True
    batch_limit: int | None = None

    def __init__(self, net: nn.Module, spec: InputSettings, class_names: Sequence[str], identity: dict[str, Any]):
        self.net = net.eval().requires_grad_(False)
        self._norms = batchnorm_layers(net)
        self._head = head_of(net) if head_path(net) is not None else None
        self._describe(spec, class_names, identity)

    def _describe(self, spec: InputSettings, class_names: Sequence[str], identity: dict[str, Any]) -> None:
        self.input = InputSpec(spec)
        self.class_names = tuple(class_names)
        self.num_classes = len(self.class_names)
        self.identity = identity

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
        return running_statistics(self._norms)

    @property
    def published_bn(self) -> tuple[float, float] | None:
        """:func:`published_bn_unit` of its BatchNorm layers, None without such layers."""
        return published_bn_unit(self.batchnorms) if self.has_batchnorm else None

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

    def forward(
        self, x: Tensor, features: bool = True, batchnorm: bool = True
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Logits ``[n, C]``, penultimate features ``[n, D]`` (the input of the last linear layer) and the inputs
        ``[n, c, …]`` of every BatchNorm layer, in the order of :attr:`batchnorms`, all from one pass.

        What is not asked for is not kept in memory: features are then None, as where there is no such layer, and
        inputs an empty list. The inputs of a layer used twice are joined, flattened to ``[n, c, …]``; a layer that is
        never used is dropped here and from :attr:`batchnorms`. Raises DataError for NaN logits, except under guidance.
        """
        heads = [self._head] if features and self._head is not None else []
        norms = self._norms if batchnorm else []
        with inputs_of(heads) as head_inputs, inputs_of(norms) as norm_inputs:
            logits = self._logits(x)
        if not all(norm_inputs):
            self._norms = [norm for norm, seen in zip(norms, norm_inputs, strict=True) if seen]
        return (
            logits,
            head_inputs[0][-1].flatten(1).float() if head_inputs else None,
            [seen[0] if len(seen) == 1 else torch.cat([y.flatten(2) for y in seen], 2) for seen in norm_inputs if seen],
        )

    def with_features(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits and features as :meth:`forward` has them, at most ``batch_limit`` images at once."""
        if self._head is None:
            return self.logits(x), None
        logits, features = in_micro_batches(lambda x: self.forward(x, batchnorm=False)[:2], self.batch_limit, x)
        return logits, features

    def with_batchnorm_inputs(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits and the inputs of every BatchNorm layer as :meth:`forward` has them."""
        logits, _, inputs = self.forward(x, features=False)
        return logits, inputs

    def with_moments(self, x: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Logits, and mean and biased variance ``[c]`` over the batch of the inputs of every BatchNorm layer, in the
        order of :attr:`batchnorms`; exact and differentiable in micro-batches, too."""
        if self.batch_limit is None or len(x) <= self.batch_limit:
            logits, inputs = self.with_batchnorm_inputs(x)
            return logits, [mean_and_variance(y.to(m.dtype)) for y, (m, _) in zip(inputs, self.batchnorms, strict=True)]

        def part(x: Tensor) -> tuple[Tensor, ...]:
            logits, inputs = self.with_batchnorm_inputs(x)
            return logits, *(moment_sums(y, mean) for y, (mean, _) in zip(inputs, self.batchnorms, strict=True))

        logits, *sums = in_micro_batches(part, self.batch_limit, x)
        return logits, [moments(total, mean, len(x)) for total, (mean, _) in zip(sums, self.batchnorms, strict=True)]

    def with_stages(self, x: Tensor, paths: Sequence[str]) -> tuple[Tensor, list[Tensor]]:
        """Logits and the outputs ``[n, c, h, w]`` of the modules at ``paths``.

        Outputs carry a graph where ``x`` requires gradients: class activation gradients need that.
        """
        with outputs_of(self.net, paths) as outputs:
            logits = self._logits(x)
        return logits, [outputs[path] for path in paths]

    def check(self) -> Self:
        """Run two probe images; sets ``differentiable = False`` if the logits carry no gradient.

        Raises DataError where that fails, returns something else than logits of each image, or NaN.
        """
        require_finite_weights(self.net, self.what)
        device = next(self.net.parameters(), torch.empty(0)).device
        with torch.enable_grad(), inputs_of([self._head] if self._head is not None else []) as head_inputs:
            logits = self._probe(device)
        self.differentiable = logits.requires_grad
        width = -1 if self.class_weights is None else self.class_weights.shape[1]
        if any(len(seen) != 1 or seen[0].flatten(1).shape != (2, width) for seen in head_inputs):
            self._head = None  # it looked like the last layer, but does not turn features into logits
        return self

    def _probe(self, device: torch.device | str = "cpu") -> Tensor:
        """Finite logits ``[2, C]`` of two gradients from −1 to 1."""
        channels, size = self.input.channels, self.input.size
        x = torch.linspace(-1, 1, 6 * size**2).view(2, 3, size, size).to(device).requires_grad_()
        try:
            logits = self.logits(x)
        except FactoryError:
            raise
        except Exception as error:  # whatever a foreign network or runtime does
            reason = first_line(error)
            wrap = "; what takes more than pixels needs module.path:function" if "'hf:" in self.what else ""
            raise DataError(f"{self.what} cannot take images of {channels}×{size}×{size}: {reason}{wrap}") from error
        if len(require_finite(logits, self.what)) != len(x):
            raise DataError(f"{self.what} answers {len(x)} images with {len(logits)} rows of logits")
        return logits

    def to(self, device: str | torch.device | None = None, memory_format: Any = None) -> Self:
        """Move the network, or lay its weights out anew (its inputs follow them); returns self."""
        self.net.to(device)
        if memory_format is not None:
            self.net.to(memory_format=memory_format)
        return self


class BlackBox(Teacher):
    """A teacher that only answers: an ONNX file, or a user's function without gradients, computed on the CPU.

    It has no features, layers or BatchNorm statistics, so it cannot guide; ``--method dmkd`` works with it.
    """

    differentiable = False

    def __init__(self, answer: Answer, spec: InputSettings, class_names: Sequence[str], identity: dict[str, Any]):
        self._answer = answer
        self._norms = []
        self._head = None
        self._describe(spec, class_names, identity)

    @property
    def net(self) -> nn.Module:  # type: ignore[override]
        """There is none. Raises UsageError saying so."""
        raise UsageError(
            f"{self.what} is a black box without layers: cam and gradcam losses, feature statistics and guidance "
            "need a network (synthesize with --method dmkd)"
        )

    def _logits(self, x: Tensor) -> Tensor:
        """``[n, 3, h, w]`` in [−1, 1] to ``[n, C]`` on the device of ``x``, without a graph."""
        with torch.no_grad():
            out = self._answer(self.input(x.detach()).cpu())
            return require_finite(logits_of(out, self.num_classes, self.what).float(), self.what).to(x.device)

    def check(self) -> Self:
        """Run two probe images. Raises DataError where that fails or returns something else than logits of each."""
        self._probe()
        return self

    def to(self, device: str | torch.device | None = None, memory_format: Any = None) -> Self:
        """Nothing to move; logits go to the device of the images."""
        return self


class Moments:
    """Mean and biased variance per channel of every BatchNorm layer's inputs, over all batches added, in float64."""

    def __init__(self) -> None:
        self.count: list[int] = []  # of values per channel, for each layer
        self.sums: list[Tensor] = []  # [c] each
        self.squares: list[Tensor] = []  # [c] each

    def add(self, inputs: Sequence[Tensor]) -> None:
        """``inputs`` of a batch: ``[n, c, …]`` for each layer."""
        for layer, x in enumerate(inputs):
            flat = x.detach().transpose(0, 1).flatten(1).double()
            if layer == len(self.count):
                self.count.append(0)
                self.sums.append(flat.new_zeros(len(flat)))
                self.squares.append(flat.new_zeros(len(flat)))
            self.count[layer] += flat.shape[1]
            self.sums[layer] += flat.sum(1)
            self.squares[layer] += flat.square().sum(1)

    def gap(self, running: Sequence[tuple[Tensor, Tensor]]) -> float | None:
        """:func:`moments_gap` to the ``running`` statistics: the ``bn`` term of guidance, over a dataset. None without
        BatchNorm layers."""
        means = [total / count for total, count in zip(self.sums, self.count, strict=True)]
        squares = [total / count for total, count in zip(self.squares, self.count, strict=True)]
        data = [(mean, square - mean.square()) for mean, square in zip(means, squares, strict=True)]
        return float(moments_gap(data, running, eps=0.0)) if data else None


MIN_VARIANCE = 1e-5  # of a channel: dead ones have none


def batchnorm_layers(net: nn.Module) -> list[nn.Module]:
    """Those that keep running statistics."""
    return [module for module in net.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None]


def running_statistics(norms: Sequence[nn.Module]) -> list[tuple[Tensor, Tensor]]:
    """(running mean, running variance), each ``[c]``, of BatchNorm layers."""
    return [(norm.running_mean, norm.running_var) for norm in norms]  # type: ignore[misc]


def moments_gap(
    data: Sequence[tuple[Tensor, Tensor]], running: Sequence[tuple[Tensor, Tensor]], eps: float = 1e-12
) -> Tensor:
    """Distance of ``data``'s BatchNorm statistics to the ``running`` ones, a scalar (DiffDFKD, equation 6, normalized):
    the mean over layers of RMS_c((μ − m)/s) + RMS_c((σ² − s²)/s²), from each layer's (mean, biased variance), ``[c]``.

    Dividing by the running std s per channel and averaging over layers makes one weight fit every teacher. ``eps``
    under the roots keeps gradients finite at 0.
    """
    terms = []
    for (mean, variance), (running_mean, running_variance) in zip(data, running, strict=True):
        scale = running_variance.to(variance.dtype).clamp_min(MIN_VARIANCE)
        shift, spread = (mean - running_mean) / scale.sqrt(), (variance - running_variance) / scale
        terms.append((shift.square().mean() + eps).sqrt() + (spread.square().mean() + eps).sqrt())
    return torch.stack(terms).mean()


def published_bn_unit(running: Sequence[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """What the papers' BatchNorm loss Σ_l(‖μ_l − m_l‖₂ + ‖σ²_l − s²_l‖₂) with weight 1 is as a weight of
    :func:`moments_gap`: Σ_l‖s_l‖₂ for its means and Σ_l‖s²_l‖₂ for its variances, two numbers.

    Exact where every channel of every layer is off by the same share of its running std s (variance s²): r of it make
    r·Σ_l‖s_l‖₂ there and r here.
    """
    variances = [variance.double().clamp_min(MIN_VARIANCE) for _, variance in running]
    return sum(v.sum().sqrt().item() for v in variances), sum(v.norm().item() for v in variances)


def kind_of_answers(
    answer: Answer, spec: InputSettings, num_classes: int
) -> Literal["probabilities", "unit", "logits"]:
    """What ``answer`` gives for several pictures, noise among them: ``probabilities`` in [0, 1] that sum to 1 (within
    1 %: half precision and quantized networks), other numbers in [0, 1], or logits. Logits where it fails, too:
    :meth:`Teacher.check` says how."""
    generator = torch.Generator().manual_seed(0)
    side = spec.size
    x = torch.rand(8, 3, side, side, generator=generator) * 2 - 1  # noise, colors and gradients
    x[2:4] = x[2:4, :, :1, :1]
    x[4:6] = torch.linspace(-1, 1, 6 * side**2).view(2, 3, side, side)
    x[6:] = x[6:].round()
    try:
        with torch.no_grad():
            out = logits_of(answer(InputSpec(spec)(x)), num_classes, "").double()
    except Exception:  # whatever a foreign network or runtime does
        return "logits"
    if len(out) != len(x) or not bool(((out >= 0) & (out <= 1)).all()) or bool((out == out[:1]).all()):
        return "logits"  # a constant says nothing
    return "probabilities" if bool(((out.sum(1) - 1).abs() < 0.01).all()) else "unit"


def log_probabilities(out: Any, num_classes: int, what: str) -> Tensor:
    """The logits, up to a constant in each row, of a classifier that answers probabilities."""
    probabilities = logits_of(out, num_classes, what).float()
    return probabilities.clamp_min(torch.finfo(torch.float32).tiny).log()


def mean_and_variance(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance ``[c]`` of ``[n, c, …]``."""
    variance, mean = torch.var_mean(x, [axis for axis in range(x.ndim) if axis != 1], correction=0)
    return mean, variance


def onnx_answer(data: bytes, where: str, external: Mapping[str, bytes] | None = None) -> Answer:
    """The answers of an ONNX classifier with one image input and its ``external`` data files, by name.

    Raises DataError where the file is no such thing.
    """
    try:
        import onnxruntime as ort
    except ImportError:
        raise UsageError(f"{where} needs onnxruntime: pip install 'dfkd-factory[onnx]'") from None
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what it logs repeats names from the file, unescaped
    if external:
        data = with_small_data(data, external, Path(where))
        lengths = [len(content) for content in external.values()]
        options.add_external_initializers_from_files_in_memory(list(external), list(external.values()), lengths)
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has no public base class for its errors
        raise DataError(f"{where} cannot be loaded by onnxruntime: {one_line(error)}") from None
    inputs = session.get_inputs()
    if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].type not in ("tensor(float)", "tensor(float16)"):
        found = ", ".join(f"{i.name} {i.shape} {i.type}" for i in inputs)
        raise DataError(f"{where} takes {found}; expected one float input [n, channels, size, size]")
    name, shape = inputs[0].name, inputs[0].shape
    dtype = np.float16 if inputs[0].type == "tensor(float16)" else np.float32
    step = shape[0] if isinstance(shape[0], int) else None  # exported with a fixed batch size

    def answer(x: Tensor) -> list[Tensor]:
        for given, wanted in zip(x.shape[1:], shape[1:], strict=True):
            if isinstance(wanted, int) and given != wanted:
                last = " (channels last: export it with channels first)" if shape[3] == x.shape[1] else ""
                raise DataError(f"{where} takes {shape}{last}, but input says {list(x.shape[1:])}")
        images, size = x.numpy().astype(dtype), step or len(x)
        parts: list[list[Any]] = []
        for start in range(0, len(images), size):
            part = images[start : start + size]
            padded = np.concatenate([part, np.zeros((size - len(part), *part.shape[1:]), dtype)])
            try:
                outputs = session.run(None, {name: padded})
            except Exception as error:  # as above
                raise DataError(f"{where} cannot be run by onnxruntime: {one_line(error)}") from None
            parts.append([out[: len(part)] for out in outputs])
        return [torch.from_numpy(np.concatenate(outs)) for outs in zip(*parts, strict=True)]

    return answer
