"""Score a classifier on labelled images: accuracy, agreement with the teacher, calibration, confusions.

Used by ``factory eval``, and by ``factory run distill`` once, at the end.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from manifests.errors import DataError
from manifests.images import decode
from stages.device import find_device
from stages.distill.labelled import Sample, labelled_images
from stages.distill.pixels import images_at_once
from stages.distill.threads import torch_threads
from stages.models.carried import check_class_names
from stages.models.identity import ModelConfig
from stages.models.inputs import InputSpec, to_unit
from stages.models.loading import load_model, load_teacher
from stages.models.settings import ModelSettings
from stages.models.teacher import Teacher

BATCH = 256
BINS = 15


def evaluate(
    model: str, data: str, teacher: ModelSettings | None = None, device: str = "cpu", threads: int = 1
) -> dict[str, Any]:
    """Metrics (:func:`metrics`) of the model folder ``model`` on ``data`` (:mod:`stages.distill.labelled`).

    ``data`` in the result is where the images were, with the sha256 of labels and encoded images in their order.
    Raises DataError where either does not fit or ``teacher`` knows other classes, UsageError where ``device`` cannot be
    used.
    """
    place = find_device(device)
    with torch_threads(threads):
        net, config = load_model(model)
        judge = load_teacher(teacher, place) if teacher else None
        if judge:
            check_class_names(judge, config.class_names, model)
        return evaluate_net(net.to(place), config, data, judge)


def evaluate_net(net: nn.Module, config: ModelConfig, data: str, teacher: Teacher | None = None) -> dict[str, Any]:
    """Like :func:`evaluate`, of a network in memory (left in eval mode)."""
    spec, digest = InputSpec(config.input), hashlib.sha256()
    net.eval()
    device = next(net.parameters()).device
    found = run_models(
        data, config.class_names, [lambda x: net(spec(x)), *([teacher.logits] if teacher else [])], device, digest
    )
    scores = metrics(found[1], found[0], config.class_names, found[2] if teacher else None)
    return scores | {"data": {"path": data, "sha256": digest.hexdigest()}}


def check_data(data: str, class_names: tuple[str, ...]) -> None:
    """Raises DataError where ``data`` cannot be evaluated on, as far as its first image and its files' names tell."""
    first = next(labelled_images(data, class_names), None)
    if first is None:
        raise DataError(f"{data} holds no labelled image")
    _decoded(first, data, len(class_names))


@torch.no_grad()
def run_models(
    data: str,
    class_names: tuple[str, ...],
    models: list[Callable[[Tensor], Tensor]],
    device: torch.device,
    digest: Any = None,
) -> list[Tensor]:
    """Labels ``[n]``, then float32 logits ``[n, C]`` of every model on the images of ``data`` in [−1, 1].

    ``digest`` (of hashlib) is updated with all labels and encoded images.
    """
    labels: list[int] = []
    logits: list[list[Tensor]] = [[] for _ in models]
    for some, images in _batches(data, class_names, digest):
        labels += some
        for kept, model in zip(logits, models, strict=True):
            kept.append(model(to_unit(images.to(device))).float().cpu())
    if not labels:
        raise DataError(f"{data} holds no labelled image")
    return [torch.tensor(labels), *(torch.cat(kept) for kept in logits)]


def _batches(data: str, class_names: tuple[str, ...], digest: Any = None) -> Iterator[tuple[list[int], Tensor]]:
    """Labels and uint8 ``[n, h, w, 3]`` of neighbouring images of one size."""
    labels: list[int] = []
    images: list[Tensor] = []
    most = BATCH
    for sample in labelled_images(data, class_names):
        image = _decoded(sample, data, len(class_names))
        if digest:
            digest.update(f"{sample[2]} {len(sample[1])}\n".encode())
            digest.update(sample[1])
        if images and (len(images) == most or image.shape != images[0].shape):
            yield labels, torch.stack(images)
            labels, images = [], []
        most = images_at_once(BATCH, image.numel())
        labels.append(sample[2])
        images.append(image)
    if images:
        yield labels, torch.stack(images)


def _decoded(sample: Sample, data: str, classes: int) -> Tensor:
    key, encoded, label = sample
    if not 0 <= label < classes:
        raise DataError(f"{data}: sample {key!r} has label {label}, but the model has classes 0…{classes - 1}")
    try:
        return torch.from_numpy(decode(encoded).copy())
    except ValueError as error:
        raise DataError(f"{data}: sample {key!r} is no image: {error}") from None


def metrics(
    logits: Tensor, labels: Tensor, class_names: tuple[str, ...], teacher: Tensor | None = None
) -> dict[str, Any]:
    """JSON-able scores from logits ``[n, C]``; shares lie in [0, 1].

    ``per_class``: accuracy by class name (None without images); ``confusion[true][predicted]``: counts;
    ``ece``: see :func:`calibration_error`; ``agreement``: share of images where the teacher names the same class.
    """
    classes = len(class_names)
    predicted = logits.argmax(1)
    confusion = torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)
    totals, right = confusion.sum(1).tolist(), confusion.diag().tolist()
    result = {
        "images": len(labels),
        "accuracy": (predicted == labels).double().mean().item(),
        "ece": calibration_error(logits, labels),
        "per_class": {
            name: r / t if t else None for name, r, t in zip(distinct(class_names), right, totals, strict=True)
        },
        "confusion": confusion.tolist(),
    }
    if teacher is not None:
        result["agreement"] = (predicted == teacher.argmax(1)).double().mean().item()
        result["teacher_accuracy"] = (teacher.argmax(1) == labels).double().mean().item()
    return result


def distinct(names: Sequence[str]) -> list[str]:
    """``names``, with its number added to each that occurred before: ImageNet has two cranes.

    >>> distinct(["crane", "maillot", "crane"])
    ['crane', 'maillot', 'crane (2)']
    """
    first: dict[str, int] = {}
    return [name if first.setdefault(name, i) == i else f"{name} ({i})" for i, name in enumerate(names)]


def calibration_error(logits: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """Expected calibration error (Guo et al. 2017): Σ_bin share·|accuracy − mean confidence|, equal-width bins."""
    confidence, predicted = logits.double().softmax(1).max(1)
    right = (predicted == labels).double()
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, right - confidence)
    return (gap.abs().sum() / len(labels)).item()
