"""Stage 2 from manifests to student folders. Used by ``factory run distill`` and ``factory demo``.

OUT/run.json            what decides the result: settings, manifests, teacher
OUT/checkpoint.pt       state of the run, replaced atomically
OUT/results.json        what this module returns, sealed
OUT/teacher-cache/      the teacher's answers, where they are kept
OUT/STUDENT/            model.safetensors, config.json, README.md, metrics.jsonl
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from manifests.errors import DataError, UsageError
from manifests.reader import Manifest
from manifests.storage import Storage
from stages.distill import checkpoint, export
from stages.distill.batches import Batches, check_parts, open_pixels
from stages.distill.evaluate import check_data, evaluate_net
from stages.distill.loop import Training, train
from stages.distill.results import WEIGHTS, Scores, keep_score, measured_before, write_results
from stages.distill.rows import EpochOrder, Ints, Rows, rows_digest, select_rows, split_validation
from stages.distill.runtime import ALONE, Callbacks, OnEvent, OnProgress, Ranks, complaint, torch_threads
from stages.distill.student import Student
from stages.distill.teacher_cache import open_teacher_cache
from stages.distill.teacher_check import check_teacher, complaints, find_teacher
from stages.memory import find_device
from stages.models.build import adaptation_of
from stages.models.loading import model_files
from stages.models.source import NamedConfig, default_stem
from stages.models.teacher import Teacher
from stages.settings import ALGORITHM_VERSION, PLACE, DistillSettings, ModelSettings

NO_DERIVED = "loss.variants_ce does nothing: no image to train on was made from another, as method dda makes them"
COMPARED: Any = {**dict.fromkeys(PLACE, True), "teacher_cache": {"folder"}}
"""Settings left out of what a resumed run must share with its beginning."""


@dataclass(frozen=True)
class Prepared:
    """What a run trains, on what, and what decides its result (``spec``): read and checked, nothing written yet."""

    settings: DistillSettings
    teacher: Teacher
    rows: Rows
    fit: Ints
    held: Ints
    order: EpochOrder
    students: list[Student]
    spec: dict[str, Any]
    device: torch.device
    ranks: Ranks


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
    """Train every student of ``settings`` on ``manifests`` (URL, weight) and write them below ``out``, in this process.

    The same call resumes, or returns the finished run's results again; without ``test_data`` it keeps the test scores
    that an earlier call measured of the same weights. Returns JSON-able results; ``parked`` names the students that
    diverged, by reason. Raises DataError where data, teacher and run folder do not fit, UsageError for settings that
    cannot work, Interrupted after a checkpoint once ``should_stop()`` is true.
    """
    storage = out if isinstance(out, Storage) else Storage(out)
    prepared = prepare(settings, manifests, teacher)
    begin(prepared, storage, on_event)
    return train_students(prepared, storage, test_data, Callbacks(on_event, progress, should_stop))


def prepare(
    settings: DistillSettings,
    sources: Sequence[tuple[str, float]],
    named_teacher: ModelSettings | None,
    ranks: Ranks = ALONE,
) -> Prepared:
    """Open and check everything; the same in every process of ``ranks``."""
    device = ranks.device or find_device(settings.device)
    manifests = [(Manifest.open(url, skip_bad=settings.skip_bad), weight) for url, weight in sources]
    teacher = find_teacher([manifest for manifest, _ in manifests], named_teacher, settings.allow_other_teacher, device)
    if settings.channels_last:
        teacher.to(memory_format=torch.channels_last)
    rows = select_rows(manifests, settings)
    fit, held = split_validation(rows, settings.val_fraction, settings.seed)
    if settings.loss.active == ("variants_ce",) and not rows.derived[fit].any():
        raise UsageError(f"loss: nothing to learn from: {NO_DERIVED}; set loss.kd")
    configs = [student_config(name, settings, teacher) for name in settings.students]
    spec = {
        "algorithm": ALGORITHM_VERSION,
        "settings": settings.model_dump(mode="json", exclude=COMPARED),
        "manifests": [
            {"digest": manifest.digest, "fingerprint": manifest.info.fingerprint, "weight": weight}
            | ({"rows": rows_digest(selection.rows)} if settings.skip_bad else {})
            for (manifest, weight), selection in zip(manifests, rows.selections, strict=True)
        ],
        "teacher": {key: teacher.identity[key] for key in ("architecture", "sha256")},
    }
    return Prepared(
        settings=settings, teacher=teacher, rows=rows, fit=fit, held=held, order=EpochOrder(rows, fit, settings),
        students=[Student(config, settings, device, ranks) for config in configs],
        spec=spec, device=device, ranks=ranks,
    )  # fmt: skip


def begin(prepared: Prepared, storage: Storage, on_event: OnEvent, workers: int = 1) -> None:
    """Announce the run and claim its folder, once for all ``workers``. Raises as :func:`run_distill` does."""
    check_parts(prepared.order.length, prepared.settings.batch_size, workers)
    names = [student.name for student in prepared.students]
    for name in names:
        storage.folder(name)  # now, not after the training
    on_event("run_started", students=names, images=len(prepared.fit), workers=workers)
    checkpoint.open_run(storage, prepared.spec)


def train_students(prepared: Prepared, storage: Storage, test_data: str | None, callbacks: Callbacks) -> dict[str, Any]:
    """Train on in the claimed folder. All ranks do so together; the first one writes, and alone has results."""
    settings, teacher, rows, ranks = prepared.settings, prepared.teacher, prepared.rows, prepared.ranks
    if test_data and ranks.first:  # now, not after the training
        order = check_data(test_data, teacher.class_names)
        callbacks.on_event("note", message=f"test data: {order}")
    before = measured_before(storage, bool(test_data)) if ranks.first else {}
    with torch_threads(settings.threads):
        for student in prepared.students:
            if adapted := adaptation_of(student.net):
                size = student.config.input.size
                callbacks.on_event("note", message=f"{student.name}: stem fit to {size} px images: {adapted}")
        for wrong in filter(None, rows.bad):
            callbacks.on_event("warning", message=f"{len(wrong)} images are left out; the first: {wrong[0]}")
        if slow := complaint(settings.dtype, prepared.device):
            callbacks.on_event("warning", message=slow)
        if settings.loss.variants_ce and not rows.derived[prepared.fit].any():
            callbacks.on_event("warning", message=NO_DERIVED)
        if settings.eval_every and not test_data:
            callbacks.on_event("warning", message="eval_every does nothing without --test-data")
        pixels = open_pixels(rows, settings.memory_gb, prepared.device)
        batches = Batches(rows, prepared.order, pixels, settings, prepared.device, ranks)
        check = check_teacher(teacher, batches, prepared.fit) if ranks.first else {}
        if ranks.first:
            callbacks.on_event("teacher_checked", **check)
            for line in complaints(check, settings.min_agreement):
                callbacks.on_event("warning", message=line)
        use_cache = settings.teacher_cache.enabled
        cache = open_teacher_cache(teacher, batches, storage, callbacks) if use_cache else None
        run = Training(
            settings=settings, teacher=teacher, students=prepared.students, batches=batches, held=prepared.held,
            storage=storage, device=prepared.device, callbacks=callbacks, ranks=ranks,
            look=(lambda s: _score(s.result, s, test_data, teacher, callbacks)) if test_data else None,
            teacher_cache=cache,
        )  # fmt: skip
        train(run)
        return _results(prepared, run, test_data, before, check) if ranks.first else {}


def _results(
    prepared: Prepared, run: Training, test_data: str | None, before: Scores, check: dict[str, Any]
) -> dict[str, Any]:
    """Write every student's folder and the results of the run; the latter. ``before``: scores of an earlier command."""

    def score(student: Student, weights: str) -> dict[str, Any] | None:
        new = _score(student.result, student, test_data, run.teacher, run.callbacks) if test_data else None
        return new or keep_score(student.name, weights, before, run.callbacks)

    results: dict[str, Any] = {
        "out": run.storage.url,
        "teacher": prepared.spec["teacher"],
        "teacher_check": check,
        "images": len(prepared.fit),
        "val_images": len(prepared.held),
        "workers": run.ranks.size,
        "seconds": run.seconds,
        "data_wait": run.waited / run.seconds if run.seconds else 0.0,
        "students": {student.name: _finish(prepared, run, student, score) for student in run.learning},
        "parked": {student.name: student.parked for student in run.students if student.parked is not None},
    }
    for facts in results["students"].values():
        if facts["test"]:
            results["teacher_accuracy"] = facts["test"]["teacher_accuracy"]
    write_results(run.storage, results)
    return results


