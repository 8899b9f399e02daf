"""A small labeled dataset in the factory's own format, drawn in this file: squares that say their class by place."""

import io

import numpy as np
import torch
from PIL import Image

from manifests.dataset import DatasetInfo
from manifests.merge import merge
from manifests.shard import ShardWriter, done_records
from manifests.storage import Storage
from stages.models import nets
from stages.models.loading import model_files
from stages.models.source import ModelConfig, identity_of
from stages.settings import InputSettings

NAMES = ("left", "right", "top")
SIDE = 8
INPUT = InputSettings(size=8, channels=1, mean=(0.3,), std=(0.4,))
TEACHER = ModelConfig(architecture="digits-cnn-small", num_classes=3, channels=1, input=INPUT, class_names=NAMES)


def square(label: int, rng: np.random.Generator) -> bytes:
    image = rng.integers(0, 60, (SIDE, SIDE, 3), dtype=np.uint8)
    image[(slice(2, 6), slice(2, 6), slice(0, 3))[label], (slice(0, 3), slice(5, 8), slice(2, 6))[label]] = 220
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def write_dataset(folder, count=48, shards=2, teacher=None, seed=0, **columns) -> str:
    """A dataset folder of ``count`` rows; ``columns``: name to a function of the row's number. Returns its manifest."""
    storage, rng = Storage(folder), np.random.default_rng(seed)
    files = teacher_files() if teacher is None else None
    if files:
        for name, data in files.items():
            storage.write(f"teacher/{name}", data)
        teacher = identity_of(TEACHER, files["model.safetensors"]) | {"path": "teacher/model.safetensors"}
    for shard in range(shards):
        with ShardWriter(storage, shard, f"print-{seed}") as writer:
            for i in range(shard * count // shards, (shard + 1) * count // shards):
                row = {"label": i % 3, "class_name": NAMES[i % 3], "method": "drawn", "trajectory": i, "kept": True}
                writer.add(row | {name: make(i) for name, make in columns.items()}, square(i % 3, rng))
            writer.commit()
    info = DatasetInfo(f"print-{seed}", {}, {}, teacher, SIDE, NAMES)
    merge(storage, info, list(done_records(storage)))
    return f"{folder}/m.parquet"


def teacher_files() -> dict[str, bytes]:
    """The files of an untrained teacher's folder; its random answers are as good as any to learn from."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return model_files(nets.build("digits-cnn-small", 3, 1).eval(), TEACHER)
