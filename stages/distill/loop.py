"""The training loop: one read, one augmentation, one teacher forward a batch; then every student learns from it."""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from manifests.checked_json import dump_json
from manifests.errors import FactoryError, Interrupted, UsageError
from manifests.storage import Storage
from stages.distill import checkpoint
from stages.distill.batches import Batch, Batches
from stages.distill.losses import paired_layers, teacher_targets
from stages.distill.rows import Ints
from stages.distill.runtime import ALONE, Callbacks, Ranks, autocast
from stages.distill.student import Diverged, Student, lr_factor
from stages.distill.teacher_cache import TeacherCache
from stages.memory import out_of_memory
from stages.models.inputs import InputSpec
from stages.models.teacher import Teacher
from stages.settings import DistillSettings

# Metrics to TensorBoard or Weights & Biases while training: off unless asked for with ``track``.


FOLDER = "tensorboard"


class Tracker(Protocol):
    """Takes the numbers of an epoch."""

    def log(self, student: str, step: int, values: dict[str, float]) -> None:
        """One student's line of metrics.jsonl, flat."""

    def close(self) -> None:
        """Everything is on its way."""


class TensorBoard:
    """Event files in OUT/tensorboard/STUDENT. A resumed run replaces what it does again."""

    def __init__(self, storage: Storage, step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UsageError("loggers: tensorboard needs pip install 'dfkd-factory[tensorboard]'") from None
        if not storage.is_local:
            raise UsageError(f"loggers: tensorboard writes to a local folder only, not {storage.url}")
        self._open = lambda student: SummaryWriter(storage.folder(f"{FOLDER}/{student}"), purge_step=step + 1)
        self._writers: dict[str, Any] = {}

    def log(self, student: str, step: int, values: dict[str, float]) -> None:
        writer = self._writers.setdefault(student, None) or self._open(student)
        self._writers[student] = writer
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


class WandB:
    """One Weights & Biases run for the run folder; names are STUDENT/metric. Resumes the run of the same folder."""

    def __init__(self, storage: Storage, config: dict[str, Any]):
        try:
            import wandb
        except ImportError:
            raise UsageError("loggers: wandb needs pip install 'dfkd-factory[wandb]'") from None
        number = hashlib.sha256(storage.url.encode()).hexdigest()[:16]
        self._run = wandb.init(project="dfkd-factory", name=storage.url, id=number, resume="allow", config=config)

    def log(self, student: str, step: int, values: dict[str, float]) -> None:
        self._run.log({f"{student}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        self._run.finish()


def open_trackers(names: Iterable[str], storage: Storage, config: dict[str, Any], step: int) -> list[Tracker]:
    """Those of ``names``; ``step``: where the run stands. Raises UsageError where one cannot work."""
    trackers: list[Tracker] = []
    for name in names:
        trackers.append(TensorBoard(storage, step) if name == "tensorboard" else WandB(storage, config))
    return trackers


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested numbers under slashed names.

    >>> flat({"epoch": 1, "val": {"agreement": 0.5}})
    {'epoch': 1.0, 'val/agreement': 0.5}
    """
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}/")
        else:
            found[prefix + name] = float(value)
    return found


METRICS = "metrics.jsonl"


@dataclass
class Training:
    """One run: everything that :func:`train` needs, and the clocks that survive a resume.

    Of several ``ranks`` the first one writes, tells and is asked to stop; all do the same steps.
    """

    settings: DistillSettings
    teacher: Teacher
    students: list[Student]
    batches: Batches
    held: Ints
    storage: Storage
    device: torch.device
    callbacks: Callbacks
    look: Callable[[Student], dict[str, Any] | None] | None = None  # at the test data, every eval_every epochs
    teacher_cache: TeacherCache | None = None  # the teacher's, where they were computed before
    ranks: Ranks = ALONE
    trackers: list[Tracker] = field(default_factory=list)
    step: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    _held_answers: Tensor | None = field(default=None, repr=False)

    @property
    def total(self) -> int:
        """Optimiser steps of the whole run."""
        return self.settings.epochs * self.batches.steps

    @property
    def learning(self) -> list[Student]:
        """Students that were not parked."""
        return [student for student in self.students if student.parked is None]


def train(run: Training) -> None:
    """Train from the last checkpoint (or the start) to the end; the same weights come out however often it was stopped.

    Raises Interrupted after a checkpoint where ``should_stop`` says so, FactoryError where every student diverged.
    """
    layers = _pair_layers(run)
    _resume(run)
    if run.ranks.first:
        run.trackers = open_trackers(run.settings.loggers, run.storage, run.settings.model_dump(mode="json"), run.step)
    try:
        _train(run, layers)
    finally:
        for tracker in run.trackers:
            tracker.close()


def _train(run: Training, layers: list[str]) -> None:
    spec = InputSpec(run.students[0].config.input)
    saved = time.monotonic()
    loss = run.settings.loss
    for batch in _timed(run, run.batches.stream(run.step, run.total)):
        epoch = run.step // run.batches.steps
        started = time.monotonic()
        with autocast(run.settings.dtype, run.device):
            targets = (
                run.teacher_cache.targets(batch)
                if run.teacher_cache
                else teacher_targets(run.teacher, batch.x, loss, layers)
            )
        x = spec(batch.x)
        students = run.learning
        reasons = [_learn(run, student, x, batch, targets) for student in students]
        stop = _agree(run, students, reasons, run.callbacks.should_stop())
        run.step += 1
        if run.step % run.batches.steps == 0:
            _end_epoch(run, epoch)
        run.seconds += time.monotonic() - started
        due = time.monotonic() - saved >= run.settings.checkpoint_seconds
        if due or stop or run.step == run.total:
            _checkpoint(run)
            saved = time.monotonic()
        run.callbacks.on_progress(run.step, run.total, f"epoch {epoch + 1}/{run.settings.epochs}")
        if stop and run.step < run.total:
            raise Interrupted(f"interrupted in epoch {epoch + 1} of {run.settings.epochs}; the same command resumes")
        _check_learning(run)
    _check_learning(run)


def _check_learning(run: Training) -> None:
    if not run.learning:
        raise FactoryError("no student is left: " + "; ".join(f"{s.name}: {s.parked}" for s in run.students))


def _pair_layers(run: Training) -> list[str]:
    """Settle every student's Grad-CAM layers; returns the teacher's, the longest list of all."""
    if not run.settings.loss.gradcam:
        return []
    longest: list[str] = []
    for student in run.students:
        teacher_layers, student.layers = paired_layers(run.settings.loss, run.teacher.net, student.net)
        longest = max(longest, teacher_layers, key=len)
    return longest


def _timed(run: Training, batches: Iterator[Batch]) -> Iterator[Batch]:
    """``batches``, with the time spent waiting for them added up."""
    while True:
        started = time.monotonic()
        batch = next(batches, None)
        waited = time.monotonic() - started
        run.waited += waited
        run.seconds += waited
        if batch is None:
            return
        yield batch


def _learn(run: Training, student: Student, x: Tensor, batch: Batch, targets: Any) -> str | None:
    """Why the student cannot go on; None where it learned."""
    try:
        student.learn(x, batch, targets, run.step, run.total)
        return None
    except (Diverged, RuntimeError, MemoryError) as error:
        if not (isinstance(error, Diverged) or out_of_memory(error)):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
    student.optimizer.zero_grad(set_to_none=True)  # memory for the others
    return reason


def _agree(run: Training, students: Sequence[Student], reasons: Sequence[str | None], stop: bool = False) -> bool:
    """Park in every process the students that cannot go on in one; whether any process is to stop."""
    flags = run.ranks.any([stop, *(reason is not None for reason in reasons)])
    for student, reason, failed in zip(students, reasons, flags[1:], strict=True):
        if failed:
            told = run.ranks.share(None if reason is None else reason.encode())
            assert told is not None
            _park(run, student, told.decode())
    return flags[0]


def _park(run: Training, student: Student, reason: str) -> None:
    student.parked = reason
    run.callbacks.on_event("student_parked", student=student.name, step=run.step, reason=reason)
    run.callbacks.on_event("warning", message=f"{student.name} is parked, the others go on: {reason}")


def _end_epoch(run: Training, epoch: int) -> None:
    """Means of the epoch, held-out agreement, best weights so far."""
    spoilt = f"weights are not finite at the end of epoch {epoch + 1}"  # the last step's update is seen by no loss
    _agree(run, run.learning, [None if student.finite else spoilt for student in run.learning])
    share = run.waited / run.seconds if run.seconds else 0.0
    for student in run.learning:
        line: dict[str, Any] = {"epoch": epoch + 1, "step": run.step}
        line["lr"] = run.settings.optimizer.lr * lr_factor(run.settings.optimizer, run.step - 1, run.total)
        line |= student.take_means()
        if len(run.held):
            line["val"] = validate(run, student)
        if run.look and run.ranks.first and run.settings.eval_every and (epoch + 1) % run.settings.eval_every == 0:
            scores = run.look(student)
            line |= {"test_accuracy": scores["accuracy"]} if scores else {}
        student.metrics.append(line | {"seconds": round(run.seconds, 3), "data_wait": round(share, 4)})
        if run.settings.select == "best" and line["val"]["agreement"] >= student.best:
            student.best = line["val"]["agreement"]
            student.best_weights = {name: value.clone() for name, value in student.result.state_dict().items()}
        text = "".join(dump_json(entry) + "\n" for entry in student.metrics)
        _write(run, f"{student.name}/{METRICS}", text.encode())
        for tracker in run.trackers:
            tracker.log(student.name, run.step, flat(student.metrics[-1]))
    run.callbacks.on_event("epoch_done", epoch=epoch + 1, students={s.name: s.metrics[-1] for s in run.learning})


@torch.no_grad()
def validate(run: Training, student: Student) -> dict[str, float]:
    """How far the student's classes match the teacher's and the manifest's on the held-out rows, unaugmented."""
    spec, rows = InputSpec(student.config.input), run.held[run.ranks.part(len(run.held))]
    if run._held_answers is None:
        run._held_answers = _classes(run.teacher.logits(x) for _, x in run.batches.plain(rows))
    found = _classes(student.result(spec(x)) for _, x in run.batches.plain(rows))
    labels = torch.from_numpy(run.batches.rows.label[rows])
    right = torch.stack([(found == run._held_answers).sum(), (found == labels).sum()])
    agreement, accuracy = (run.ranks.add(right).double() / len(run.held)).tolist()
    return {"agreement": agreement, "accuracy": accuracy}


def _classes(logits: Iterable[Tensor]) -> Tensor:
    """The largest logit's class of every row."""
    return torch.cat([torch.zeros(0, dtype=torch.int64), *(some.argmax(1).cpu() for some in logits)])


def _write(run: Training, name: str, data: bytes) -> None:
    if run.ranks.first:
        run.storage.write(name, data)


def _checkpoint(run: Training) -> None:
    if not run.ranks.first:
        return
    students = {student.name: student.state() for student in run.students}
    clocks = {"seconds": run.seconds, "waited": run.waited}
    checkpoint.save(run.storage, {"step": run.step, **clocks, "students": students})


def _resume(run: Training) -> None:
    data = run.ranks.share(checkpoint.read(run.storage) if run.ranks.first else None)
    if data is None:
        return
    state = checkpoint.parse(data, run.storage, run.device)
    try:
        run.step, run.seconds, run.waited = state["step"], state["seconds"], state["waited"]
        for student in run.students:
            student.load(state["students"][student.name])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise checkpoint.damaged(run.storage, error) from None
    run.callbacks.on_event("run_resumed", step=run.step, epoch=run.step // run.batches.steps + 1)
