"""What stage 2 left of a dataset's students, as the page shows it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from manifests.checked_json import load_checked, load_json
from manifests.errors import DataError, FactoryError
from manifests.images import LABELED_FORMATS, decode
from manifests.order import spread
from manifests.reader import Manifest
from manifests.storage import Storage
from pipeline.report.columns import class_names
from pipeline.report.pictures import Encoded, encoded
from pipeline.terminal import share

if TYPE_CHECKING:
    from stages.distill.evaluate import Scores
    from stages.distill.results import DistillResult, StudentResult

CURVES = (("loss", "training loss"), ("val_agreement", "agreement with the teacher on held-out images"))
MATRIX, WORST = 30, 30
"""Classes up to which the confusion matrix is shown whole; entries that are listed beyond."""
MISTAKES, LOOKED_AT = 24, 2000
"""Images that a student gets wrong and the teacher right: how many are shown, and among how many."""
WIDTH, HEIGHT = 300, 100


@dataclass(frozen=True)
class Curve:
    """One value by epoch: ``points`` of an SVG polyline, 300 × 100, and what its axis reaches from and to."""

    title: str
    points: str
    low: float
    high: float
    last: float
    epochs: int


@dataclass(frozen=True)
class Mistake:
    """A test image that the teacher gets right and the student wrong."""

    image: Encoded
    actual: str
    predicted: str


@dataclass(frozen=True)
class Mistakes:
    """Some of ``count`` mistakes among ``examined`` images."""

    shown: list[Mistake]
    count: int
    examined: int


@dataclass(frozen=True)
class Confusion:
    """``cells``: (true, predicted, images, share of the true class's) of the matrix, or of its commonest mistakes."""

    names: list[str]
    whole: bool
    cells: list[tuple[int, int, int, float]]


@dataclass(frozen=True)
class Training:
    """One run of stage 2: its folder, results, and what else its page shows by student; ``where`` is its selection.

    ``datasets``: how many it was trained on; ``other_data``: this one is none of them; ``note``: why there are no
    ``mistakes``.
    """

    url: str
    result: "DistillResult"
    where: str | None
    include_rejected: bool
    datasets: int
    other_data: bool
    curves: dict[str, list[Curve]]
    mistakes: dict[str, Mistakes]
    note: str

    @property
    def students(self) -> "dict[str, StudentResult]":
        return self.result.students

    @property
    def used(self) -> int:
        """Images that it trained on or held out."""
        return self.result.images + self.result.val_images


def read_training(url: str, manifest: Manifest, tests: "TestImages | None") -> Training:
    """The run of stage 2 in ``url``. ``tests``: to find mistakes on; None without.

    Raises DataError where it has not finished or cannot be read.
    """
    from stages.distill.checkpoint import RUN, damage_reported
    from stages.distill.results import RESULTS, read_results

    storage = Storage(url)
    result = read_results(storage, "run stage 2 again, or delete it")
    if result is None:
        raise DataError(f"{storage.url} holds no finished training: no {RESULTS}")
    with damage_reported(storage, RUN, "run stage 2 again"):
        spec = load_checked(storage.read(RUN))
        settings = dict(spec["settings"])
        prints = [str(entry["fingerprint"]) for entry in spec["manifests"]]
        scored = [student.test for student in result.students.values() if student.test]
        if any({len(test.confusion), *map(len, test.confusion)} != {len(test.per_class)} for test in scored):
            raise ValueError("a confusion matrix does not fit its classes")
    curves = {name: [*_curves(_metrics(storage, name))] for name in result.students}
    mistakes, note = dict[str, Mistakes](), ""
    if tests and tests.teacher is not None:
        for name in result.students:
            try:
                mistakes[name] = find_mistakes(storage.path(name), tests)
            except FactoryError as error:
                note = f"No images that students get wrong: {error}"
    elif tests:
        note = "No images that students get wrong: the teacher cannot be asked."
    elif scored:
        note = f"Images that students get wrong are shown with --test-data {scored[0].data.path}"
    return Training(
        url=storage.url,
        result=result,
        where=settings.get("where"),
        include_rejected=bool(settings.get("include_rejected")),
        datasets=len(prints),
        other_data=manifest.info.fingerprint not in prints,
        curves=curves,
        mistakes=mistakes,
        note=note,
    )


def _metrics(storage: Storage, name: str) -> list[dict[str, float]]:
    """The lines of a student's metrics.jsonl that hold numbers; [] without the file."""
    file = f"{name}/metrics.jsonl"
    numbers = []
    for line in storage.lines(file) if storage.exists(file) else ():
        try:
            values = load_json(line)
            numbers.append({key: float(values[key]) for key, _ in CURVES if key in values})
        except (ValueError, TypeError, OverflowError):  # half a line, or somebody else's
            continue
    return numbers


def _curves(lines: Sequence[dict[str, float]]) -> Iterator[Curve]:
    for key, title in CURVES:
        values = np.array([line[key] for line in lines if key in line], np.float64)
        values = values[np.isfinite(values)]
        if len(values) < 2:
            continue
        low, high = (0.0, 1.0) if key.startswith("val_") else (0.0, float(values.max()))
        y = HEIGHT * (1 - (values - low) / max(high - low, 1e-12))
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(np.linspace(0, WIDTH, len(values)), y, strict=True))
        yield Curve(title, points, low, high, float(values[-1]), len(values))


