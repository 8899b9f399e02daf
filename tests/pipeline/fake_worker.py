"""A worker without a model: a solid color per row, so that the pipeline is tested in milliseconds."""

import io
from typing import Any

from PIL import Image

from manifests.shard import ShardWriter, done_record
from manifests.storage import Storage

FACTORY = "tests.pipeline.fake_worker:build_worker"
POISON = "tests.pipeline.fake_worker:build_poisoned"


class FakeWorker:
    """Commits ``groups_per_shard × group_size`` rows; shards in ``poison`` raise."""

    def __init__(self, settings: dict[str, Any], storage: str, fingerprint: str, poison: tuple[int, ...] = ()) -> None:
        self.settings, self.storage, self.fingerprint, self.poison = settings, Storage(storage), fingerprint, poison

    def run(self, shard: int, on_progress=None) -> dict[str, Any]:
        if shard in self.poison:
            raise ValueError(f"shard {shard} is \x1b[31mpoison")
        record = done_record(self.storage, shard)
        if record is None:
            with ShardWriter(self.storage, shard, self.fingerprint) as writer:
                for i in range(self.settings["groups_per_shard"] * self.settings["group_size"]):
                    writer.add(row(shard, i), image(shard, i))
                record = writer.commit()
        return {"shard": shard, "rows": record.rows, "kept": record.kept, "bytes": record.tar_bytes, "seconds": 0.01}


def row(shard: int, i: int) -> dict[str, Any]:
    """Labels go round; every fifth row is rejected."""
    kept = i % 5 != 4
    return {
        "label": i % 10,
        "class_name": f"class {i % 10}",
        "method": "fake",
        "seed": 0,
        "group": shard,
        "trajectory": i,
        "step": 0,
        "timestep": 0,
        "lca": [],
        "teacher_label": i % 10 if i % 2 else 0,
        "cosine": 0.01 * i,
        "confidence": 0.5,
        "kept": kept,
        "reject_reason": None if kept else "confidence",
    }


def image(shard: int, i: int) -> bytes:
    """An 8 × 8 PNG of one color."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shard % 256, i % 256, 128)).save(buffer, "PNG")
    return buffer.getvalue()


def build_worker(settings: dict[str, Any], storage: str, fingerprint: str, planned: Any) -> FakeWorker:
    return FakeWorker(settings, storage, fingerprint)


def build_poisoned(settings: dict[str, Any], storage: str, fingerprint: str, planned: Any) -> FakeWorker:
    return FakeWorker(settings, storage, fingerprint, poison=(1,))
