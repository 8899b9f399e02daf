"""CIFAR-10 as Parquet (``key``, ``jpg``, ``label``): the fixed split into training and validation rows, teachers."""

import io
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from stages.settings import InputSettings, ModelSettings

CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
INPUT = InputSettings(size=32, channels=3, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
VALIDATION, SEED = 5_000, 0


def split_table(source: Path, split: Literal["train", "validation"]) -> pa.Table:
    """The rows of a split, in a fixed random order; validation is the same 5,000 rows everywhere."""
    table = pq.read_table(source)
    order = np.random.default_rng(SEED).permutation(table.num_rows)
    return table.take(order[:-VALIDATION] if split == "train" else order[-VALIDATION:])


def tensors(table: pa.Table) -> tuple[Tensor, Tensor]:
    """uint8 images ``[n, 3, 32, 32]`` and labels ``[n]``."""
    images = np.stack([np.asarray(Image.open(io.BytesIO(jpg.as_py())).convert("RGB")) for jpg in table["jpg"]])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(table["label"].to_pylist())


def third_party(architecture: str, weights: Path) -> ModelSettings:
    """A classifier of someone else's, as a user would name it."""
    return ModelSettings(name=architecture, weights=str(weights), num_classes=10, class_names=CLASS_NAMES, input=INPUT)
