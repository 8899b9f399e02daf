"""Before training: does the teacher recognise the data? Shows wrong weights, normalisation or class order at once."""

from typing import Any

import numpy as np
import torch

from stages.distill.batches import Batches
from stages.distill.rows import Ints
from stages.models.teacher import Teacher

LOOKED_AT = 4096


@torch.no_grad()
def check_teacher(teacher: Teacher, batches: Batches, rows: Ints) -> dict[str, Any]:
    """Agreement with the labels, mean confidence, and images per class of ``rows`` (``LOOKED_AT`` at most)."""
    some = rows[np.linspace(0, len(rows) - 1, min(len(rows), LOOKED_AT)).round().astype(np.int64)]
    right, confidence = 0, 0.0
    for found, x in batches.plain(some):
        best = teacher.logits(x).softmax(1).max(1)
        right += int((best.indices.cpu() == torch.from_numpy(batches.rows.label[found])).sum())
        confidence += float(best.values.sum())
    counts = np.bincount(batches.rows.label[rows], minlength=teacher.num_classes)
    return {
        "images": len(some),
        "agreement": right / len(some),
        "confidence": confidence / len(some),
        "classes": dict(zip(teacher.class_names, counts.tolist(), strict=True)),
    }


def complaints(check: dict[str, Any], min_agreement: float) -> list[str]:
    """Lines for the user where something looks wrong."""
    lines = []
    if check["agreement"] < min_agreement:
        lines.append(
            f"the teacher agrees with {check['agreement']:.1%} of the labels (below {min_agreement:.0%}): wrong "
            "weights, normalisation or class order, or data made without guidance"
        )
    empty = [name for name, count in check["classes"].items() if not count]
    if empty:
        lines.append(f"no image of {len(empty)} of {len(check['classes'])} classes: {', '.join(empty[:5])}")
    return lines
