"""Stage 2 from manifests to student folders. Used by ``factory run distill`` and ``factory demo``.

OUT/run.json            what decides the result: settings, manifests, teacher
OUT/checkpoint.pt       state of the run, replaced atomically
OUT/results.json        :class:`DistillResult`, sealed
OUT/teacher-cache/      the teacher's logits, where they are kept
OUT/STUDENT/            model.safetensors, config.json, README.md, metrics.jsonl
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from manifests.checked_json import dump_checked
from manifests.errors import UsageError
from manifests.reader import Manifest
from manifests.storage import Patience, Storage
from stages.distill import checkpoint, export
from stages.distill.batches import Batches, check_parts
from stages.distill.evaluate import check_data
from stages.distill.loop import Prepared, Training, test_scores, train
from stages.distill.losses import paired_layers
from stages.distill.results import RESULTS, DistillResult, StudentResult, keep_score, previous_results
from stages.distill.rows import BY_KEY, EpochOrder, rows_digest, select_rows, split_validation
from stages.distill.runtime import ALONE, Callbacks, OnEvent, OnProgress, Ranks, slow_precision, torch_threads
from stages.distill.streaming import Pixels, Stream
from stages.distill.student import Student
from stages.distill.teacher_cache import open_teacher_cache
from stages.distill.teacher_check import TeacherCheck, check_teacher, find_teacher
from stages.memory import find_device, memory_error_in_a_line
from stages.models.build import adaptation_of
from stages.models.loading import model_files
from stages.models.source import WEIGHTS, NamedConfig, default_stem
from stages.models.teacher import Teacher
from stages.settings import ALGORITHM_VERSION, PLACE, DistillSettings, ModelSettings

__all__ = ["DistillResult", "Prepared", "begin", "prepare", "run_distill", "student_config", "train_students"]

NO_DERIVED = "loss.variants_ce does nothing: no image to train on was made from another, as method dda makes them"
NOT_COMPARED: Any = {**dict.fromkeys((*PLACE, *BY_KEY), True), "teacher_cache": {"folder"}}
"""Settings left out of what a resumed run must share with its beginning; of files of keys the rows are compared."""
IN_MEMORY = memory_error_in_a_line(
    "the training does not fit the memory",
    "free memory and repeat the command, which resumes from the last checkpoint; or train fewer students at a time, or "
    "with a smaller batch_size or dtype: bf16, in another folder",
)


def run_distill(
    settings: DistillSettings,
    manifests: Sequence[tuple[str, float]],
    out: Storage | str,
    teacher: ModelSettings | None = None,
    test_data: str | None = None,
    on_event: OnEvent = lambda kind, **fields: None,
    progress: OnProgress = lambda done, total, note: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> DistillResult:
    """Train every student of ``settings`` on ``manifests`` (URL, weight) and write them below ``out``, in this process.

    The same call resumes, or returns the finished run's results again; without ``test_data`` it keeps the test scores
    that an earlier call measured of the same weights. Students that diverged are ``parked`` in the result. Raises
    DataError where data, teacher and run folder do not fit, UsageError for settings that cannot work, FactoryError
    where every student diverged, Interrupted after a checkpoint once ``should_stop()`` is true.
    """
    storage = out if isinstance(out, Storage) else Storage(out)
    callbacks = Callbacks(on_event, progress, should_stop)
    prepared = prepare(settings, manifests, teacher)
    found = check_data(test_data, prepared.teacher.class_names) if test_data else {}  # now, not after the training
    begin(prepared, storage, on_event)
    for line in found.values():
        callbacks.note(f"test data: {line}")
    result = train_students(prepared, storage, test_data, callbacks)
    assert result is not None
    return result


@IN_MEMORY
def prepare(
    settings: DistillSettings,
    sources: Sequence[tuple[str, float]],
    named_teacher: ModelSettings | None,
    ranks: Ranks = ALONE,
) -> Prepared:
    """Open and check everything; the same in every process of ``ranks``."""
    device = ranks.device or find_device(settings.device)
    manifests = [(Manifest.open(url, skip_bad=settings.skip_bad), weight) for url, weight in sources]
    for manifest, _ in manifests:
        manifest.file.patience = Patience(settings.stall_seconds)
    teacher = find_teacher([manifest for manifest, _ in manifests], named_teacher, settings.allow_other_teacher, device)
    if settings.channels_last:
        teacher.to(memory_format=torch.channels_last)
    rows = select_rows(manifests, settings)
    train_rows, val_rows = split_validation(rows, settings.val_fraction, settings.seed)
    if settings.loss.active == ("variants_ce",) and not rows.derived[train_rows].any():
        raise UsageError(f"loss: nothing to learn from: {NO_DERIVED}; set loss.kd")
    configs = [student_config(name, settings, teacher) for name in settings.students]
    students = [Student(config, settings, device, ranks) for config in configs]
    for student in students if settings.loss.feature else ():
        student.attach_head(teacher)
    by_rows = settings.skip_bad or settings.keys or settings.exclude_keys
    spec = {
        "algorithm": ALGORITHM_VERSION,
        "settings": settings.model_dump(mode="json", exclude=NOT_COMPARED),
        "manifests": [
            {"digest": manifest.digest, "fingerprint": manifest.info.fingerprint, "weight": weight}
            | ({"rows": rows_digest(selection.rows)} if by_rows else {})
            for (manifest, weight), selection in zip(manifests, rows.selections, strict=True)
        ],
        "teacher": {key: teacher.identity[key] for key in ("architecture", "sha256")},
    }
    return Prepared(
        settings=settings, teacher=teacher, rows=rows, train_rows=train_rows, val_rows=val_rows,
        order=EpochOrder(rows, train_rows, settings), spec=spec, device=device, ranks=ranks,
        students=students,
    )  # fmt: skip


def begin(prepared: Prepared, storage: Storage, on_event: OnEvent, workers: int = 1) -> None:
    """Announce the run and claim its folder, once for all ``workers``. Raises as :func:`run_distill` does, also for
    Grad-CAM layers that do not fit."""
    check_parts(prepared.order.length, prepared.settings.batch_size, workers)
    for student in prepared.students if prepared.settings.loss.gradcam else ():
        paired_layers(prepared.settings.loss, prepared.teacher.net, student.net)
    names = [student.name for student in prepared.students]
    for name in names:
        storage.folder(name)  # now, not after the training
    on_event("run_started", students=names, images=len(prepared.train_rows), workers=workers)
    checkpoint.open_run(storage, prepared.spec)


@IN_MEMORY
def train_students(
    prepared: Prepared, storage: Storage, test_data: str | None, callbacks: Callbacks
) -> DistillResult | None:
    """Train on in the claimed folder. All ranks do so together; the first one writes, and alone returns a result."""
    settings, teacher, ranks = prepared.settings, prepared.teacher, prepared.ranks
    before = previous_results(storage, measured_again=bool(test_data)) if ranks.first else {}
    stream = Stream(prepared.rows, settings, callbacks.warn, ranks)
    with torch_threads(settings.threads), stream:
        announce(prepared, test_data, callbacks)
        pixels = Pixels(prepared.rows, settings.memory_gb, prepared.device, stream)
        batches = Batches(prepared.rows, prepared.order, pixels, settings, prepared.device, ranks)
        check = check_teacher(teacher, batches, prepared.train_rows) if ranks.first else None
        if check:
            callbacks.on_event("teacher_checked", **asdict(check))
            for line in check.warnings(settings.min_agreement):
                callbacks.warn(line)
        cache = open_teacher_cache(teacher, batches, storage, callbacks) if settings.teacher_cache.enabled else None

        run = Training(
            **vars(prepared), storage=storage, callbacks=callbacks, batches=batches, test_data=test_data,
            teacher_cache=cache,
        )  # fmt: skip
        train(run)
        return finish(run, check, before) if check else None


def announce(prepared: Prepared, test_data: str | None, callbacks: Callbacks) -> None:
    """What a user should know before the training: adapted networks, images left out, settings that do nothing."""
    settings = prepared.settings
    for student in prepared.students:
        if adapted := adaptation_of(student.net):
            callbacks.note(f"{student.name}: stem fit to {student.config.input.size} px images: {adapted}")
    for bad in filter(None, prepared.rows.bad):
        callbacks.warn(f"{len(bad)} images are left out; the first: {bad[0]}")
    if slow := slow_precision(settings.dtype, prepared.device):
        callbacks.warn(slow)
    if settings.loss.variants_ce and not prepared.rows.derived[prepared.train_rows].any():
        callbacks.warn(NO_DERIVED)
    if settings.eval_every and not test_data:
        callbacks.warn("eval_every does nothing without --test-data")


def finish(run: Training, check: TeacherCheck, before: Mapping[str, StudentResult]) -> DistillResult:
    """Score and write every student, and the results of the run. ``before``: students of an earlier command."""
    students = {}
    for student in run.active:
        kept = student.metrics[-1]
        if run.settings.select == "best":
            student.result.load_state_dict(student.best_weights)
            kept = max(student.metrics, key=lambda line: (line["val_agreement"], line["epoch"]))
        files = model_files(student.result, student.config)
        weights = hashlib.sha256(files[WEIGHTS]).hexdigest()
        facts = StudentResult(
            folder=run.storage.path(student.name),
            images=len(run.train_rows),
            val_images=len(run.val_rows),
            device=str(run.device),
            last_epoch=student.metrics[-1],
            val_agreement=kept.get("val_agreement"),
            val_accuracy=kept.get("val_accuracy"),
            test=test_scores(run, student) or keep_score(student.name, weights, before, run.callbacks),
            **asdict(export.measure(student.result, student.config)),
            bytes=len(files[WEIGHTS]),
            weights_sha256=weights,
        )
        files["README.md"] = export.model_card(student.config, run.settings, run.spec, facts).encode()
        for name, data in files.items():
            run.storage.write(f"{student.name}/{name}", data)
        students[student.name] = facts
    result = DistillResult(
        out=run.storage.url,
        teacher=run.spec["teacher"],
        teacher_check=check,
        images=len(run.train_rows),
        val_images=len(run.val_rows),
        workers=run.ranks.size,
        seconds=run.seconds,
        data_wait=run.data_wait,
        students=students,
        parked={student.name: student.parked for student in run.students if student.parked is not None},
        unscored=run.unscored,
    )
    run.storage.write(RESULTS, dump_checked(result.to_dict()))
    return result


def student_config(name: str, settings: DistillSettings, teacher: Teacher) -> NamedConfig:
    """The student ``name`` with the teacher's classes, and its input unless the settings give another."""
    expected = settings.input or teacher.input.settings
    return NamedConfig(
        architecture=name,
        num_classes=teacher.num_classes,
        channels=expected.channels,
        input=expected,
        class_names=teacher.class_names,
        stem=default_stem(name, expected.size, student=True),
    )
