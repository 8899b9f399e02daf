"""A classifier that only answers: an ONNX file, or a user's function without gradients. Good for scoring images.

It shows no features, no layers and no BatchNorm statistics, so it cannot guide; ``--method dmkd`` works with it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from manifests.errors import DataError, FactoryError, UsageError
from stages.models.inputs import InputSpec
from stages.models.outputs import logits_of, require_finite
from stages.models.settings import InputSettings
from stages.models.teacher import Teacher

Answer = Callable[[Tensor], Any]  # prepared images [n, channels, size, size] on the CPU to logits [n, C]


class BlackBox(Teacher):
    """A teacher without insides. Its answers are computed on the CPU, or where ``answer`` likes."""

    differentiable = False

    def __init__(self, answer: Answer, spec: InputSettings, class_names: Sequence[str], identity: dict[str, Any]):
        self.input = InputSpec(spec)
        self.class_names = tuple(class_names)
        self.num_classes = len(self.class_names)
        self.identity = identity
        self._answer = answer
        self._norms = []
        self._head = None

    @property
    def net(self) -> nn.Module:  # type: ignore[override]
        """There is none. Raises UsageError saying so."""
        raise UsageError(
            f"{self.what} is a black box without layers: cam and gradcam losses, feature statistics and guidance "
            "need a network (synthesise with --method dmkd)"
        )

    def _logits(self, x: Tensor) -> Tensor:
        """``[n, 3, h, w]`` in [−1, 1] to ``[n, C]``, without a graph."""
        with torch.no_grad():
            out = self._answer(self.input(x.detach()).cpu())
            return require_finite(logits_of(out, self.num_classes, self.what).float(), self.what).to(x.device)

    def check(self) -> "BlackBox":
        """Let it answer two images. Raises DataError where it fails or returns something else than logits."""
        settings = self.input.settings
        try:
            self.logits(torch.linspace(-1, 1, 6 * settings.size**2).view(2, 3, settings.size, settings.size))
        except FactoryError:
            raise
        except Exception as error:  # whatever the function or the runtime does
            shape = f"{settings.channels}×{settings.size}×{settings.size}"
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DataError(f"{self.what} fails on images of {shape}: {reason}") from error
        return self

    def to(self, device: str | torch.device | None = None, memory_format: Any = None) -> "BlackBox":
        """Nothing to move; answers go to the device of the images."""
        return self


def onnx_answer(data: bytes, where: str) -> Answer:
    """The answers of an ONNX classifier with one image input. Raises DataError where the file is no such thing."""
    try:
        import onnxruntime as ort
    except ImportError:
        raise UsageError(f"{where} needs onnxruntime: pip install 'dfkd-factory[onnx]'") from None
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has no public base class for its errors
        raise DataError(f"{where} cannot be loaded by onnxruntime: {str(error).splitlines()[0]}") from None
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
                raise DataError(f"{where} takes {shape}, but input says {list(x.shape[1:])}")
        images, size = x.numpy().astype(dtype), step or len(x)
        parts: list[list[Any]] = []
        for start in range(0, len(images), size):
            part = images[start : start + size]
            padded = np.concatenate([part, np.zeros((size - len(part), *part.shape[1:]), dtype)])
            parts.append([out[: len(part)] for out in session.run(None, {name: padded})])
        return [torch.from_numpy(np.concatenate(outs)) for outs in zip(*parts, strict=True)]

    return answer
