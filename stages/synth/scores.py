"""What the teacher says of stored images, at synthesis and again by ``factory rescore``: columns, cosines, kept or not.

Stored images are also read here for ``factory inspect --metrics``.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from manifests.reader import Manifest
from manifests.schema import SCHEMA, Row
from stages.models.inputs import to_unit
from stages.models.loading import check_classes
from stages.models.teacher import Teacher
from stages.settings import DdaSettings

REJECTED = "teacher gives its class"
"""How the reason of a rejection by the threshold begins."""
TOO_FAR = "cosine with its source"
"""How the reason of a rejection by the cosine filter begins, after that of the threshold where both reject."""
SOURCE = "source"
"""The ``cosine_ref`` of a derived sample: the cosine with the sample that its ``source_key`` names."""
FINAL = "final"
"""The ``cosine_ref`` of an intermediate sample: the cosine with the final image of its trajectory."""
COSINES = ("cosine", "cosine_ref", "cosine_space")


@torch.no_grad()
def judge(teacher: Teacher, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Logits ``[n, C]`` and features ``[n, D]`` (None without) of ``images``, on the CPU."""
    logits, features = teacher.with_features(images)
    return logits.cpu(), None if features is None else features.cpu()


def score(
    rows: Sequence[Row],
    logits: Tensor,
    features: Tensor | None,
    weights: Tensor | None,
    min_confidence: float,
    min_cosine: float,
    *,
    embeddings: Tensor | None = None,
) -> list[Row]:
    """The columns that the teacher decides, one dict for each of ``rows``, which hold whole trajectories.

    ``logits [n, C]`` and ``features [n, D]`` are of the stored images, ``weights [C, D]`` of the teacher's last layer
    (None where it shows none), ``embeddings [n, d]`` of the same images in the contrastive space; without them cosines
    of that space stay as they are. Derived rows need a cosine above ``min_cosine`` (DDA, equation 8). Rows that were
    rejected for another reason than the two stay rejected.
    """
    columns = teacher_columns(logits, [row["label"] for row in rows], min_confidence)
    by_space: dict[str, Sequence[float | None]] = {"teacher": [None] * len(rows)}
    if features is not None and weights is not None:
        by_space["teacher"] = cosines(rows, features, weights)
    if embeddings is not None:
        by_space["contrastive"] = cosines(rows, embeddings)
    for i, (row, column) in enumerate(zip(rows, columns, strict=True)):
        column |= {name: row.get(name) for name in COSINES}
        if row["cosine_space"] in by_space:
            cosine = by_space[row["cosine_space"]][i]
            column |= dict.fromkeys(COSINES) if cosine is None else {"cosine": cosine}
        if column["cosine_ref"] == SOURCE:
            column |= filtered(column, min_cosine)
        if not row.get("kept", True) and stands(str(row["reject_reason"]), column["cosine_ref"] == SOURCE):
            column |= {"kept": False, "reject_reason": row["reject_reason"]}
    return columns


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
    columns = {
        "teacher_label": top.indices[:, 0].tolist(),
        "confidence": top.values[:, 0].tolist(),
        "entropy": entropy.tolist(),
        "margin": (top.values[:, 0] - top.values[:, 1]).tolist(),
        "kept": (kept := [share >= min_confidence for share in target.tolist()]),
        "reject_reason": [
            None if keep else f"{REJECTED} {share:.3f} < {min_confidence:g}"
            for keep, share in zip(kept, target.tolist(), strict=True)
        ],
    }
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def cosines(rows: Sequence[Row], features: Tensor, weights: Tensor | None = None) -> list[float | None]:
    """Cosine of each row of ``features [n, D]`` with that which its ``cosine_ref`` names: its class's row of
    ``weights [C, D]``, the final image of its trajectory, or its source; None where that is not among them."""
    finals = {(row.get("shard"), row["trajectory"]): i for i, row in enumerate(rows) if row["timestep"] == 0}
    keys = {row["key"]: i for i, row in enumerate(rows)}
    reference, known = features.clone(), []
    for i, row in enumerate(rows):
        ref = str(row["cosine_ref"])
        if ref.startswith("class:"):
            known.append(weights is not None)
            if weights is not None:
                reference[i] = weights[row["label"]]
            continue
        other = finals.get((row.get("shard"), row["trajectory"])) if ref == FINAL else keys.get(row["source_key"])
        known.append(other is not None)
        if other is not None:
            reference[i] = features[other]
    values = F.cosine_similarity(features, reference, dim=1).tolist()
    return [value if there else None for value, there in zip(values, known, strict=True)]


