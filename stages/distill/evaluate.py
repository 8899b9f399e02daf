"""Score a classifier on labeled images: accuracy, top-5, macro-F1, agreement with the teacher, calibration, confusions.

Used by ``factory eval``, and by ``factory run distill`` once, at the end.
"""

import io
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from pydantic import Field
from torch import Tensor, nn

from manifests.dataset import unique_names
from manifests.errors import DataError, FactoryError, first_line
from manifests.images import LABELED_FORMATS, check_header, decode
from stages.distill.batches import images_at_once
from stages.distill.eval_data import LabeledImages, Sample, labeled_images
from stages.distill.runtime import OnProgress, cores, in_order, torch_threads
from stages.memory import find_device
from stages.models.inputs import InputSpec, require_finite_weights, to_unit
from stages.models.loading import check_class_names, load_network, load_teacher
from stages.models.source import ModelConfig, resolve, split_name
from stages.models.teacher import BlackBox, Teacher, batchnorm_layers, published_bn_unit, running_statistics
from stages.settings import ModelSettings

BATCH = 64
BINS = 15
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class DataIdentity:
    """Where labeled images were, and the sha256 of their labels and encoded images in order."""

    path: str
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class Scores:
    """Of a classifier (a student, say) on labeled images; shares lie in [0, 1].

    ``class_order``: what the labels mean, for people; ``ece``: :func:`calibration_error`; ``per_class``: accuracy by
    class name (None without images); ``confusion[true][predicted]``: counts. With a teacher:
    ``model_teacher_agreement``, the share of images where both predict the same class, and ``teacher_accuracy``.
    ``reliability``: of :func:`reliability`; ``macro_f1``: of :func:`macro_f1`; ``top5_accuracy``: of
    :func:`top_accuracy`, None for up to 5 classes. Both are None in scores of versions that did not measure them.
    ``decisions``: what else was settled and from what, for people: the model's (:class:`ModelSource`) and the data's.
    ``published_bn``: :func:`~stages.models.teacher.published_bn_unit` of a classifier that was loaded to be scored.
    """

    class_order: str
    data: DataIdentity
    images: Annotated[int, Field(ge=0)]
    accuracy: Share
    ece: float
    per_class: dict[str, float | None]
    confusion: list[list[int]]
    model_teacher_agreement: Share | None = None
    teacher_accuracy: Share | None = None
    decisions: dict[str, str] = field(default_factory=dict)
    reliability: list[tuple[Annotated[int, Field(ge=0)], Share, Share]] = field(default_factory=list)
    published_bn: tuple[float, float] | None = None
    top5_accuracy: Share | None = None
    macro_f1: Share | None = None

    def __post_init__(self) -> None:
        if (self.model_teacher_agreement is None) != (self.teacher_accuracy is None):
            raise ValueError("a score is compared with a teacher in part")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; without the comparison with a teacher where there was none."""
        return {name: value for name, value in asdict(self).items() if value not in (None, {})}


def evaluate(
    model: str | ModelSettings,
    data: str | Sequence[str],
    teacher: ModelSettings | None = None,
    device: str = "cpu",
    threads: int | None = None,
    on_progress: OnProgress = lambda done, total, note: None,
) -> Scores:
    """Score the classifier ``model`` (a folder, a YAML file, ``embedded:digits``, ONNX …) on ``data``
    (:mod:`stages.distill.eval_data`).

    ``threads``: batches that are computed at once, each on one processor, by default on all; the scores are the same
    bits for any number. Own code and GPUs get one batch at a time. Raises DataError where model and data do not fit,
    ``teacher`` knows other classes or weights or logits are not finite, UsageError where ``device`` cannot be used.
    """
    place = find_device(device)
    source = resolve(model if isinstance(model, ModelSettings) else ModelSettings(name=model))
    name = model.name if isinstance(model, ModelSettings) else model
    with torch_threads(1):
        config, net, unit = source.config, load_network(source), None
        if isinstance(net, nn.Module):
            require_finite_weights(net, f"model '{name}'")
            if norms := batchnorm_layers(net):
                unit = published_bn_unit(running_statistics(norms))
            classify = _classify(net.to(place), config)
        else:
            classify = BlackBox(net, config.input, config.class_names, source.identity).check().logits
        judge = load_teacher(teacher, place) if teacher else None
        if judge:
            check_class_names(judge, config.class_names, name)
        named = [config.architecture, *([str(judge.identity["architecture"])] if judge else [])]
        alone = place.type != "cpu" or any(split_name(each)[0] == "code" for each in named)
        found = score(classify, config, data, judge, place, 1 if alone else threads or cores(), on_progress)
        return replace(found, decisions=source.decisions | found.decisions, published_bn=unit)


def evaluate_net(
    net: nn.Module, config: ModelConfig, data: str | Sequence[str], teacher: Teacher | None = None
) -> Scores:
    """Like :func:`evaluate`, of a network in memory (left in eval mode), one batch at a time."""
    return score(_classify(net, config), config, data, teacher, next(net.parameters()).device)


def _classify(net: nn.Module, config: ModelConfig) -> Callable[[Tensor], Tensor]:
    spec, what = InputSpec(config.input), f"model '{config.architecture}'"
    net.eval()

    def classify(x: Tensor) -> Tensor:
        try:
            out: Tensor = net(spec(x))
            return out
        except FactoryError:
            raise
        except Exception as error:  # whatever a foreign network does
            reason = first_line(error)
            raise DataError(
                f"{what} cannot take images of {spec.channels}×{spec.size}×{spec.size}: {reason}"
            ) from error

    return classify


def viewing(classify: Callable[[Tensor], Tensor], spec: InputSpec, images: LabeledImages) -> Callable[[Tensor], Tensor]:
    """``classify`` of pictures resized and cropped as ``spec`` says; images of a dataset are so already."""
    return classify if images.of_dataset else lambda x: classify(spec.view(x))


def score(
    classify: Callable[[Tensor], Tensor],
    config: ModelConfig,
    data: str | Sequence[str],
    teacher: Teacher | None,
    device: torch.device,
    threads: int = 1,
    on_progress: OnProgress = lambda done, total, note: None,
) -> Scores:
    """:class:`Scores` of ``classify``, from images ``[n, 3, h, w]`` in [−1, 1] to logits ``[n, C]``, on ``data``."""
    images = labeled_images(data, config.class_names)
    models = [viewing(classify, InputSpec(config.input), images)]
    if teacher:
        models.append(viewing(teacher.logits, teacher.input, images))
    notes: Counter[str] = Counter()
    labels, logits, *by_teacher = run_models(images, models, device, threads, on_progress, notes)
    bad = int((~logits.isfinite()).any(1).sum())
    if bad:
        raise DataError(
            f"model '{config.architecture}' gives NaN or infinite logits to {bad} of the {len(labels)} images "
            f"of {images.where}: check its weights and input settings"
        )
    seen, classes = len(labels.unique()), config.num_classes
    fewer = f"; {seen} of the {classes} classes have images" if seen < classes else ""
    identity = DataIdentity(images.where, images.digest.hexdigest())
    result = scores(
        logits, labels, config.class_names, by_teacher[0] if teacher else None, images.class_order + fewer, identity
    )
    pixels = ", ".join(f"{note} ({count:,} images)" for note, count in notes.items())
    return replace(result, decisions={"images": images.line} | ({"pixels": pixels} if pixels else {}))


DECODE_SECONDS = 60.0
"""How long :func:`check_data` decodes; of later images it looks at format and size."""


def check_data(
    data: str, class_names: tuple[str, ...], on_progress: OnProgress = lambda done, total, note: None
) -> dict[str, str]:
    """Go through all of ``data`` before hours of training are spent on a score that cannot be: what labels mean, and
    how many images there are, each in a line.

    Raises DataError where a model of ``class_names`` cannot be scored on it. Decodes all images, or as many as it can
    in :data:`DECODE_SECONDS`; whether the pixels of the others are intact shows only when they are scored.
    """
    images = labeled_images(data, class_names)
    decoded, until = 0, time.monotonic() + DECODE_SECONDS

    def look(sample: Sample) -> bool:
        with _naming(sample, images.where):
            if time.monotonic() < until:
                decode(sample[1], formats=LABELED_FORMATS)
                return True
            check_header(sample[1], LABELED_FORMATS)
            return False

    for whole in in_order(look, images, cores()):
        decoded += whole
        on_progress(images.count, images.total or 0, "test data")
    part = f"; the first {decoded:,} were decoded, of the others format and size checked"
    return {"class order": images.class_order, "images": images.line + (part if decoded < images.count else "")}


@torch.no_grad()
def run_models(
    data: LabeledImages,
    models: Sequence[Callable[[Tensor], Tensor]],
    device: torch.device,
    threads: int = 1,
    on_progress: OnProgress = lambda done, total, note: None,
    notes: Counter[str] | None = None,
) -> list[Tensor]:
    """Labels ``[n]``, then float32 logits ``[n, C]`` of every model on the images of ``data`` in [−1, 1].

    ``threads``: batches at once; ``notes``: counts what decoding did to images.
    """

    def answer(batch: tuple[list[int], Tensor]) -> tuple[list[int], list[Tensor]]:
        with torch.no_grad():  # of this thread
            return batch[0], [model(to_unit(batch[1].to(device))).float().cpu() for model in models]

    labels: list[int] = []
    logits: list[list[Tensor]] = [[] for _ in models]
    for batch_labels, answers in in_order(answer, _batches(data, Counter() if notes is None else notes), threads):
        labels += batch_labels
        for kept, part in zip(logits, answers, strict=True):
            kept.append(part)
        on_progress(len(labels), data.total or 0, "images")
    return [torch.tensor(labels), *(torch.cat(kept) for kept in logits)]


def _batches(data: LabeledImages, notes: Counter[str]) -> Iterator[tuple[list[int], Tensor]]:
    """Labels and uint8 ``[n, h, w, 3]`` of neighboring images of one size, decoded on all processors."""

    def pixels(sample: Sample) -> tuple[int, Tensor, list[str]]:
        changes: list[str] = []
        with _naming(sample, data.where):
            return sample[2], torch.from_numpy(decode(sample[1], None, LABELED_FORMATS, changes).copy()), changes

    labels: list[int] = []
    images: list[Tensor] = []
    most = BATCH
    for label, image, changes in in_order(pixels, data, cores()):
        notes.update(changes)
        if images and (len(images) == most or image.shape != images[0].shape):
            yield labels, torch.stack(images)
            labels, images = [], []
        most = images_at_once(BATCH, image.numel())
        labels.append(label)
        images.append(image)
    if images:
        yield labels, torch.stack(images)


@contextmanager
def _naming(sample: Sample, where: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise DataError(f"{where}: sample {sample[0]!r} is no image: {error}") from None


def scores(
    logits: Tensor,
    labels: Tensor,
    class_names: tuple[str, ...],
    teacher: Tensor | None,
    class_order: str,
    data: DataIdentity,
) -> Scores:
    """:class:`Scores` from logits ``[n, C]``, labels ``[n]`` and perhaps the teacher's logits ``[n, C]``."""
    classes, predicted = len(class_names), logits.argmax(1)
    confusion = torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)
    totals, right = confusion.sum(1).tolist(), confusion.diag().tolist()
    shares = [r / t if t else None for r, t in zip(right, totals, strict=True)]
    by_teacher = None if teacher is None else teacher.argmax(1)
    return Scores(
        class_order=class_order,
        data=data,
        images=len(labels),
        accuracy=_equal_share(predicted, labels),
        top5_accuracy=top_accuracy(logits, labels, 5) if classes > 5 else None,
        macro_f1=macro_f1(confusion),
        ece=calibration_error(logits, labels),
        reliability=reliability(logits, labels),
        per_class=dict(zip(unique_names(class_names), shares, strict=True)),
        confusion=confusion.tolist(),
        model_teacher_agreement=None if by_teacher is None else _equal_share(predicted, by_teacher),
        teacher_accuracy=None if by_teacher is None else _equal_share(by_teacher, labels),
    )


