"""A finished student: its card, one call that loads it, and exports to ONNX and ``torch.export``.

Used by ``factory export``.
"""

import html
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from manifests.errors import FactoryError, UsageError
from stages.distill.results import StudentResult
from stages.models.inputs import InputSpec
from stages.models.loading import load_model
from stages.models.source import ModelConfig, only_named
from stages.settings import DistillSettings

# What a finished student is: its size and speed, and the model card that goes with it.


CARD = """---
library_name: pytorch
tags: [image-classification, knowledge-distillation, data-free, synthetic-data]
---
# {architecture}, distilled without the teacher's data

A student of {parameters:,} parameters, {mflop:.2f} MFLOP per image (two per multiply-add), {kilobytes:.0f} kB of
safetensors, {latency:.2f} ms per image (batch 1, {device}, {threads} thread(s), median, on the training machine).

- **Input**: {input}
- **Classes**: {classes}
- **Teacher**: {teacher}
- **Data**: {images:,} synthetic images ({val_images:,} more held out) of {datasets}; selection: {where}
- **Training**: {epochs} epochs, batch {batch_size}, {optimizer}, {schedule} schedule, peak learning rate {lr},
  seed {seed}; loss: {loss}; weights kept: {keep}
- **Held-out synthetic images**: {held_out_score}
- **Test data** (read once, at the end): {test}

Load it with `stages.distill.export.load_student({model})` (images `[n, 3, h, w]` in [0, 1] in, logits out); score it
with `factory eval {model} DATA`; write it for other runtimes with `factory export {model} --onnx FILE`.{named}
"""
NAMED = """
No folder may name {architecture}, so MODEL.yaml does: write name, weights (FOLDER/model.safetensors), and
`num_classes`, `class_names`, `input` and `stem` as they are in `config.json` into it.
"""


@dataclass(frozen=True)
class Footprint:
    """Parameters, MFLOP per image (two per multiply-add), and latency of one image in ms (median)."""

    parameters: int
    mflop: float
    latency_ms: float


@torch.no_grad()
def measure(net: nn.Module, config: ModelConfig) -> Footprint:
    """Count and time ``net`` (left in eval mode) on its device."""
    device = next(net.parameters()).device
    x = torch.zeros(1, config.channels, config.input.size, config.input.size, device=device)
    net.eval()
    with FlopCounterMode(display=False) as counter:
        net(x)
    times = []
    for _ in range(30):
        started = time.perf_counter()
        net(x)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return Footprint(
        parameters=sum(p.numel() for p in net.parameters()),
        mflop=counter.get_total_flops() / 1e6,
        latency_ms=1000 * statistics.median(times),
    )


def model_card(config: ModelConfig, settings: DistillSettings, spec: Mapping[str, Any], result: StudentResult) -> str:
    """The README.md of a student folder. ``spec``: what run.json records of the teacher and the manifests."""
    taken, teacher, test = config.input, spec["teacher"], result.test
    names = [markdown(name) for name in config.class_names[:10]]
    architecture, by_name = markdown(config.architecture), only_named(config.architecture)
    return CARD.format(
        architecture=architecture,
        parameters=result.parameters,
        mflop=result.mflop,
        kilobytes=result.bytes / 1e3,
        latency=result.latency_ms,
        device=result.device,
        threads=settings.threads,
        input=f"{taken.channels}×{taken.size}×{taken.size}, mean {_plain(taken.mean)}, std {_plain(taken.std)}"
        + ("; first layers changed to keep the resolution of small images" if config.stem == "small" else ""),
        classes=f"{config.num_classes} ({', '.join(names)}{', …' if config.num_classes > len(names) else ''})",
        teacher=f"{markdown(teacher['architecture'])}, sha256 {markdown(teacher['sha256'])}",
        images=result.images,
        val_images=result.val_images,
        datasets=", ".join(
            f"fingerprint {markdown(m['fingerprint'])} (weight {m['weight']:g})" for m in spec["manifests"]
        ),
        where=markdown(settings.where or "") or ("every image" if settings.include_rejected else "every kept image"),
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        optimizer=settings.optimizer.name,
        schedule=settings.optimizer.schedule,
        lr=settings.optimizer.lr,
        seed=settings.seed,
        loss=", ".join(f"{term} {getattr(settings.loss, term):g}" for term in settings.loss.active)
        + f" (τ = {settings.loss.temperature:g})",
        keep=settings.select,
        held_out_score="none"
        if result.val_agreement is None
        else f"agreement with the teacher {result.val_agreement:.1%}",
        test=f"accuracy {test.accuracy:.1%}, agreement with the teacher {test.model_teacher_agreement:.1%}; "
        f"{test.images:,} images, sha256 {test.data.sha256}"
        if test
        else "not given",
        model="MODEL.yaml" if by_name else "FOLDER",
        named=NAMED.rstrip("\n").format(architecture=architecture) if by_name else "",
    )


def markdown(text: object) -> str:
    """``text`` as Markdown shows it: no HTML, web links, pictures, code or further lines come out of a class name.

    GitHub makes links of bare ``https://…`` and ``www.…`` as well.
    """
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))
    return re.sub(r"(?i)([\\`*\[\]]|:(?=//)|(?<=www)\.)", r"\\\1", html.escape(shown, quote=False))


def _plain(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)


# A finished student in use: one call loads it, images go in as they are. Also what ``factory export`` writes.


class Classifier(nn.Module):
    """Images ``[n, 3, h, w]`` in [0, 1], of any size, to logits ``[n, C]``; resizing and normalization included."""

    def __init__(self, net: nn.Module, config: ModelConfig):
        super().__init__()
        self.net, self.config, self.spec = net, config, InputSpec(config.input)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(self.spec(images * 2 - 1))
        return logits


class Deployable(nn.Module):
    """Images ``[n, channels, size, size]`` in [0, 1] to logits ``[n, C]``: normalization included, resizing not."""

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, config: ModelConfig):
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor(config.input.mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(config.input.std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net((images - self.mean) / self.std)
        return logits


def load_student(folder: str | Path) -> Classifier:
    """The student in ``folder``, on the CPU, in eval mode. Raises DataError where it is none.

    >>> load_student("runs/demo/distill/digits-cnn-small")(images).argmax(1)  # doctest: +SKIP
    """
    net, config = load_model(folder)
    return Classifier(net, config).eval()


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
