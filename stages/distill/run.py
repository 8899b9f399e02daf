"""Stage 2 from manifests to student folders. Used by ``factory run distill`` and ``factory demo``.

OUT/run.json            what decides the result: settings, manifests, teacher
OUT/checkpoint.pt       state of the run, replaced atomically
OUT/results.json        what this module returns
OUT/teacher-cache/      the teacher's answers, where they are kept
OUT/STUDENT/            model.safetensors, config.json, README.md, metrics.jsonl, best.safetensors
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch

from manifests.errors import UsageError
from manifests.reader import Manifest
from manifests.storage import Storage
from stages.distill import card, checkpoint
from stages.distill.answers import open_answers
from stages.distill.batches import Batches
from stages.distill.evaluate import evaluate_net
from stages.distill.loop import OnEvent, OnProgress, Training, best_weights, held_out, train
from stages.distill.pixels import open_pixels
from stages.distill.rows import EpochOrder, rows_digest, select_rows, split_held_out
from stages.distill.settings import PLACE, DistillSettings
from stages.distill.student import Student
from stages.distill.teacher_check import check_teacher, complaints
from stages.distill.teachers import find_teacher
from stages.models.identity import ModelConfig
from stages.models.loading import model_files
from stages.models.registry import adaptation_of
from stages.models.schemes import default_stem
from stages.models.settings import ModelSettings
from stages.models.teacher import Teacher

RESULTS = "results.json"


def run_distill(
    settings: DistillSettings,
    manifests: Sequence[tuple[str, float]],
    out: Storage | str,
    teacher: ModelSettings | None = None,
    test_data: str | None = None,
    on_event: OnEvent = lambda kind, **fields: None,
    progress: OnProgress = lambda done, total, note: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Train every student of ``settings`` on ``manifests`` (URL, weight) and write them below ``out``.

    The same call resumes, or returns the finished run's results again. Returns JSON-able results; ``parked`` names the
    students that diverged, by reason. Raises DataError where data, teacher and run folder do not fit, UsageError for
    settings that cannot work, Interrupted after a checkpoint once ``should_stop()`` is true.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        return _run(settings, manifests, out, teacher, test_data, on_event, progress, should_stop)
    finally:
        torch.set_num_threads(before)


def _run(
    settings: DistillSettings,
    sources: Sequence[tuple[str, float]],
    out: Storage | str,
    named_teacher: ModelSettings | None,
    test_data: str | None,
    on_event: OnEvent,
    progress: OnProgress,
    should_stop: Callable[[], bool],
) -> dict[str, Any]:
    storage = out if isinstance(out, Storage) else Storage(out)
    device = _device(settings.device)
    manifests = [(Manifest.open(url, skip_bad=settings.skip_bad), weight) for url, weight in sources]
    teacher = find_teacher([manifest for manifest, _ in manifests], named_teacher, settings.other_teacher, device)
    rows = select_rows(manifests, settings)
    fit, held = split_held_out(rows, settings.held_out, settings.seed)
    order = EpochOrder(rows, fit, settings)
    students = [Student(student_config(name, settings, teacher), settings, device) for name in settings.students]

    compared: Any = {**dict.fromkeys(PLACE, True), "cache": {"folder"}}
    spec = {
        "settings": settings.model_dump(mode="json", exclude=compared),
        "manifests": [
            {"digest": manifest.digest, "fingerprint": manifest.info.fingerprint, "weight": weight}
            | ({"rows": rows_digest(selection.rows)} if settings.skip_bad else {})
            for (manifest, weight), selection in zip(manifests, rows.selections, strict=True)
        ],
        "teacher": {key: teacher.identity[key] for key in ("architecture", "sha256")},
    }
    on_event("run_started", students=[student.name for student in students], images=len(fit))
    defaults = DistillSettings().model_dump(mode="json", exclude=compared)
    checkpoint.open_run(storage, spec, {"settings": defaults})
    for student in students:
        if adapted := adaptation_of(student.net):
            on_event("note", message=f"{student.name}: stem fit to {student.config.input.size} px images: {adapted}")
    for wrong in filter(None, rows.bad):
        on_event("warning", message=f"{len(wrong)} images are left out; the first: {wrong[0]}")
    pixels = open_pixels(rows, settings.memory_gb, device)
    batches = Batches(rows, order, pixels, settings, device)
    check = check_teacher(teacher, batches, fit)
    on_event("teacher_checked", **check)
    for line in complaints(check, settings.min_agreement):
        on_event("warning", message=line)

    def look(student: Student) -> dict[str, Any]:
        assert test_data is not None
        return evaluate_net(student.result, student.config, test_data, teacher)

    cached = None
    if settings.cache.use:
        cached = open_answers(teacher, batches, storage, on_event, progress, should_stop)
    run = Training(
        settings=settings, teacher=teacher, students=students, batches=batches, held=held, storage=storage,
        device=device, on_event=on_event, on_progress=progress, should_stop=should_stop,
        look=look if test_data else None,
        answers=cached,
    )  # fmt: skip
    train(run)

    results: dict[str, Any] = {
        "out": storage.url,
        "teacher": spec["teacher"],
        "teacher_check": check,
        "images": len(fit),
        "images_held_out": len(held),
        "seconds": run.seconds,
        "data_wait": run.waited / run.seconds if run.seconds else 0.0,
        "students": {s.name: _finish(run, s, spec, test_data, storage, len(fit)) for s in run.learning},
        "parked": {s.name: s.parked for s in run.students if s.parked is not None},
    }
    if test_data:
        results["teacher_accuracy"] = next(iter(results["students"].values()))["test"]["teacher_accuracy"]
    storage.write(RESULTS, json.dumps(results, indent=1).encode() + b"\n")
    return results


def _finish(
    run: Training, student: Student, spec: dict[str, Any], test_data: str | None, storage: Storage, images: int
) -> dict[str, Any]:
    """Write one student's folder; its results."""
    net = student.result
    if run.settings.keep == "best":
        net.load_state_dict(best_weights(run, student))
    facts: dict[str, Any] = {
        "folder": storage.path(student.name),
        "images": images,
        "images_held_out": len(run.held),
        "device": str(run.device),
        "last_epoch": student.metrics[-1],
        "held_out": held_out(run, student) if len(run.held) else None,
        "test": evaluate_net(net, student.config, test_data, run.teacher) if test_data else None,
        **card.measure(net, student.config),
    }
    files = model_files(net, student.config)
    facts["bytes"] = len(files["model.safetensors"])
    files["README.md"] = card.model_card(student.config, spec, facts).encode()
    for name, data in files.items():
        storage.write(f"{student.name}/{name}", data)
    return facts


def student_config(name: str, settings: DistillSettings, teacher: Teacher) -> ModelConfig:
    """The student ``name`` with the teacher's classes, and its input unless the settings give another."""
    wanted = settings.input or teacher.input.settings
    return ModelConfig(
        architecture=name,
        num_classes=teacher.num_classes,
        channels=wanted.channels,
        input=wanted,
        class_names=teacher.class_names,
        stem=default_stem(name, wanted.size, student=True),
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device
