"""What the teacher says of the images as they are stored: the manifest's teacher columns and the kept flag."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

REJECTED = "teacher gives its class"
"""How the reason of a rejection by the threshold begins."""

SOURCE = "source"
"""The ``cosine_ref`` of a derived sample: the cosine with the sample that its ``source_key`` names."""
TOO_FAR = "cosine with its source"
"""How the reason of a rejection by the cosine filter begins, after that of the threshold where both reject."""


def filtered(row: Mapping[str, Any], least: float) -> dict[str, Any]:
    """``kept`` and ``reject_reason`` of a derived sample after DDA's filter, cos > ω (equation 8)."""
    if row["cosine"] > least:
        return {}
    reason = f"{TOO_FAR} {row['cosine']:.3f} <= {least:g}"
    return {"kept": False, "reject_reason": f"{row['reject_reason']}; {reason}" if row["reject_reason"] else reason}


@torch.no_grad()
def teacher_columns(logits: Tensor, labels: Sequence[int], min_confidence: float) -> list[dict[str, Any]]:
    """One dict a sample from teacher logits ``[n, C]`` and target classes.

    confidence: probability of the teacher's own class; entropy in nats; margin: first minus second probability.
    Kept: the *target* class has at least ``min_confidence``.
    """
    probability = logits.float().cpu().softmax(1)  # read one by one below
    entropy = -(probability * probability.clamp_min(1e-30).log()).sum(1)
    top = probability.topk(2, dim=1)
    target = probability[torch.arange(len(labels)), torch.tensor(labels)]
    rows = []
    for i in range(len(labels)):
        kept = target[i].item() >= min_confidence
        reason = f"{REJECTED} {target[i].item():.3f} < {min_confidence:g}"
        rows.append(
            {
                "teacher_label": int(top.indices[i, 0]),
                "confidence": top.values[i, 0].item(),
                "entropy": entropy[i].item(),
                "margin": (top.values[i, 0] - top.values[i, 1]).item(),
                "kept": kept,
                "reject_reason": None if kept else reason,
            }
        )
    return rows
