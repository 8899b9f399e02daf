"""A finished student: one call that loads it, exports to ONNX and ``torch.export``, and its model card.

Used by ``factory export``, and by ``factory run distill`` for the card.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from manifests.card import markdown
from manifests.errors import FactoryError, UsageError, one_line
from stages.distill.results import StudentResult
from stages.models.build import check_runs
from stages.models.inputs import InputSpec
from stages.models.loading import load_model
from stages.models.onnx_data import ONNX_FACTS
from stages.models.source import ModelConfig, buildable_from_file, layout_of, split_name
from stages.settings import DistillSettings

SIZES = (1, 5)
"""Batch sizes that answers are compared at; the exported batch is free."""
TOLERANCE = 1e-4
"""Largest difference of a logit, relative to the largest logit (or 1)."""
Images = Image.Image | Tensor | Sequence[Image.Image]


def load_student(folder: str | Path) -> "Classifier":
    """The student in ``folder``, on the CPU, in eval mode. Raises DataError where it is none.

    >>> student = load_student("runs/demo/distill/digits-cnn-small")  # doctest: +SKIP
    >>> student(Image.open("seven.png")).argmax(1)  # doctest: +SKIP
    """
    net, config = load_model(folder)
    return Classifier(net, config).eval()


class Classifier(nn.Module):
    """Pictures of any size to logits ``[n, C]``; resizing, center crop and normalization included.

    Takes a PIL image or a list of them, or a tensor ``[n, 3, h, w]`` or ``[3, h, w]`` (also with 1 channel): uint8, or
    floating point in [0, 1]. A single image is a batch of one. Raises UsageError for anything else.
    """

    def __init__(self, net: nn.Module, config: ModelConfig):
        super().__init__()
        self.net, self.config, self.spec = net, config, InputSpec(config.input)

    def forward(self, images: Images) -> Tensor:
        device = next(self.net.parameters()).device
        if isinstance(images, Tensor):
            x = self._prepared(_centered(images).to(device))
        else:  # PIL images differ in size
            several: Sequence[Any] = images if isinstance(images, list | tuple) and len(images) else [images]
            x = torch.cat([self._prepared(_centered(_pixels(image)).to(device)) for image in several])
        logits: Tensor = self.net(x)
        return logits

    def _prepared(self, pictures: Tensor) -> Tensor:
        return self.spec(self.spec.view(pictures))


def _pixels(image: Any) -> Tensor:
    """uint8 ``[3, h, w]``, as ``factory eval`` reads a file."""
    if not isinstance(image, Image.Image) or image.mode[0] in "IF":
        what = f"a PIL image of mode {image.mode}" if isinstance(image, Image.Image) else type(image).__name__
        raise UsageError(f"expected PIL images of 8 bits a channel, or a tensor [n, 3, h, w], got {what}")
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _centered(images: Tensor) -> Tensor:
    """``[n, 3, h, w]`` in [−1, 1] of a tensor as :class:`Classifier` takes it."""
    x = images[None] if images.ndim == 3 else images
    if x.ndim != 4 or x.shape[1] not in (1, 3) or not x.numel():
        raise UsageError(f"expected images [n, 3, h, w] or [3, h, w], channels first, got {list(images.shape)}")
    x = x.expand(-1, 3, -1, -1)
    if images.dtype == torch.uint8:
        return x.float() / 127.5 - 1
    if not images.is_floating_point():
        raise UsageError(f"expected images as uint8, or floating point in [0, 1], got {images.dtype}")
    low, high = images.min().item(), images.max().item()
    if not (low >= 0 and high <= 1):
        raise UsageError(f"floating-point images must lie in [0, 1], got values from {low:g} to {high:g}")
    return x * 2 - 1


class Deployable(nn.Module):
    """Images ``[n, channels, size, size]`` in [0, 1] (RGB, or luminance) to logits ``[n, C]``: normalization included,
    resizing and crop not."""

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, config: ModelConfig):
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor(config.input.mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(config.input.std).view(1, -1, 1, 1))
        self.config = config
        self.bgr = config.input.channel_order == "bgr"

    def forward(self, images: Tensor) -> Tensor:
        x = (images - self.mean) / self.std
        logits: Tensor = self.net(x.flip(1) if self.bgr else x)
        return logits


@dataclass(frozen=True)
class Exported:
    """A written file: its format, size, input shape, classes, and the largest difference of a logit from PyTorch's,
    relative to the largest logit (or 1)."""

    student: str
    file: str
    format: str
    bytes: int
    input: tuple[str | int, ...]
    classes: int
    largest_difference: float


def export_onnx(student: str, file: str) -> Exported:
    """Write ``file`` (.onnx): input ``images [batch, channels, size, size]`` in [0, 1], output ``logits``.

    Its metadata say what the images and the classes are (:func:`describe`), so that ``factory eval FILE.onnx DATA``
    needs no settings. Raises UsageError where the extra is not installed, FactoryError where ONNX Runtime answers
    otherwise.
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
        describe(path, net.config)

    def read(path: Path) -> Callable[[Tensor], Tensor]:
        session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
        return lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])

    return _export(student, file, "onnx", write, read)


def describe(path: Path, config: ModelConfig, **more: str) -> None:
    """Add what the model takes and answers to the metadata of the ONNX file ``path``: the input rule of what it was
    exported from, without the normalization and channel order, which are part of the file; class names; version."""
    import onnx

    channels = config.input.channels
    rule = config.input.model_copy(update={"mean": (0.0,) * channels, "std": (1.0,) * channels, "channel_order": "rgb"})
    facts = {
        "architecture": config.architecture,
        "num_classes": config.num_classes,
        "class_names": config.class_names,
        "input": rule.model_dump(mode="json"),
        "version": metadata.version("dfkd-factory"),
    }
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {ONNX_FACTS: json.dumps(facts), **more})
    onnx.save(model, path)


