"""The training loop of stage 2: one read, one augmentation and one teacher forward pass serve every student."""

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from manifests.checked_json import dump_json
from manifests.errors import FactoryError, Interrupted
from manifests.storage import Storage
from stages.distill import checkpoint
from stages.distill.batches import Batches
from stages.distill.evaluate import Scores, evaluate_net
from stages.distill.losses import paired_layers, teacher_targets
from stages.distill.rows import EpochOrder, Ints, Rows
from stages.distill.runtime import Callbacks, Ranks, autocast
from stages.distill.student import Diverged, Student, lr_factor
from stages.distill.teacher_cache import TeacherCache
from stages.models.inputs import InputSpec
from stages.models.teacher import Teacher
from stages.progress import loggers
from stages.settings import DistillSettings

METRICS = "metrics.jsonl"


@dataclass
class Prepared:
    """What a run trains, on what, and what decides its result (``spec``, for run.json): read and checked, nothing
    written yet. ``train_rows`` and ``val_rows``: numbers of the ``rows`` to train on and held out."""

    settings: DistillSettings
    teacher: Teacher
    rows: Rows
    train_rows: Ints
    val_rows: Ints
    order: EpochOrder
    students: list[Student]
    spec: dict[str, Any]
    device: torch.device
    ranks: Ranks


@dataclass
class Training(Prepared):
    """A run under way, and its clocks, which survive a resume.

    Of several ``ranks`` the first one writes files, sends events and may be asked to stop; all do the same steps.
    """

    storage: Storage
    callbacks: Callbacks
    batches: Batches
    test_data: str | None = None
    teacher_cache: TeacherCache | None = None
    step: int = 0
    seconds: float = 0.0
    waited: float = 0.0  # part of the seconds: no batch was ready
    unscored: dict[str, str] = field(default_factory=dict)  # why a student has no score on the test data, by name

    @property
    def active(self) -> list[Student]:
        """Students that were not parked."""
        return [student for student in self.students if student.parked is None]

    @property
    def title(self) -> str:
        """The run's name for people: its students and the start of its dataset's fingerprint."""
        names = ", ".join(student.name for student in self.students)
        return f"distill {names} on {self.spec['manifests'][0]['fingerprint'][:8]}"

    @property
    def data_wait(self) -> float:
        """Share of the time spent waiting for a batch."""
        return self.waited / self.seconds if self.seconds else 0.0

    @cached_property
    def val_teacher_classes(self) -> Tensor:
        """The teacher's :meth:`classes`."""
        return self.classes(self.teacher.logits)

    def classes(self, logits: Callable[[Tensor], Tensor]) -> Tensor:
        """The largest of ``logits`` for images in [−1, 1], of this process's part of the validation rows."""
        rows = self.val_rows[self.ranks.part(len(self.val_rows))]
        predicted = [logits(x).argmax(1).cpu() for _, x in self.batches.plain(rows)]
        return torch.cat([torch.zeros(0, dtype=torch.int64), *predicted])