def filtered(row: Row, min_cosine: float) -> Row:
    """``kept`` and ``reject_reason`` of a derived sample after DDA's filter, cos > ω (equation 8)."""
    if row["cosine"] > min_cosine:
        return {}
    reason = f"{TOO_FAR} {row['cosine']:.3f} <= {min_cosine:g}"
    return {"kept": False, "reject_reason": f"{row['reject_reason']}; {reason}" if row["reject_reason"] else reason}


def stands(reason: str, filters: bool) -> bool:
    """Whether an earlier rejection was for something that is not decided again: neither the threshold nor, where the
    cosine is known again (``filters``), the cosine filter."""
    decided = reason.startswith((REJECTED, TOO_FAR))
    return not decided or (TOO_FAR in reason and not filters)


# From here on: stored images, read back.

BATCH = 64
NEEDED = ("key", "shard", "trajectory", "timestep", "label", "source_key", "kept", "reject_reason")


def stored_images(selection: Manifest, indices: Sequence[int]) -> Tensor:
    """Images ``[n, 3, side, side]`` in [−1, 1] of ``indices``.

    Raises DataError naming the sample that is missing, altered, no image, or not of the dataset's size.
    """
    return to_unit(torch.from_numpy(np.stack(selection.pixels(list(indices)))))


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
    teacher's feature space. ``on_rows`` is given the number of rows that are done. Rows stream shard by
    shard, which hold whole trajectories. Raises DataError where classes or images do not fit.
    """
    check_classes(teacher, manifest)
    everything = manifest.where(include_rejected=True)
    first = 0
    for table in (manifest.file.shard_rows(tar.shard).combine_chunks() for tar in manifest.info.tars if tar.rows):
        selection = everything.take(slice(first, first + table.num_rows))
        _ = selection.labels  # refuses those that are no class
        logits, features = [], []
        for start in range(0, table.num_rows, BATCH):
            some = range(start, min(start + BATCH, table.num_rows))
            answer, feature = judge(teacher, stored_images(selection, some).to(device))
            logits.append(answer)
            if feature is not None:
                features.append(feature)
            on_rows(first + some.stop)
        every = torch.cat(features) if features else None
        yield renewed(table, torch.cat(logits), every, teacher.class_weights, threshold, min_cosine_of(manifest))
        first += table.num_rows


def renewed(
    table: pa.Table,
    logits: Tensor,
    features: Tensor | None,
    weights: Tensor | None,
    threshold: float,
    min_cosine: float = DdaSettings().min_cosine,
) -> pa.Table:
    """``table`` with the columns of :func:`score`, and new logits where a row has them."""
    weights = None if weights is None else weights.cpu()
    rows = table.select([*NEEDED, *COSINES]).to_pylist()
    columns = score(rows, logits, features, weights, threshold, min_cosine)
    has_logits = table["logits"].is_valid().to_pylist()
    for i, column in enumerate(columns):
        column["logits"] = logits[i].half().numpy() if has_logits[i] else None
    for name in columns[0]:
        index = SCHEMA.get_field_index(name)
        values = pa.array([column[name] for column in columns], SCHEMA.field(index).type)
        table = table.set_column(index, SCHEMA.field(index), values)
    return table


def min_cosine_of(manifest: Manifest) -> float:
    """The cosine above which a manifest's derived rows are kept; the default where it does not tell."""
    synth = manifest.info.recipe.get("synth")
    dda = synth.get("dda") if isinstance(synth, dict) else None
    value = dda.get("min_cosine") if isinstance(dda, dict) else None
    return float(value) if isinstance(value, int | float) else DdaSettings().min_cosine