def export_torch(student: str, file: str) -> Exported:
    """Write ``file`` (.pt2) for ``torch.export.load(file).module()``; input and output as in :func:`export_onnx`."""

    def write(net: Deployable, x: Tensor, path: Path) -> None:
        program = torch.export.export(net, (x,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}})
        torch.export.save(program, path)

    return _export(student, file, "torch.export", write, lambda path: torch.export.load(path).module())


@torch.no_grad()
def _export(
    student: str,
    file: str,
    kind: str,
    write: Callable[[Deployable, Tensor, Path], None],
    read: Callable[[Path], Callable[[Tensor], Tensor]],
) -> Exported:
    """Write ``file`` once what was written answers as PyTorch does."""
    net, config = load_model(student)
    check_runs(net, config)
    deployable, target = Deployable(net, config).eval(), Path(file)
    shape = (config.channels, config.input.size, config.input.size)
    if not os.path.isdir(target.parent):  # Path.is_dir raises where a name is too long
        raise UsageError(f"{file}: folder {target.parent} does not exist")
    if os.path.isdir(target):
        raise UsageError(f"{file} is a folder: name the file to write in it")
    generator, worst = torch.Generator().manual_seed(0), 0.0
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as folder:
            part = Path(folder) / ("student.pt2" if kind == "torch.export" else "student.onnx")
            write(deployable, torch.rand(2, *shape, generator=generator), part)
            other = read(part)
            for size in SIZES:
                images = torch.rand(size, *shape, generator=generator)
                logits = deployable(images)
                difference = (other(images) - logits).abs().max() / logits.abs().max().clamp_min(1)
                worst = max(worst, difference.item())
            if not worst <= TOLERANCE:
                raise FactoryError(
                    f"{kind} answers differ from PyTorch's by {worst:.2g} (at most {TOLERANCE:g}): not written"
                )
            part.replace(target)
    except OSError as error:
        raise UsageError(f"{file}: cannot be written: {error.strerror}") from error
    except FactoryError:
        raise
    except Exception as error:  # whatever the exporter does with a network that it cannot follow
        raise FactoryError(f"{kind} cannot export {student}: {one_line(error)}") from error
    size = target.stat().st_size
    return Exported(str(student), str(target), kind, size, ("batch", *shape), config.num_classes, worst)


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
    taken, teacher, test, optimizer = config.input, spec["teacher"], result.test, settings.optimizer
    architecture, by_name = markdown(config.architecture), not buildable_from_file(config.architecture)
    names = [*map(markdown, config.class_names[:10]), *(["…"] if config.num_classes > 10 else [])]
    stem = "; first layers changed to keep the resolution of small images" if config.stem == "small" else ""
    data = ", ".join(f"fingerprint {markdown(m['fingerprint'])} (weight {m['weight']:g})" for m in spec["manifests"])
    where = markdown(settings.where or "") or ("every image" if settings.include_rejected else "every kept image")
    loss = ", ".join(f"{term} {getattr(settings.loss, term):g}" for term in settings.loss.active)
    held_out, tested, model, named = "none", "not given", "FOLDER", ""
    if result.val_agreement is not None:
        held_out = f"agreement with the teacher {result.val_agreement:.1%}"
    if test:
        tested = f"accuracy {test.accuracy:.1%}, agreement with the teacher {test.model_teacher_agreement:.1%}; "
        tested += f"{test.images:,} images, sha256 {test.data.sha256}"
    if by_name:
        model = "MODEL.yaml"
        named = f"""
No folder may name {architecture}, so MODEL.yaml does: write name, weights (FOLDER/model.safetensors), and
`num_classes`, `class_names`, `input` and `stem` as they are in `config.json` into it."""
    elsewhere, library = "", "timm" if layout_of(config) else "pytorch"
    if library == "timm":
        elsewhere = """ timm and transformers load it as well:
`timm.create_model("local-dir:FOLDER", pretrained=True)`,
`AutoModelForImageClassification.from_pretrained("FOLDER")` with `AutoImageProcessor`."""
    elif split_name(config.architecture)[0] == "timm":
        elsewhere = " timm itself builds other first layers, so there it loads as ONNX only."
    return f"""---
library_name: {library}
tags: [image-classification, knowledge-distillation, data-free, synthetic-data]
---
# {architecture}, distilled without the teacher's data

A student of {result.parameters:,} parameters, {result.mflop:.2f} MFLOP per image (two per multiply-add), \
{result.bytes / 1e3:.0f} kB of
safetensors, {result.latency_ms:.2f} ms per image (batch 1, {result.device}, {settings.threads} thread(s), median, \
on the training machine).

- **Input**: {taken}{stem}
- **Classes**: {config.num_classes} ({", ".join(names)})
- **Teacher**: {markdown(teacher["architecture"])}, sha256 {markdown(teacher["sha256"])}
- **Data**: {result.images:,} synthetic images ({result.val_images:,} more held out) of {data}; selection: {where}
- **Training**: {settings.length}, batch {settings.batch_size}, {optimizer.name}, \
{optimizer.schedule} schedule, peak learning rate {optimizer.lr},
  seed {settings.seed}; loss: {loss} (τ = {settings.loss.temperature:g}); weights kept: {settings.select}
- **Held-out synthetic images**: {held_out}
- **Test data** (read once, at the end): {tested}

Load it with `stages.distill.export.load_student({model})` (PIL images, or tensors `[n, 3, h, w]` of uint8 or in [0, 1],
in, logits out); score it with `factory eval {model} DATA`; write it for other runtimes with
`factory export student {model} --onnx FILE`.{elsewhere}{named}
"""
