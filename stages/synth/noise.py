"""``--method noise``: random images and no network (nor torch). A load test of driver, storage and reader."""

import io
import time
from typing import Any

import numpy as np
from PIL import Image

from manifests.schema import Row
from manifests.shard import ShardWriter, done_record
from manifests.storage import Storage
from stages.models.source import resolve
from stages.progress import OnProgress, ShardWatch
from stages.settings import SynthSettings

SIDE = 32
_FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}


class NoiseWorker:
    """A worker of stage 1 for load tests. Pixels depend on (seed, group) alone; labels go through the teacher's
    classes."""

    def __init__(self, settings: dict[str, Any], storage: str, fingerprint: str, planned: object = None) -> None:
        self.settings = SynthSettings.model_validate(settings)
        self.storage, self.fingerprint = Storage(storage), fingerprint
        self.storage.hold()
        self.classes = len(resolve(self.settings.teacher).config.class_names)

    def run(self, shard: int, on_progress: OnProgress | None = None) -> dict[str, Any]:
        """Make and commit ``shard``; at once if it is committed already."""
        started, groups = time.monotonic(), self.settings.groups_per_shard
        watch = ShardWatch(shard, groups, 1, on_progress)
        record = done_record(self.storage, shard)
        if record is None:
            with ShardWriter(self.storage, shard, self.fingerprint) as writer:
                for position in range(groups):
                    for row, image in self._samples(shard * groups + position):
                        writer.add(row, image, self.settings.images.format)
                    watch.end_group()
                record = writer.commit()
        seconds = round(time.monotonic() - started, 3)
        return {"shard": shard, **record.report, "seconds": seconds}

    def _samples(self, group: int) -> list[tuple[Row, bytes]]:
        settings, side = self.settings, self.settings.images.size or SIDE
        rng = np.random.default_rng((settings.seed, group))
        pixels = rng.integers(0, 256, (settings.group_size, side, side, 3), dtype=np.uint8)
        return [(self._row(group, i), self._encode(image)) for i, image in enumerate(pixels)]

    def _row(self, group: int, i: int) -> Row:
        trajectory = group * self.settings.group_size + i
        made = {"method": "noise", "seed": self.settings.seed, "group": group, "trajectory": trajectory}
        return {**made, "label": trajectory % self.classes, "kept": True}

    def _encode(self, image: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        kind = _FORMATS[self.settings.images.format]
        # noise does not compress: the fastest level gives the same size
        Image.fromarray(image).save(buffer, kind, **({"compress_level": 1} if kind == "PNG" else {}))
        return buffer.getvalue()
