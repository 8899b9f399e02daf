"""Which teacher a run learns from, and before training: does it recognize the data?

Its agreement with the labels shows a teacher unlike the one that guided the images: other weights, normalization or
class order. Wrong normalization in both stages does not lower it, since guidance asked for what the same teacher now
predicts; a large error raises the BatchNorm gap.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from manifests.dataset import unique_names
from manifests.errors import DataError
from manifests.order import spread
from manifests.reader import Manifest
from stages.distill.batches import Batches
from stages.distill.rows import Ints
from stages.models.loading import ASK, check_classes, dataset_teacher, load_teacher
from stages.models.teacher import Moments, Teacher
from stages.settings import ModelSettings

IMAGES_CHECKED, IMAGES_FOR_GAP, IMAGES_AT_ONCE = 4096, 256, 32
SHARE_EXPECTED = 0.9
LARGE_GAP = 1.0
"""BatchNorm gap that is warned about: layers see values a standard deviation off. Measured: teachers of digits and of
CIFAR-10 on guided images 0.04 to 0.2, on unguided or 4 images up to 0.8, without their normalization 1.1 to 1.5."""


def find_teacher(
    manifests: Sequence[Manifest], named: ModelSettings | None, other: bool, device: torch.device
) -> Teacher:
    """The frozen teacher that ``manifests`` carry, or ``named`` after a check that the data was made for it.

    A copy beside the dataset is loaded only where its kind is ``builtin`` and its sha256 is the recorded one. With
    ``other`` a named teacher may differ in weights. Raises DataError saying what was expected; never guesses.
    """
    for manifest in manifests[1:]:
        if manifest.info.class_names != manifests[0].info.class_names:
            raise DataError(f"{manifest.url} has other classes than {manifests[0].url}")
    teacher = load_teacher(named, device) if named else dataset_teacher(manifests[0], device)
    for manifest in manifests:
        check_classes(teacher, manifest)
        recorded = [manifest.info.teacher.get(key) for key in ("sha256", "source_sha256")]
        expected = {str(value) for value in recorded if value is not None}
        if not other and expected and teacher.identity["sha256"] not in expected:
            raise DataError(
                f"{manifest.url} was made for a teacher with sha256 {' or '.join(sorted(expected))}, this one has "
                f"{teacher.identity['sha256']}; {ASK}, or allow another one with allow_other_teacher: true"
            )
    return teacher


@dataclass(frozen=True)
class TeacherCheck:
    """What the teacher predicts for the training images; shares lie in [0, 1].

    ``images``: how many were looked at; ``confidence``: mean probability of the predicted class; ``classes``: training
    images by class name. ``recorded_agreement``: share predicted as the synthesis recorded (None where nothing was
    recorded). ``commonest``: the most frequent prediction and its share. ``reordered``: agreement with the labels if
    every class were renamed to the most frequent prediction for it (None where two classes share one, or one alone has
    images). ``bn_gap``: :func:`batchnorm_gap`.
    """

    images: int
    teacher_label_agreement: float
    confidence: float
    classes: dict[str, int]
    recorded_agreement: float | None
    bn_gap: float | None
    commonest: tuple[str, float]
    reordered: float | None

    def warnings(self, min_agreement: float) -> list[str]:
        """One line for everything that looks wrong."""
        lines = []
        if self.teacher_label_agreement < min_agreement:
            share = f"{self.teacher_label_agreement:.1%} of the labels (below {min_agreement:.0%})"
            lines.append(f"the teacher agrees with {share}: {self._likely_cause()}")
        if self.bn_gap is not None and self.bn_gap >= LARGE_GAP:
            lines.append(
                f"the teacher's BatchNorm gap is {self.bn_gap:.2f} ({LARGE_GAP:g} or more): wrong weights or "
                "normalization, in synthesis as well if it was given the same, or images unlike those it was trained on"
            )
        empty = [name for name, count in self.classes.items() if not count]
        if empty:
            lines.append(f"no image of {len(empty)} of {len(self.classes)} classes: {', '.join(empty[:5])}")
        return lines

    def _likely_cause(self) -> str:
        """Of a low agreement with the labels."""
        name, share = self.commonest
        if self.reordered is not None and self.reordered >= SHARE_EXPECTED:
            return "its classes seem to be in another order: compare the class order of teacher and data"
        if self.recorded_agreement is not None and self.recorded_agreement < SHARE_EXPECTED:
            return (
                f"only {self.recorded_agreement:.1%} of its answers are those recorded with the data: "
                "other weights or another normalization"
            )
        if sum(count > 0 for count in self.classes.values()) > 1 and share >= SHARE_EXPECTED:
            return f"it answers {name!r} to {share:.1%} of the images: wrong weights or normalization"
        if self.recorded_agreement is not None:
            return "its answers are those recorded with the data, which was made with too little guidance or none"
        return "wrong weights, normalization or class order, or data made without guidance"


@torch.no_grad()
def check_teacher(teacher: Teacher, batches: Batches, rows: Ints) -> TeacherCheck:
    """Compare the teacher's predictions for ``rows`` (at most ``IMAGES_CHECKED``) with what is known of them."""
    classes, chosen = teacher.num_classes, spread(rows, IMAGES_CHECKED)
    parts, confidence = [], 0.0
    for _, x in batches.plain(chosen):
        best = teacher.logits(x).softmax(1).max(1)
        parts.append(best.indices.cpu().numpy())
        confidence += float(best.values.sum())
    predicted, labels = np.concatenate(parts), batches.rows.label[chosen]
    columns = (label for selection in batches.rows.selections for label in selection.column("teacher_label"))
    recorded = np.array([-1 if label is None else label for label in columns], np.int64)[chosen]
    counts = np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)
    renamed = counts.argmax(1)[counts.sum(1) > 0]
    by_prediction = counts.sum(0)
    sizes = np.bincount(batches.rows.label[rows], minlength=classes)
    return TeacherCheck(
        images=len(chosen),
        teacher_label_agreement=float((predicted == labels).mean()),
        confidence=confidence / len(chosen),
        classes=dict(zip(unique_names(teacher.class_names), sizes.tolist(), strict=True)),
        recorded_agreement=float((predicted == recorded)[recorded >= 0].mean()) if (recorded >= 0).any() else None,
        bn_gap=batchnorm_gap(teacher, batches, spread(rows, IMAGES_FOR_GAP)),
        commonest=(teacher.class_names[by_prediction.argmax()], float(by_prediction.max() / len(chosen))),
        reordered=float(counts.max(1).sum() / len(chosen)) if len(set(renamed)) == len(renamed) > 1 else None,
    )


def batchnorm_gap(teacher: Teacher, batches: Batches, rows: Ints) -> float | None:
    """How far what BatchNorm layers see of ``rows`` is from their running statistics, in units of these
    (:meth:`stages.models.teacher.Moments.gap`); None without such layers."""
    if not teacher.has_batchnorm:
        return None
    moments = Moments()
    for _, images in batches.plain(rows):
        for part in images.split(IMAGES_AT_ONCE):  # the inputs of every layer are held together
            moments.add(teacher.with_batchnorm_inputs(part)[1])
    return moments.gap(teacher.batchnorms)
