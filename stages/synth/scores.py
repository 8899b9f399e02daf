"""The teacher's columns of the manifest, from the stored images: at synthesis, and again by ``rescore``."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from manifests.errors import DataError
from manifests.images import decode
from manifests.reader import Manifest
from manifests.schema import SCHEMA
from stages.models.inputs import to_unit
from stages.models.loading import check_classes
from stages.models.teacher import Teacher
from stages.settings import DdaSettings

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


# Stored images read back as the teacher sees them. Used by ``factory rescore`` and ``factory inspect --metrics``.


BATCH = 64


def stored_images(selection: Manifest, indices: Sequence[int]) -> Tensor:
    """Images ``[n, 3, side, side]`` in [−1, 1] of ``indices``.

    Raises DataError naming the sample that is missing, altered, no image, or not of the dataset's size.
    """
    side = selection.info.image_size
    images = []
    for index, data in zip(indices, selection.read_many(list(indices)), strict=True):
        try:
            images.append(decode(data, side))
        except ValueError as error:
            raise DataError(f"{selection.url}: sample {selection.row(index)['key']}: {error}") from None
    return to_unit(torch.from_numpy(np.stack(images)))


# Teacher columns again from the stored images, for another teacher or threshold. Used by ``factory rescore``.
#
# Rows stream in pieces that hold whole trajectories, so memory does not grow with the dataset.


PIECE = 4096
COSINES = ("cosine", "cosine_ref", "cosine_space")
NEEDED = ("key", "shard", "trajectory", "timestep", "label", "source_key", "kept", "reject_reason")


def rescored(
    manifest: Manifest,
    teacher: Teacher,
    threshold: float,
    device: str = "cpu",
    on_rows: Callable[[int], None] = lambda rows: None,
) -> Iterator[pa.Table]:
    """Every row of ``manifest`` in order, with the columns that ``teacher`` and ``threshold`` decide made again.

    Derived rows (DDA) must also pass the cosine filter of their recipe, at their new cosine; rows rejected for another
    reason than these two stay rejected. Logits are renewed where a row has them, cosines where they were taken in the
    teacher's feature space. ``on_rows`` hears how many rows are done.
    Raises DataError where classes or images do not fit.
    """
    check_classes(teacher, manifest)
    everything = manifest.where(include_rejected=True)
    for first, table in pieces(manifest):
        selection = everything.take(slice(first, first + table.num_rows))
        _ = selection.labels  # refuses those that are no class
        logits, features = [], []
        for start in range(0, table.num_rows, BATCH):
            some = range(start, min(start + BATCH, table.num_rows))
            answer, feature = answers(teacher, stored_images(selection, some).to(device))
            logits.append(answer)
            features.append(feature)
            on_rows(first + some.stop)
        shown = [feature for feature in features if feature is not None]
        found = torch.cat(shown) if shown else None
        yield renewed(table, torch.cat(logits), found, teacher.class_weights, threshold, min_cosine_of(manifest))


def pieces(manifest: Manifest, rows: int = PIECE) -> Iterator[tuple[int, pa.Table]]:
    """(number of its first row, table) of at most ``rows`` rows, cut between trajectories wherever that is possible."""
    held, first = SCHEMA.empty_table(), 0
    for group in manifest.file.groups():
        held = pa.concat_tables([held, group])
        while held.num_rows > rows:
            starts = trajectory_starts(held.slice(0, rows + 1))
            cut = int(starts[-1]) if len(starts) else rows
            yield first, held.slice(0, cut).combine_chunks()
            held, first = held.slice(cut), first + cut
    if held.num_rows:
        yield first, held.combine_chunks()


def trajectory_starts(table: pa.Table) -> np.ndarray:
    """Numbers of the rows, but for the first, whose predecessor belongs to another trajectory or to none."""
    shard = table["shard"].to_numpy()
    trajectory = table["trajectory"].fill_null(-1).to_numpy()
    return np.flatnonzero((np.diff(shard) != 0) | (np.diff(trajectory) != 0) | (trajectory[1:] < 0)) + 1


@torch.no_grad()
def answers(teacher: Teacher, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Logits ``[n, C]`` and features ``[n, D]`` (None without) of ``images``, on the CPU."""
    logits, features = teacher.with_features(images)
    return logits.cpu(), None if features is None else features.cpu()