def _score(
    net: nn.Module, student: Student, test_data: str, teacher: Teacher, callbacks: Callbacks
) -> dict[str, Any] | None:
    """The student's scores on ``test_data``; None, with a warning, where there are none: that loses no student."""
    try:
        return evaluate_net(net, student.config, test_data, teacher)
    except DataError as error:
        callbacks.on_event("warning", message=f"{student.name} has no score on the test data: {error}")
        return None


def _finish(
    prepared: Prepared, run: Training, student: Student, score: Callable[[Student, str], dict[str, Any] | None]
) -> dict[str, Any]:
    """Write one student's folder; its results. ``score`` gets the sha256 of its weights."""
    net, scores = student.result, student.metrics[-1].get("val")
    if run.settings.select == "best":
        net.load_state_dict(student.best_weights)
        scores = max(student.metrics, key=lambda line: (line["val"]["agreement"], line["epoch"]))["val"]
    files = model_files(net, student.config)
    weights = hashlib.sha256(files["model.safetensors"]).hexdigest()
    facts: dict[str, Any] = {
        "folder": run.storage.path(student.name),
        "images": len(prepared.fit),
        "val_images": len(run.held),
        "device": str(run.device),
        "last_epoch": student.metrics[-1],
        "val": scores,
        "test": score(student, weights),
        **export.measure(net, student.config),
        "bytes": len(files["model.safetensors"]),
        WEIGHTS: weights,
    }
    files["README.md"] = export.model_card(student.config, prepared.spec, facts).encode()
    for name, data in files.items():
        run.storage.write(f"{student.name}/{name}", data)
    return facts


def student_config(name: str, settings: DistillSettings, teacher: Teacher) -> NamedConfig:
    """The student ``name`` with the teacher's classes, and its input unless the settings give another."""
    wanted = settings.input or teacher.input.settings
    return NamedConfig(
        architecture=name,
        num_classes=teacher.num_classes,
        channels=wanted.channels,
        input=wanted,
        class_names=teacher.class_names,
        stem=default_stem(name, wanted.size, student=True),
    )
