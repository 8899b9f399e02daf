"""The real handwritten digits (scikit-learn's ``load_digits``) that the embedded example is measured on.

The teacher's training script and the benchmarks read ``train`` and ``validation``; ``factory demo`` writes ``test``
after synthesis, to score its students. Synthesis and distillation never import this module; scikit-learn is imported
lazily.
"""

import io
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

Split = Literal["train", "validation", "test"]
CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
VALIDATION = 300
SEED = 0


def load_split(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Images ``[n, 8, 8]`` of integers 0…16 and labels ``[n]``: 598 train, 300 validation, 899 test, stratified."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8).astype(np.uint8)
    rest, test, rest_labels, test_labels = train_test_split(
        images, labels, test_size=0.5, stratify=labels, random_state=SEED
    )
    if split == "test":
        return test, test_labels
    train, held, train_labels, held_labels = train_test_split(
        rest, rest_labels, test_size=VALIDATION, stratify=rest_labels, random_state=SEED
    )
    return (train, train_labels) if split == "train" else (held, held_labels)


def write_split(split: Split, path: Path) -> Path:
    """Write a split as Parquet with columns key, png (8×8 gray) and label, for ``evaluate``; returns ``path``."""
    images, labels = load_split(split)
    pngs = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(np.round(image * (255 / 16)).astype(np.uint8)).save(buffer, "PNG")
        pngs.append(buffer.getvalue())
    keys = [f"{split}-{i:04d}" for i in range(len(images))]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"key": keys, "png": pngs, "label": pa.array(labels, pa.int32())}), path)
    return path