def renewed(
    table: pa.Table,
    logits: Tensor,
    features: Tensor | None,
    weights: Tensor | None,
    threshold: float,
    least: float = DdaSettings().min_cosine,
) -> pa.Table:
    """``table`` with new teacher columns from ``logits`` ``[n, C]``, ``features`` ``[n, D]`` and the last layer's
    ``weights`` ``[C, D]``; derived rows need a cosine above ``least``."""
    old = table.select([*NEEDED, *COSINES]).to_pylist()
    new = teacher_columns(logits, [row["label"] for row in old], threshold)
    cosines = renewed_cosines(old, features, weights)
    has_logits = table["logits"].is_valid().to_pylist()
    for i, (before, after) in enumerate(zip(old, new, strict=True)):
        after["logits"] = logits[i].half().numpy() if has_logits[i] else None
        after |= {name: before[name] for name in COSINES}
        if before["cosine_space"] == "teacher":
            after |= {"cosine": cosines[i]} if cosines[i] is not None else dict.fromkeys(COSINES)
        if after["cosine_ref"] == SOURCE:
            after |= filtered(after, least)
        if not before["kept"] and stands(str(before["reject_reason"]), after["cosine_ref"] == SOURCE):
            after |= {"kept": False, "reject_reason": before["reject_reason"]}
    for name in new[0]:
        table = replaced(table, name, [row[name] for row in new])
    return table


def stands(reason: str, filters: bool) -> bool:
    """Whether an old rejection was for something that is not judged again: neither the threshold nor, where the cosine
    is known again (``filters``), the cosine filter."""
    ours = reason.startswith((REJECTED, TOO_FAR))
    return not ours or (TOO_FAR in reason and not filters)


def renewed_cosines(rows: list[dict], features: Tensor | None, weights: Tensor | None) -> list[float | None]:
    """Cosine of each sample's features with what its ``cosine_ref`` names: the class's weight row, the final image of
    its trajectory, or the sample it was derived from; None where that is not at hand."""
    if features is None or weights is None:
        return [None] * len(rows)
    finals = {(row["shard"], row["trajectory"]): i for i, row in enumerate(rows) if row["timestep"] == 0}
    keys = {row["key"]: i for i, row in enumerate(rows)}
    reference, known = features.clone(), []
    for i, row in enumerate(rows):
        ref = str(row["cosine_ref"])
        if ref.startswith("class:"):
            reference[i] = weights[row["label"]]
            known.append(True)
            continue
        other = finals.get((row["shard"], row["trajectory"])) if ref == "final" else keys.get(row["source_key"])
        known.append(other is not None)
        if other is not None:
            reference[i] = features[other]
    cosines = F.cosine_similarity(features, reference, dim=1).tolist()
    return [cosine if there else None for cosine, there in zip(cosines, known, strict=True)]


def min_cosine_of(manifest: Manifest) -> float:
    """The cosine above which a manifest's derived rows are kept; the default where it does not tell."""
    synth = manifest.info.recipe.get("synth")
    found = synth.get("dda") if isinstance(synth, dict) else None
    value = found.get("min_cosine") if isinstance(found, dict) else None
    return float(value) if isinstance(value, int | float) else DdaSettings().min_cosine


def replaced(table: pa.Table, name: str, values: list) -> pa.Table:
    """``table`` with other values in one column."""
    index = SCHEMA.get_field_index(name)
    return table.set_column(index, SCHEMA.field(index), pa.array(values, SCHEMA.field(index).type))