def _equal_share(a: Tensor, b: Tensor) -> float:
    return (a == b).double().mean().item()


def top_accuracy(logits: Tensor, labels: Tensor, k: int) -> float:
    """Share of images whose label is among the ``k`` largest logits ``[n, C]``; of equal logits the first class leads,
    as in argmax."""
    own, classes = logits.gather(1, labels[:, None]), torch.arange(logits.shape[1])
    ahead = (logits > own) | ((logits == own) & (classes < labels[:, None]))
    return (ahead.sum(1) < k).double().mean().item()


def macro_f1(confusion: Tensor) -> float:
    """Mean over classes of F1 = 2·TP / (2·TP + FP + FN), from counts ``[true, predicted]``. Classes that are neither a
    label nor predicted are left out, as scikit-learn's ``f1_score(average="macro")`` does."""
    both = confusion.sum(0) + confusion.sum(1)
    f1 = 2 * confusion.diag().double() / both
    return f1[both > 0].mean().item()


def reliability(logits: Tensor, labels: Tensor, bins: int = BINS) -> list[tuple[int, float, float]]:
    """(images, mean confidence, accuracy) of each of ``bins`` equal-width bins of the confidence that holds images, the
    points of a reliability diagram (Guo et al. 2017). ``logits [n, C]``, ``labels [n]``."""
    confidence, predicted = logits.double().softmax(1).max(1)
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    count = torch.bincount(place, minlength=bins)
    sums = torch.zeros(2, bins, dtype=torch.float64)
    sums.index_add_(1, place, torch.stack([confidence, (predicted == labels).double()]))
    means = (sums / count.clamp_min(1)).clamp(0, 1)
    return [(n, *pair) for n, pair in zip(count.tolist(), means.T.tolist(), strict=True) if n]