def confusion(matrix: Sequence[Sequence[int]], names: Sequence[str]) -> Confusion:
    """The whole matrix of few classes, the commonest mistakes among many."""
    counts = np.asarray(matrix, np.int64)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    whole = len(counts) <= MATRIX
    if whole:
        places = [*np.ndindex(*counts.shape)]
    else:
        wrong = counts - np.diag(np.diag(counts))
        flat = np.argsort(-wrong, axis=None, kind="stable")[:WORST]
        places = [place for place in zip(*np.unravel_index(flat, counts.shape), strict=True) if wrong[place]]
    return Confusion([*names], whole, [(int(t), int(p), int(counts[t, p]), float(shares[t, p])) for t, p in places])


class TestImages:
    """The first :data:`LOOKED_AT` labeled images of ``data``, and what the teacher says of them, asked once for all
    students. Errors as :func:`stages.distill.evaluate.evaluate`."""

    def __init__(self, data: str, teacher: Any, manifest: Manifest) -> None:
        self.data, self.teacher, self.manifest = data, teacher, manifest

    def images(self) -> Any:
        """The images, to be gone through once."""
        from stages.distill.eval_data import labeled_images

        images = labeled_images(self.data, self.manifest.info.class_names)
        return replace(images, samples=islice(images.samples, LOOKED_AT))

    def predictions(self, classify: Any, spec: Any) -> list[Any]:
        """Labels and predicted classes, ``[n]`` each. ``spec``: how the classifier sees pictures."""
        import torch

        from stages.distill.evaluate import run_models, viewing

        images = self.images()
        labels, logits = run_models(images, [viewing(classify, spec, images)], torch.device("cpu"))
        return [labels.numpy(), logits.argmax(1).numpy()]

    @cached_property
    def teachers(self) -> list[Any]:
        """The teacher's :meth:`predictions`."""
        return self.predictions(self.teacher.logits, self.teacher.input)


def find_mistakes(folder: str, tests: TestImages) -> Mistakes:
    """Up to :data:`MISTAKES` images that the teacher gets right and the student in ``folder`` wrong, evenly spread."""
    from stages.models.inputs import InputSpec
    from stages.models.loading import load_model

    net, config = load_model(folder)
    spec = InputSpec(config.input)
    (labels, judged), (_, predicted) = tests.teachers, tests.predictions(lambda x: net(spec(x)), spec)
    wrong = np.flatnonzero((judged == labels) & (predicted != labels))
    shown = {*spread(wrong, MISTAKES).tolist()}
    names = class_names(tests.manifest)
    mistakes = [
        Mistake(encoded(decode(image, formats=LABELED_FORMATS)), names[label], names[int(predicted[place])])
        for place, (_, image, label) in enumerate(tests.images().samples)
        if place in shown
    ]
    return Mistakes(mistakes, len(wrong), len(labels))


def reliability_points(test: "Scores") -> str:
    """Accuracy over mean confidence as points of an SVG polyline, 100 × 100."""
    return " ".join(
        f"{100 * confidence:.1f},{100 * (1 - accuracy):.1f}" for _, confidence, accuracy in test.reliability
    )


def student_facts(student: "StudentResult") -> list[tuple[str, str, str]]:
    """``(name, value, remark)`` of everything that is recorded about one student."""
    test = student.test
    facts = [
        ("parameters", f"{student.parameters:,}", ""),
        ("size", f"{student.bytes / 1000:,.0f} kB", "model.safetensors"),
        ("compute", f"{student.mflop:,.2f} MFLOP", "per image, two per multiply-add"),
        ("latency", f"{student.latency_ms:.2f} ms", f"median of one image, on the training machine ({student.device})"),
        (
            "agreement with the teacher",
            share(student.val_agreement) or "–",
            f"{student.val_images:,} held-out synthetic images",
        ),
    ]
    if test:
        facts += [
            ("test accuracy", str(share(test.accuracy)), f"{test.images:,} labeled images"),
            ("macro-F1", share(test.macro_f1) or "–", "mean of the classes' F1, the same images"),
            ("teacher's test accuracy", share(test.teacher_accuracy) or "–", "the same images"),
            (
                "agreement on test images",
                share(test.model_teacher_agreement) or "–",
                "with the teacher, right or not",
            ),
            ("calibration error", str(share(test.ece)), "expected; 0 % would be perfect"),
        ]
        if test.top5_accuracy is not None:
            facts.append(("top-5 accuracy", str(share(test.top5_accuracy)), "the same images"))
    return facts
