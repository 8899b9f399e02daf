"""Students for other runtimes: ONNX or ``torch.export``, written only after their answers were compared with PyTorch's.

Used by ``factory export``.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manifests.errors import FactoryError, UsageError
from stages.distill.saved import Deployable
from stages.models.loading import load_model

SIZES = (1, 5)
"""Batch sizes that answers are compared at; the exported batch is free."""
TOLERANCE = 1e-4
"""Largest difference of a logit, relative to the largest logit (or 1)."""


def export_onnx(student: str, file: str) -> dict[str, Any]:
    """Write ``file`` (.onnx): input ``images [batch, channels, size, size]`` in [0, 1], output ``logits``.

    Raises UsageError where the extra is not installed, FactoryError where ONNX Runtime answers otherwise.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UsageError(f"--onnx needs {error.name}: pip install 'dfkd-factory[onnx]'") from None

    def write(net: Deployable, x: Tensor, path: Path) -> None:
        torch.onnx.export(
            net, (x,), path, input_names=["images"], output_names=["logits"], dynamo=True, external_data=False,
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}}, verbose=False,
        )  # fmt: skip

    def read(path: Path) -> Callable[[Tensor], Tensor]:
        session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
        return lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])

    return _exported(student, file, "onnx", write, read)


def export_torch(student: str, file: str) -> dict[str, Any]:
    """Write ``file`` (.pt2) for ``torch.export.load(file).module()``; input and output as in :func:`export_onnx`."""

    def write(net: Deployable, x: Tensor, path: Path) -> None:
        program = torch.export.export(net, (x,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}})
        torch.export.save(program, path)

    return _exported(student, file, "torch.export", write, lambda path: torch.export.load(path).module())


@torch.no_grad()
def _exported(
    student: str,
    file: str,
    kind: str,
    write: Callable[[Deployable, Tensor, Path], None],
    read: Callable[[Path], Callable[[Tensor], Tensor]],
) -> dict[str, Any]:
    net, config = load_model(student)
    deployable = Deployable(net, config).eval()
    shape = (config.channels, config.input.size, config.input.size)
    target = Path(file)
    if not os.path.isdir(target.parent):  # Path.is_dir raises where a name is too long
        raise UsageError(f"{file}: folder {target.parent} does not exist")
    if os.path.isdir(target):
        raise UsageError(f"{file} is a folder: name the file to write in it")
    try:
        worst = _written(deployable, shape, target, kind, write, read)
    except OSError as error:
        raise UsageError(f"{file}: cannot be written: {error.strerror}") from error
    return {
        "student": str(student),
        "file": str(target),
        "format": kind,
        "bytes": target.stat().st_size,
        "input": ["batch", *shape],
        "classes": config.num_classes,
        "largest_difference": worst,
    }


def _written(
    deployable: Deployable,
    shape: tuple[int, int, int],
    target: Path,
    kind: str,
    write: Callable[[Deployable, Tensor, Path], None],
    read: Callable[[Path], Callable[[Tensor], Tensor]],
) -> float:
    """Write ``target`` once its answers are PyTorch's, for images ``[n, *shape]``; the largest difference."""
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as folder:
        part = Path(folder) / ("student.pt2" if kind == "torch.export" else "student.onnx")
        write(deployable, torch.rand(2, *shape, generator=generator), part)
        other, worst = read(part), 0.0
        for size in SIZES:
            images = torch.rand(size, *shape, generator=generator)
            mine = deployable(images)
            difference = (other(images) - mine).abs().max() / mine.abs().max().clamp_min(1)
            worst = max(worst, difference.item())
        if not worst <= TOLERANCE:
            raise FactoryError(
                f"{kind} answers differ from PyTorch's by {worst:.2g} (at most {TOLERANCE:g}): not written"
            )
        part.replace(target)
    return worst
