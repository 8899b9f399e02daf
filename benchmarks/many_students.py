"""What one pass for several students saves over a run each: predicted from T and S, and measured.

    python benchmarks/many_students.py [--epochs 3] [--rounds 3] [--out FOLDER] [--json FILE]

Data: the embedded digits of the training split, stored as a dataset of ours. T: one teacher forward of a batch; S: one
training step of a student, mean over students. N students need N·(T + S) in runs of their own and T + N·S in one pass.
Two teachers: the embedded one, and a ResNet of 56 layers (untrained: its cost is what counts). Everything is measured
in CPU seconds of this process, so that other work on the machine does not count; rounds alternate between the
arrangements and the median is reported. Epochs after the first count, since the first one warms up.
"""

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from manifests.dataset import DatasetInfo
from manifests.merge import merge
from manifests.shard import ShardWriter, done_records
from manifests.storage import Storage
from stages.digits import load_split
from stages.distill import loop
from stages.distill.run import run_distill
from stages.distill.student import Student
from stages.models import nets
from stages.models.loading import load_teacher, save_model
from stages.models.source import EMBEDDED, parse_config
from stages.settings import DistillSettings, ModelSettings

STUDENTS = ("digits-cnn-small", "resnet8", "resnet8-gn", "wrn-16-1")
HEAVY = "resnet56"


def digits_dataset(folder: Path) -> str:
    """The training digits in the factory's own format; the path of the manifest."""
    storage = Storage(folder)
    images, labels = load_split("train")
    teacher = load_teacher(ModelSettings())
    with ShardWriter(storage, 0, "benchmark") as writer:
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            buffer = io.BytesIO()
            Image.fromarray((image * 15.9375).round().astype("uint8")).convert("RGB").save(buffer, "PNG")
            row = {"label": int(label), "class_name": str(label), "method": "real", "trajectory": number, "kept": True}
            writer.add(row, buffer.getvalue())
        writer.commit()
    info = DatasetInfo("benchmark", {}, {}, dict(teacher.identity), int(images.shape[1]), teacher.class_names)
    merge(storage, info, list(done_records(storage)))
    return f"{folder}/m.parquet"


def heavy_teacher(folder: Path) -> str:
    home = EMBEDDED["embedded:digits"]
    config, _ = parse_config((home / "config.json").read_bytes(), str(home))
    config = config.model_copy(update={"architecture": HEAVY})
    torch.manual_seed(0)
    save_model(folder, nets.build(HEAVY, config.num_classes, config.channels).eval(), config)
    return str(folder)


class Clock:
    """CPU seconds between the end of the first epoch and the end of the run, and inside the teacher and the students.

    Steps run in one thread, batches are prepared in another: the first counts for T and S, both for the whole.
    """

    def __init__(self, epochs: int):
        self.epochs, self.marks = epochs, dict[float, float]()
        self.spent = {"teacher": 0.0, "students": 0.0}
        self.total = 1.0
        self._on = False

    def progress(self, done: float, total: float, note: str) -> None:
        self.marks[done], self.total = time.process_time(), total
        self._on = done >= total / self.epochs

    def timed(self, name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.spent[name] += (time.thread_time() - started) * self._on

        return call

    @property
    def steps(self) -> float:
        return self.total * (self.epochs - 1) / self.epochs

    @property
    def per_step(self) -> float:
        return (self.marks[self.total] - self.marks[self.total - self.steps]) / self.steps


def one_run(students: tuple[str, ...], manifest: str, teacher: str, out: Path, epochs: int) -> dict[str, float]:
    """CPU seconds a step: whole, teacher's part T, students' part (all of them together), share of waiting for data."""
    clock = Clock(epochs)
    settings = DistillSettings.model_validate(
        {
            "students": students,
            "epochs": epochs,
            "val_fraction": 0,
            "checkpoint_seconds": 1e9,
            "allow_other_teacher": True,
        }
        | {"device": "cpu"}
    )
    originals = loop.teacher_targets, Student.learn
    loop.teacher_targets = clock.timed("teacher", originals[0])
    Student.learn = clock.timed("students", originals[1])  # type: ignore[method-assign]
    try:
        results = run_distill(
            settings, [(manifest, 1.0)], str(out), ModelSettings(name=teacher), progress=clock.progress
        )
    finally:
        loop.teacher_targets, Student.learn = originals  # type: ignore[method-assign]
    return {
        "step": clock.per_step,
        "T": clock.spent["teacher"] / clock.steps,
        "S": clock.spent["students"] / clock.steps,
        "data_wait": results.data_wait,
    }


def compare(manifest: str, teacher: str, out: Path, epochs: int, rounds: int) -> dict[str, Any]:
    """Median costs in milliseconds of CPU time a step, predicted and measured gain."""
    solo: dict[str, list[dict[str, float]]] = {name: [] for name in STUDENTS}
    together: list[dict[str, float]] = []
    for number in range(rounds):
        for name in STUDENTS:
            solo[name].append(one_run((name,), manifest, teacher, out / f"{number}-{name}", epochs))
        together.append(one_run(STUDENTS, manifest, teacher, out / f"{number}-all", epochs))

    def median(runs: list[dict[str, float]], key: str) -> float:
        return statistics.median(run[key] for run in runs)

    count = len(STUDENTS)
    cost = statistics.median(run["T"] for runs in solo.values() for run in runs)
    per_student = {name: median(runs, "S") for name, runs in solo.items()}
    mean = sum(per_student.values()) / count
    alone, all_at_once = sum(median(runs, "step") for runs in solo.values()), median(together, "step")
    predicted = count * (cost + mean) / (cost + count * mean)
    return {
        "T_ms": 1000 * cost,
        "S_ms": {name: 1000 * value for name, value in per_student.items()},
        "S_mean_ms": 1000 * mean,
        "solo_ms": 1000 * alone,
        "one_pass_ms": 1000 * all_at_once,
        "predicted": predicted,
        "measured": alone / all_at_once,
        "measured_to_predicted": alone / all_at_once / predicted,
        "data_wait": max(median(runs, "data_wait") for runs in [*solo.values(), together]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        out = options.out or Path(temporary)
        manifest = digits_dataset(out / "data")
        teachers = {"embedded:digits": "embedded:digits", HEAVY: heavy_teacher(out / "heavy")}
        rows = {
            name: compare(manifest, teacher, out / name.replace(":", "-"), options.epochs, options.rounds)
            for name, teacher in teachers.items()
        }
    print(f"{len(STUDENTS)} students: {', '.join(STUDENTS)}; batch 64, CPU milliseconds a step\n")
    print("| teacher | T | S (mean) | four solo runs | one pass | predicted gain | measured | ratio | data wait |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, r in rows.items():
        times = " | ".join(f"{r[key]:.2f}" for key in ("T_ms", "S_mean_ms", "solo_ms", "one_pass_ms"))
        gains = f"{r['predicted']:.2f}× | {r['measured']:.2f}× | {r['measured_to_predicted']:.2f}"
        print(f"| {name} | {times} | {gains} | {r['data_wait']:.1%} |")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
