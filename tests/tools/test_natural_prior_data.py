"""The photographs of the natural prior: one shuffled order from a table or folders, captions from class names."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from natural_groups import captions
from train_natural_prior import load_pool

NAMES = ["tabby", "lion", "Chihuahua"]


def png(value):
    buffer = io.BytesIO()
    Image.fromarray(np.full((32, 32, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def test_tables_and_folders_keep_image_and_label_together(tmp_path):
    (tmp_path / "classes.json").write_text(json.dumps([{"name": name} for name in NAMES]))
    values, labels = list(range(12)), [value % 3 for value in range(12)]
    pq.write_table(pa.table({"jpg": [png(v) for v in values], "label": labels}), tmp_path / "t.parquet")
    for value, label in zip(values, labels, strict=True):
        (tmp_path / "images" / NAMES[label]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / NAMES[label] / f"{value:02d}.png").write_bytes(png(value))
    for source in ("t.parquet", "images"):
        pool = load_pool(tmp_path / source, tmp_path / "classes.json")
        assert pool.images.shape == (12, 3, 32, 32) and pool.names == NAMES
        seen = pool.images[:, 0, 0, 0].tolist()
        assert sorted(seen) == values and seen != values
        assert [value % 3 for value in seen] == pool.labels.tolist()
        last = load_pool(tmp_path / source, tmp_path / "classes.json", last=5)
        assert torch.equal(last.images, pool.images[-5:]) and torch.equal(last.labels, pool.labels[-5:])


def test_a_class_is_called_by_its_name_and_by_everyday_words():
    assert {"chihuahua", "a photo of dog", "a realistic photo of chihuahua, dog"} <= set(captions("Chihuahua"))
    assert captions("Chihuahua").count("a photo of chihuahua") == 2
    assert set(captions("torch")) == {"torch", "a photo of torch", "a realistic photo of torch"}
