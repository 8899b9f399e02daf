"""Which teacher a run learns from, and before training: does it recognize the data?

Its agreement shows a teacher unlike the one that guided the images: other weights, normalization or class order. It
shows no mistake of that one, which asked for what the same teacher now finds; the BatchNorm gap shows the large ones.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from manifests.dataset import unique_names
from manifests.errors import DataError
from manifests.order import spread
from manifests.reader import Manifest
from stages.distill.batches import Batches
from stages.distill.rows import Ints, Rows
from stages.models.loading import ASK, check_classes, dataset_teacher, load_teacher
from stages.models.teacher import Moments, Teacher
from stages.settings import ModelSettings

# Which teacher a run learns from: the one its manifests carry, or the one that the user names. Never guessed.


def find_teacher(
    manifests: Sequence[Manifest], named: ModelSettings | None, other: bool, device: torch.device
) -> Teacher:
    """The frozen teacher of ``manifests``, or ``named`` after a check that it is the one the data was made for.

    A copy beside the dataset is loaded only where its kind is ``builtin`` and its sha256 is the recorded one. With
    ``other`` a named teacher may differ in weights. Raises DataError saying what was expected.
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


LOOKED_AT = 4096
MOST = 0.9
LOOKED_INTO, AT_ONCE = 256, 32
LARGE_GAP = 1.0
"""BatchNorm gap that is warned about: layers see values a standard deviation off. Measured: teachers of digits and of
CIFAR-10 on guided images 0.04 to 0.2, on unguided or 4 images up to 0.8, without their normalization 1.1 to 1.5."""


@torch.no_grad()
def check_teacher(teacher: Teacher, batches: Batches, rows: Ints) -> dict[str, Any]:
    """What the teacher says to ``rows`` (``LOOKED_AT`` of them at most); JSON-able, shares lie in [0, 1].

    ``agreement`` with the labels; mean ``confidence``; ``classes``: images per class of all ``rows``; ``as_recorded``:
    share of the answers that synthesis recorded and that come out the same now (None where it recorded none);
    ``bn_gap``: :func:`statistics_gap`;
    ``commonest``: the most frequent answer and its share; ``reordered``: agreement if every class were renamed to
    the teacher's most frequent answer to it (None where two classes share one, or one alone has images).
    """
    classes = teacher.num_classes
    some = spread(rows, LOOKED_AT)
    parts, confidence = [], 0.0
    for _, x in batches.plain(some):
        best = teacher.logits(x).softmax(1).max(1)
        parts.append(best.indices.cpu().numpy())
        confidence += float(best.values.sum())
    answers, labels = np.concatenate(parts), batches.rows.label[some]
    recorded = recorded_answers(batches.rows, some)
    counts = np.bincount(labels * classes + answers, minlength=classes**2).reshape(classes, classes)
    present = counts.sum(1) > 0
    renamed = counts.argmax(1)[present]
    answered = counts.sum(0)
    sizes = np.bincount(batches.rows.label[rows], minlength=classes)
    return {
        "images": len(some),
        "agreement": float((answers == labels).mean()),
        "confidence": confidence / len(some),
        "classes": dict(zip(unique_names(teacher.class_names), sizes.tolist(), strict=True)),
        "as_recorded": float((answers == recorded)[recorded >= 0].mean()) if (recorded >= 0).any() else None,
        "bn_gap": statistics_gap(teacher, batches, spread(rows, LOOKED_INTO)),
        "commonest": [teacher.class_names[answered.argmax()], float(answered.max() / len(some))],
        "reordered": float(counts.max(1).sum() / len(some)) if len(set(renamed)) == len(renamed) > 1 else None,
    }


def statistics_gap(teacher: Teacher, batches: Batches, rows: Ints) -> float | None:
    """How far what BatchNorm layers see of ``rows`` is from their running statistics, in units of these
    (:meth:`stages.models.teacher.Moments.gap`); None without such layers."""
    if not teacher.has_batchnorm:
        return None
    moments = Moments()
    for _, images in batches.plain(rows):
        for part in images.split(AT_ONCE):  # the inputs of every layer are held together
            moments.add(teacher.with_batchnorm_inputs(part)[1])
    return moments.gap(teacher.batchnorms)


def recorded_answers(rows: Rows, some: Ints) -> Ints:
    """``teacher_label`` of the manifests for the row numbers ``some``; −1 where there is none."""
    columns = [selection.column("teacher_label") for selection in rows.selections]
    laid = [-1 if value is None or value != value else int(value) for column in columns for value in column]
    return np.array(laid, np.int64)[some]


def causes(check: dict[str, Any]) -> str:
    """What a low agreement most likely comes from."""
    name, share = check["commonest"]
    if check["reordered"] is not None and check["reordered"] >= MOST:
        return "its classes seem to be in another order: compare the class order of teacher and data"
    if check["as_recorded"] is not None and check["as_recorded"] < MOST:
        return (
            f"only {check['as_recorded']:.1%} of its answers are those recorded with the data: "
            "other weights or another normalization"
        )
    if sum(count > 0 for count in check["classes"].values()) > 1 and share >= MOST:
        return f"it answers {name!r} to {share:.1%} of the images: wrong weights or normalization"
    if check["as_recorded"] is not None:
        return "its answers are those recorded with the data, which was made with too little guidance or none"
    return "wrong weights, normalization or class order, or data made without guidance"


def complaints(check: dict[str, Any], min_agreement: float) -> list[str]:
    """Lines for the user where something looks wrong."""
    lines = []
    if check["agreement"] < min_agreement:
        share = f"{check['agreement']:.1%} of the labels (below {min_agreement:.0%})"
        lines.append(f"the teacher agrees with {share}: {causes(check)}")
    if check["bn_gap"] is not None and check["bn_gap"] >= LARGE_GAP:
        lines.append(
            f"the teacher's BatchNorm gap is {check['bn_gap']:.2f} ({LARGE_GAP:g} or more): wrong weights or "
            "normalization, in synthesis as well if it was given the same, or images unlike those it was trained on"
        )
    empty = [name for name, count in check["classes"].items() if not count]
    if empty:
        lines.append(f"no image of {len(empty)} of {len(check['classes'])} classes: {', '.join(empty[:5])}")
    return lines