def train(run: Training) -> None:
    """Train every student from the last checkpoint (or the start) to the last step.

    The weights do not depend on where the run was stopped and resumed. Raises Interrupted after a checkpoint if
    ``should_stop()``, FactoryError once every student diverged.
    """
    settings, ranks, callbacks = run.settings, run.ranks, run.callbacks
    steps = run.batches.steps
    total = settings.total_steps(steps)
    epochs = -(-total // steps)
    teacher_layers = pair_layers(run)
    resume(run)
    student_input = InputSpec(run.students[0].config.input)
    saved = time.monotonic()
    names, config = settings.loggers if ranks.first else (), settings.model_dump(mode="json")
    with (
        loggers(names, run.storage, run.title, config, run.step) as log,
        closing(run.batches.stream(run.step, total)) as batches,
    ):
        while run.step < total:
            check_active(run)
            started = time.monotonic()
            batch, epoch = next(batches), run.step // steps + 1
            run.waited += time.monotonic() - started

            # the teacher's targets, once for all students
            with autocast(settings.dtype, run.device):
                if run.teacher_cache:
                    targets = run.teacher_cache.targets(batch)
                else:
                    targets = teacher_targets(run.teacher, batch.x, settings.loss, teacher_layers)

            # one step of every student; those that diverge are parked, the others go on
            x = student_input(batch.x)
            for student in run.active:
                try:
                    student.learn(x, batch, targets, run.step, total)
                except Diverged as error:
                    park(run, student, str(error))
            stop = ranks.any([callbacks.should_stop()])[0]
            run.step += 1
            run.seconds += time.monotonic() - started

            # the end of an epoch: metrics, validation, the best weights so far
            if run.step % steps == 0 or run.step == total:
                started = time.monotonic()
                for student in run.active:
                    if not student.finite:  # no loss has seen the last update
                        park(run, student, f"weights are not finite at the end of epoch {epoch}")
                for student in run.active:
                    lr = settings.optimizer.lr * lr_factor(settings.optimizer, run.step - 1, total)
                    line: dict[str, float] = {"epoch": epoch, "step": run.step, "lr": lr, **student.take_means()}
                    if len(run.val_rows):
                        line |= validate(run, student)
                    if ranks.first and settings.eval_every and epoch % settings.eval_every == 0:
                        scores = test_scores(run, student)
                        line |= {"test_accuracy": scores.accuracy} if scores else {}
                    line |= {"seconds": round(run.seconds, 3), "data_wait": round(run.data_wait, 4)}
                    student.metrics.append(line)
                    if settings.select == "best":
                        student.keep_best(line["val_agreement"])
                    if ranks.first:
                        text = "".join(dump_json(each) + "\n" for each in student.metrics)
                        run.storage.write(f"{student.name}/{METRICS}", text.encode())
                    log(student.name, run.step, line)
                callbacks.on_event("epoch_done", epoch=epoch, students={s.name: s.metrics[-1] for s in run.active})
                run.seconds += time.monotonic() - started

            if stop or run.step == total or time.monotonic() - saved >= settings.checkpoint_seconds:
                if ranks.first:
                    save(run)
                saved = time.monotonic()
            callbacks.on_progress(run.step, total, progress_note(run, f"epoch {epoch}/{epochs}"))
            if stop and run.step < total:
                raise Interrupted(f"interrupted in epoch {epoch} of {epochs}; the same command resumes")
        check_active(run)


def progress_note(run: Training, epoch: str) -> str:
    """The epoch, every student's loss so far in it (right after its end: over it) and last agreement with the teacher
    on validation images, and the share of the time spent waiting for data."""
    parts = [epoch]
    for student in run.active:
        last = student.metrics[-1] if student.metrics else {}
        loss = student.sums["loss"] / student.sums["images"] if student.sums else last.get("loss")
        agreement = last.get("val_agreement")
        parts.append(
            f"{student.name} loss {loss:.3g}" + ("" if agreement is None else f" agreement {agreement:.1%}")
            if loss is not None
            else student.name
        )
    parts += [f"{student.name} parked" for student in run.students if student.parked is not None]
    return ", ".join([*parts, f"data wait {run.data_wait:.0%}"])


def pair_layers(run: Training) -> list[str]:
    """Set every student's Grad-CAM layers; returns the teacher's, the longest list of all."""
    longest: list[str] = []
    for student in run.students if run.settings.loss.gradcam else []:
        teacher_layers, student.layers = paired_layers(run.settings.loss, run.teacher.net, student.net)
        longest = max(longest, teacher_layers, key=len)
    return longest


def check_active(run: Training) -> None:
    if not run.active:
        raise FactoryError("no student is left: " + "; ".join(f"{s.name}: {s.parked}" for s in run.students))


def park(run: Training, student: Student, reason: str) -> None:
    """Let ``student`` take no further part. Losses and weights are the same in all processes, and so is this."""
    student.optimizer.zero_grad(set_to_none=True)  # memory for the others
    student.parked = reason
    run.callbacks.on_event("student_parked", student=student.name, step=run.step, reason=reason)
    run.callbacks.warn(f"{student.name} is parked, the others go on: {reason}")


@torch.no_grad()
def validate(run: Training, student: Student) -> dict[str, float]:
    """On the validation rows, unaugmented: ``val_agreement``, the share where student and teacher predict the same
    class, and ``val_accuracy``, the share where the student predicts the manifest's label."""
    spec = InputSpec(student.config.input)
    predicted = run.classes(lambda x: student.result(spec(x)))
    labels = torch.from_numpy(run.batches.rows.label[run.val_rows[run.ranks.part(len(run.val_rows))]])
    same = torch.stack([(predicted == run.val_teacher_classes).sum(), (predicted == labels).sum()])
    agreement, accuracy = (run.ranks.add(same).double() / len(run.val_rows)).tolist()
    return {"val_agreement": agreement, "val_accuracy": accuracy}


def test_scores(run: Training, student: Student) -> Scores | None:
    """On the test data, if there are any; None, with a warning, if they give no score: that loses no student."""
    run.unscored.pop(student.name, None)
    try:
        return evaluate_net(student.result, student.config, run.test_data, run.teacher) if run.test_data else None
    except FactoryError as error:  # the store that fails, too
        run.unscored[student.name] = str(error)
        run.callbacks.warn(f"{student.name} has no score on the test data: {error}")
        return None


def save(run: Training) -> None:
    """Replace the checkpoint."""
    students = {student.name: student.state() for student in run.students}
    state = {"step": run.step, "seconds": run.seconds, "waited": run.waited, "students": students}
    checkpoint.save(run.storage, state)


def resume(run: Training) -> None:
    """Go on from the checkpoint, if there is one: all processes from the first one's. Raises DataError if damaged."""
    written = run.ranks.first and run.storage.exists(checkpoint.STATE)
    data = run.ranks.share(run.storage.read(checkpoint.STATE, most=None) if written else None)
    if data is None:
        return
    state = checkpoint.parse(data, run.storage, run.device)
    with checkpoint.damage_reported(run.storage, checkpoint.STATE, checkpoint.REMEDY):
        run.step, run.seconds, run.waited = state["step"], state["seconds"], state["waited"]
        for student in run.students:
            student.load(state["students"][student.name])
    run.callbacks.on_event("run_resumed", step=run.step, epoch=run.step // run.batches.steps + 1)
