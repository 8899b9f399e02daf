"""Quality of a dataset without real data: statistics gap, diversity and near-duplicates, in its teacher's features.

Used by ``factory inspect --metrics``. Classes are measured one after the other, so memory does not grow with them.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from manifests.dataset import unique_names
from manifests.order import spread
from manifests.reader import Manifest
from stages.models.loading import check_classes
from stages.models.teacher import Moments, Teacher
from stages.synth.scores import BATCH, stored_images

PER_CLASS = 512
"""Images of a class that are looked at, evenly spread over the dataset."""
MAX_DUPLICATES = 100
SAME = 0.999
"""Images of a class whose features have a larger cosine are near-duplicates."""


def mean_pairwise_cosine(features: Tensor) -> float | None:
    """Mean cosine over all pairs of different rows of ``[n, D]``, (‖Σu‖² − n) / (n(n − 1)); None for one row.

    1: all alike; 0: unrelated. Lower is more diverse.
    """
    n = len(features)
    if n < 2:
        return None
    unit = F.normalize(features.double(), dim=1)
    return float((unit.sum(0).square().sum() - unit.square().sum()) / (n * (n - 1)))


def vendi_score(features: Tensor) -> float:
    """Effective number of different rows of ``[n, D]``, 1 to n: exp of the entropy of the eigenvalues of K/n with the
    cosine kernel K (Friedman and Dieng 2023, equation 1)."""
    unit = F.normalize(features.double(), dim=1)
    gram = unit @ unit.T if len(unit) <= unit.shape[1] else unit.T @ unit  # the same eigenvalues, but for zeros
    values = torch.linalg.eigvalsh(gram / len(unit)).clamp_min(0)
    return float(torch.special.entr(values).sum().exp())


def near_duplicates(features: Tensor, threshold: float) -> list[tuple[int, int]]:
    """``(row, first earlier row)`` for each row of ``[n, D]`` that has a cosine above ``threshold`` with an earlier
    one."""
    unit = F.normalize(features.double(), dim=1)
    alike = torch.tril(unit @ unit.T > threshold, -1)
    rows = alike.any(1).nonzero().flatten()
    return [*zip(rows.tolist(), alike[rows].int().argmax(1).tolist(), strict=True)]


@torch.no_grad()
def measure(
    selection: Manifest,
    teacher: Teacher,
    per_class: int = PER_CLASS,
    same: float = SAME,
    on_images: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Metrics of the images of ``selection``; JSON-able. ``duplicates``: keys of near-duplicates, each with that of the
    first image like it, the first ``MAX_DUPLICATES`` of them. A teacher without a last linear layer shows no features:
    diversity is then None. Raises DataError where teacher and images do not fit."""
    check_classes(teacher, selection)
    labels = selection.labels
    chosen = {int(label): spread(np.flatnonzero(labels == label), per_class) for label in np.unique(labels)}
    total, done = sum(map(len, chosen.values())), 0
    moments, classes, right = Moments(), {}, 0
    keys, duplicates = selection.column("key"), list[list[str]]()
    names = unique_names(selection.info.class_names)
    for label, rows in chosen.items():
        parts = []
        for start in range(0, len(rows), BATCH):
            images = stored_images(selection, rows[start : start + BATCH].tolist())
            logits, features, inputs = teacher.forward(images)
            right += int((logits.argmax(1) == label).sum())
            moments.add(inputs)
            parts += [] if features is None else [features]
            done += len(images)
            on_images(done, total)
        facts, pairs = diversity(torch.cat(parts) if parts else None, same)
        classes[names[label]] = facts | {"images": len(rows)}
        duplicates += [[keys[rows[a]], keys[rows[b]]] for a, b in pairs]
    alike = [facts["near_duplicates"] for facts in classes.values() if facts["near_duplicates"] is not None]
    return {
        "images": total,
        "bn_gap": moments.gap(teacher.batchnorms),
        "published_bn": list(teacher.published_bn) if teacher.published_bn else None,
        "teacher_accuracy": right / total,
        "near_duplicate_cosine": same,
        "near_duplicates": sum(alike) if alike else None,
        "duplicates": duplicates[:MAX_DUPLICATES],
        "classes": classes,
    }


def diversity(features: Tensor | None, same: float) -> tuple[dict[str, Any], list[tuple[int, int]]]:
    """The numbers of one class, and its :func:`near_duplicates`."""
    if features is None:
        return {"cosine": None, "vendi": None, "near_duplicates": None}, []
    pairs = near_duplicates(features, same)
    numbers = {"cosine": mean_pairwise_cosine(features), "vendi": vendi_score(features), "near_duplicates": len(pairs)}
    return numbers, pairs
