"""What a classifier that took no part says of a set of images, and of the set after boxes were cut out of its pixels.

Used by :mod:`cells`. It costs no student; but rows that it prefers need not teach more (LOG.md), so students decide.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from cifar_data import third_party
from torch import Tensor

from manifests.reader import Manifest
from stages.models.loading import load_teacher
from stages.models.teacher import Moments, Teacher
from stages.synth.metrics import mean_pairwise_cosine
from stages.synth.scores import stored_images

JUDGED = 1500


def uninvolved(bench: Path) -> Teacher:
    """The third-party ResNet-32: it guides nothing and teaches nobody."""
    return load_teacher(third_party("resnet32", bench / "cifar10-resnet32.safetensors"), "cpu")


def judge(images: Tensor, labels: np.ndarray, teacher: Teacher) -> dict[str, float]:
    """What a classifier that took no part says of ``images [n, 3, h, w]`` in [−1, 1]."""
    moments, answers, features = Moments(), [], []
    for some in images.split(250):
        with torch.no_grad():
            logits, shown, inputs = teacher.look(some)
        assert shown is not None
        moments.add(inputs)
        answers.append(logits.argmax(1))
        features.append(shown)
    found, seen = torch.cat(answers).numpy(), torch.cat(features)
    alike = [mean_pairwise_cosine(seen[torch.from_numpy(labels == label)]) for label in np.unique(labels)]
    gap = moments.gap(teacher.batchnorms)
    assert gap is not None
    return {
        "agrees": float((found == labels).mean()),
        "gap": gap,
        "alike": mean(value for value in alike if value is not None),
        "images": len(labels),
    }


def cut(images: Tensor, mixes: Sequence[Sequence[dict[str, Any]]], factor: int) -> Tensor:
    """``images [n, 3, h, w]`` after the boxes of ``mixes`` (one list an image, in latent cells of ``factor`` pixels)
    were pasted from their partners, step by step, as latent CutMix pastes them between latents."""
    for step in sorted({mix["step"] for own in mixes for mix in own}):
        before = images.clone()
        for i, own in enumerate(mixes):
            for mix in own:
                if mix["step"] == step:
                    y, x, h, w = (factor * mix[side] for side in "yxhw")
                    images[i, :, y : y + h, x : x + w] = before[mix["partner"], :, y : y + h, x : x + w]
    return images


def judged(manifest: str, where: str, boxes: str | None, bench: Path) -> dict[str, float]:
    """:func:`judge` on final images (``JUDGED`` at most), after ``boxes``, a manifest with mixes, were cut out."""
    selection = Manifest.open(manifest).where(f"({where}) and timestep == 0")
    indices = list(range(min(JUDGED, len(selection))))
    images, labels = stored_images(selection, indices), selection.labels[indices]
    if boxes:
        other = Manifest.open(boxes).where(f"({where}) and timestep == 0")
        mixes = [other.row(i)["lca"] for i in indices]
        assert [other.row(i)["trajectory"] for i in indices] == indices  # partners are trajectories
        if not np.array_equal(other.labels[indices], labels):  # real images come in no order of classes: put them in it
            order = in_order(labels, other.labels[indices])
            images, labels = images[order], labels[order]
            mixes = mixes[: len(order)]
            mixes = [[mix for mix in own if mix["partner"] < len(order)] for own in mixes]
        images = cut(images, mixes, images.shape[-1] // 8)
    return judge(images, labels, uninvolved(bench))


def in_order(labels: np.ndarray, wanted: np.ndarray) -> list[int]:
    """Indices of ``labels`` that make it ``wanted``, as far as every class lasts."""
    left = {label: list(np.flatnonzero(labels == label)) for label in np.unique(labels)}
    found: list[int] = []
    for label in wanted:
        if not left.get(label):
            break
        found.append(int(left[label].pop(0)))
    return found
