"""A dataset whose names, prompts and reasons are an attack, with every kind of score, some missing."""

from pathlib import Path

import numpy as np

from manifests.dataset import DatasetInfo
from manifests.merge import merge
from manifests.shard import ShardWriter
from manifests.storage import Storage
from tests.pipeline.fake_worker import image, row

ATTACKS = (
    "<script>window.attacked = 1</script>",
    '"><img src=x onerror="window.attacked = 1">',
    "</script><script>window.attacked = 1</script>",
    "{{ 7 * 7 }}",
    "' onmouseover='window.attacked = 1",
    "right\u202eleft\x00\x1b[31m",
)
RECIPE = {
    "name": ATTACKS[0],
    "description": ATTACKS[1],
    "synth": {"method": ATTACKS[2], "prompts": {"subjects": [*ATTACKS]}, ATTACKS[0]: ATTACKS[1], "lca": 3},
}


def write_hostile(folder: Path, rows: int = 120) -> str:
    """``rows`` rows of six classes, a third of them predictions of earlier steps; returns the folder."""
    random, storage = np.random.default_rng(0), Storage(folder)
    info = DatasetInfo("f" * 64, RECIPE, {"name": ATTACKS[1]}, {"architecture": ATTACKS[2]}, 8, ATTACKS)
    with ShardWriter(storage, 0, info.fingerprint) as writer:
        for i in range(rows):
            kept = bool(random.random() > 0.2)
            confidence, cosine = (None if random.random() < 0.1 else float(random.random()) for _ in range(2))
            if i < 4:  # what lies on a threshold, once rounded to float32
                confidence = (0.7, 0.005, 1.0, 0.0)[i]
            values = {
                "label": i % 6,
                "class_name": ATTACKS[i % 6],
                "prompt": ATTACKS[(i + 1) % 6],
                "teacher_label": None if i % 7 == 0 else i % 6 if i % 5 else (i + 1) % 6,
                "entropy": None if i % 11 == 0 else float(random.random() * 1.8),
                "trajectory": i // 3,
                "step": (2, 5, 9)[i % 3],
                "timestep": (700, 300, 0)[i % 3],
                "kept": kept,
                "reject_reason": None if kept else ATTACKS[1],
                "confidence": confidence,
                "cosine": cosine,
            }
            writer.add(row(0, i) | values, image(0, i))
        writer.commit()
    merge(storage, info, [0])
    return str(folder)
