"""Small datasets for the tests of ``manifests``: images are short byte strings, since nothing here decodes them."""

import random
from typing import Any

from manifests.dataset import DatasetInfo
from manifests.merge import merge
from manifests.shard import DoneRecord, ShardWriter
from manifests.storage import Storage

FINGERPRINT = "ab" * 32
INFO = DatasetInfo(
    fingerprint=FINGERPRINT,
    recipe={"name": "test", "synth": {"guidance": {"step_size": 0.1}}},
    prior={"kind": "embedded"},
    teacher={"kind": "builtin", "sha256": "cd" * 32},
    image_size=32,
    class_names=("zero", "one", "two"),
)


def make_image(shard: int, index: int) -> bytes:
    return random.Random(f"{shard}/{index}").randbytes(40 + 37 * (index % 5))


def make_row(shard: int, index: int) -> dict[str, Any]:
    """A row as stage 1 hands it to the writer: every kind of column, some null."""
    label = (shard + index) % 3
    return {
        "label": label,
        "class_name": ("zero", "one", "two")[label],
        "prompt": f"a photo of <b>\n\x1b[31m{index}",
        "method": "diffdfkd",
        "seed": 7,
        "group": index // 4,
        "trajectory": index,
        "step": 49,
        "timestep": 0,
        "lca": [{"step": 3, "timestep": 900, "partner": 1, "y": 0, "x": 1, "h": 2, "w": 3, "lam": 0.3}]
        if index % 2
        else [],
        "cosine": None if index % 3 == 0 else (index % 10) / 10,
        "teacher_label": (label + (index % 4 == 0)) % 3,
        "confidence": 0.1 * (index % 10),
        "loss_ce": 1.25,
        "kept": index % 5 != 4,
        "reject_reason": "confidence" if index % 5 == 4 else None,
        "logits": [0.1, -2.0, 3.5],
    }


def write_shard(storage: Storage, shard: int, rows: int = 6, fingerprint: str = FINGERPRINT) -> DoneRecord:
    with ShardWriter(storage, shard, fingerprint) as writer:
        for index in range(rows):
            writer.add(make_row(shard, index), make_image(shard, index))
        return writer.commit()


def make_dataset(url: Any, shards: int = 3, rows: int = 6) -> Storage:
    """A complete dataset folder."""
    storage = Storage(url)
    for shard in range(shards):
        write_shard(storage, shard, rows)
    merge(storage, INFO)
    return storage


def all_files(storage: Storage) -> dict[str, bytes]:
    """Every file that is not temporary, by name."""
    names = [name for folder in ("", "shards", "done") for name in storage.list(folder)]
    return {name: storage.read(name) for name in names}


def flip(storage: Storage, name: str, position: int) -> None:
    """Change one byte of a file."""
    data = bytearray(storage.read(name))
    data[position] ^= 0x41
    storage.write(name, bytes(data))
