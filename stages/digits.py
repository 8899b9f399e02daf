"""The real handwritten digits (``assets/digits``) that the embedded example is measured on.

The teacher's training script and the benchmarks read ``train`` and ``validation``; ``factory demo`` writes ``test``
after synthesis, to score its students. Synthesis and distillation never import this module.
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
FILE = Path(__file__).parent / "assets/digits/digits.npz"


def load_split(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Images ``[n, 8, 8]`` of integers 0…16 and labels ``[n]``: 598 train, 300 validation, 899 test, stratified."""
    with np.load(FILE, allow_pickle=False) as arrays:
        return arrays[f"{split}_images"], arrays[f"{split}_labels"].astype(np.int64)


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