def calibration_error(logits: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """Expected calibration error (Guo et al. 2017): Σ_bin share·|accuracy − mean confidence|, equal-width bins."""
    found = reliability(logits, labels, bins)
    return sum(n * abs(accuracy - confidence) for n, confidence, accuracy in found) / len(labels)


CELL, SMALL_CELL, NUMBERS_UP_TO = 34, 4, 30
INK, PAPER, FULL = (20, 20, 20), (255, 255, 255), (8, 48, 107)


def confusion_picture(counts: Sequence[Sequence[int]], class_names: Sequence[str]) -> bytes:
    """PNG bytes of ``counts[true][predicted]``. Shade: share of the row; counts are written into up to 30 classes."""
    table = np.asarray(counts, dtype=np.int64)
    classes = len(table)
    shares = table / np.maximum(table.sum(1, keepdims=True), 1)
    labeled = classes <= NUMBERS_UP_TO
    cell, name_width, head = (CELL, 110, 34) if labeled else (SMALL_CELL, 2, 18)
    image = Image.new("RGB", (name_width + classes * cell + 2, head + classes * cell + 2), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((2, 2), "true (rows), predicted (columns)", fill=INK)
    for row in range(classes):
        y = head + row * cell
        if labeled:
            draw.text((4, y + cell // 2 - 6), _printable(class_names[row])[:16], fill=INK)
            draw.text((name_width + row * cell + 3, 18), _printable(class_names[row])[:5], fill=INK)
        for column in range(classes):
            x, share = name_width + column * cell, shares[row, column]
            shade = tuple(round(p + (f - p) * share) for p, f in zip(PAPER, FULL, strict=True))
            draw.rectangle(
                (x, y, x + cell - 1, y + cell - 1), fill=shade, outline=(225, 225, 225) if labeled else shade
            )
            if labeled and table[row, column]:
                ink = PAPER if share > 0.5 else INK
                draw.text((x + cell / 2, y + cell / 2), str(table[row, column]), fill=ink, anchor="mm")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _printable(text: str) -> str:
    return text.encode("latin-1", "replace").decode("latin-1")  # what PIL's built-in font can draw
