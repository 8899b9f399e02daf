"""What the teacher cache saves: the same training with the teacher asked at every step, and with its answers kept.

    python benchmarks/teacher_cache.py [--epochs 24] [--views 4] [--rounds 3] [--json FILE]

One student on the embedded digits of the training split; views are fixed, without CutMix and MixUp, in both runs, so
that both learn from the same images. CPU seconds of the whole run, computing the answers included; median over rounds.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from many_students import HEAVY, digits_dataset, heavy_teacher

from stages.distill.run import run_distill
from stages.settings import DistillSettings, ModelSettings

STUDENT = "digits-cnn-small"


def seconds(manifest: str, teacher: str, out: Path, epochs: int, views: int, cached: bool) -> float:
    settings: dict[str, Any] = {
        "students": [STUDENT], "epochs": epochs, "val_fraction": 0, "checkpoint_seconds": 1e9,
        "allow_other_teacher": True,
        "augment": {"cutmix": 0, "mixup": 0, "num_views": views}, "teacher_cache": {"enabled": cached}, "device": "cpu",
    }  # fmt: skip
    started = time.process_time()
    run_distill(
        DistillSettings.model_validate(settings), [(manifest, 1.0)], str(out), ModelSettings(name=teacher),
        on_event=lambda kind, **fields: None,
    )  # fmt: skip
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        manifest = digits_dataset(out / "data")
        teachers = {"embedded:digits": "embedded:digits", HEAVY: heavy_teacher(out / "heavy")}
        for name, teacher in teachers.items():
            runs: dict[bool, list[float]] = {False: [], True: []}
            for number in range(options.rounds):
                for cached in (False, True):
                    folder = out / f"{name.replace(':', '-')}-{number}-{cached}"
                    runs[cached].append(seconds(manifest, teacher, folder, options.epochs, options.views, cached))
            asked, kept = (statistics.median(runs[cached]) for cached in (False, True))
            rows[name] = {"asked_s": asked, "cached_s": kept, "gain": asked / kept}
    print(f"{STUDENT}, {options.epochs} epochs, {options.views} views of each image, CPU seconds of the whole run\n")
    print("| teacher | asked at every step | cached | gain |")
    print("|---|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row['asked_s']:.1f} | {row['cached_s']:.1f} | {row['gain']:.2f}× |")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
