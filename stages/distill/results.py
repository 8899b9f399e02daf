"""What a run of stage 2 returns, ``results.json``, and the test scores in it, which a later command keeps."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pydantic import Field

from manifests.checked_json import load_as, load_checked
from manifests.errors import DataError
from manifests.storage import Storage
from stages.distill.checkpoint import damage_reported
from stages.distill.evaluate import Scores
from stages.distill.runtime import Callbacks
from stages.distill.teacher_check import TeacherCheck

RESULTS = "results.json"
"""Sealed: a score that is kept must be the one that was measured."""
MAX_BYTES = 256 << 20
"""Of results that are read again; a confusion matrix of 1000 classes takes some 10 MB."""


@dataclass(frozen=True)
class StudentResult:
    """One student: its folder, its scores and its size.

    ``images``, ``val_images``: images trained on and held out; ``last_epoch``: the last line of its metrics.jsonl.
    ``val_agreement``: share of the validation images where student and teacher predict the same class, of the weights
    that were kept; ``val_accuracy``: share where the student predicts the label (both None without validation images).
    ``test``: scores on the test data. ``mflop``: per image, two per multiply-add; ``latency_ms``: of one image,
    median; ``bytes``, ``weights_sha256``: of model.safetensors.
    """

    folder: str
    images: int
    val_images: int
    device: str
    last_epoch: dict[str, float]
    val_agreement: float | None
    val_accuracy: float | None
    test: Scores | None
    parameters: int
    mflop: float
    latency_ms: float
    bytes: int
    weights_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class DistillResult:
    """A finished run: its students by name, those that diverged (``parked``: why), and how the teacher fit the data.

    ``teacher``: its architecture and sha256; ``seconds``: of training, over all commands that it took; ``data_wait``:
    share of them without a batch at hand.
    """

    out: str
    teacher: dict[str, str]
    teacher_check: TeacherCheck
    images: int
    val_images: int
    workers: int
    seconds: float
    data_wait: float
    students: dict[str, StudentResult]
    parked: dict[str, str]

    @property
    def teacher_accuracy(self) -> float | None:
        """The teacher's accuracy on the test data; None where none was scored."""
        scores = [student.test.teacher_accuracy for student in self.students.values() if student.test]
        return scores[-1] if scores else None

    def to_dict(self) -> dict[str, Any]:
        """As results.json holds it, with ``teacher_accuracy`` where there is one."""
        accuracy = self.teacher_accuracy
        return asdict(self) | ({} if accuracy is None else {"teacher_accuracy": accuracy})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DistillResult":
        """The inverse of :meth:`to_dict`. Raises ValueError for anything else."""
        return load_as(cls, values)


def previous_results(storage: Storage, measured_again: bool = False) -> dict[str, StudentResult]:
    """The students as an earlier command left them, by name; their test scores are of interest.

    Raises DataError if they cannot be read and are not ``measured_again``: the scores would be lost.
    """
    size = storage.size(RESULTS)
    if size is None:
        return {}
    try:
        with damage_reported(storage, RESULTS, "measure its test scores again with --test-data, or delete it"):
            if size > MAX_BYTES:
                raise ValueError(f"{size} bytes")
            students = DistillResult.from_dict(load_checked(storage.read(RESULTS))).students
            if any(student.test and student.test.teacher_accuracy is None for student in students.values()):
                raise ValueError("a test score is not compared with the teacher's")
            return students
    except DataError:
        if measured_again:
            return {}
        raise


def keep_score(name: str, weights: str, before: Mapping[str, StudentResult], callbacks: Callbacks) -> Scores | None:
    """The score that ``weights`` (sha256) of student ``name`` got before; None, with a warning, where others did."""
    student = before.get(name)
    if student is None or student.test is None:
        return None
    test = student.test
    of = f"{test.accuracy:.1%} on {test.images} images of {test.data.path}"
    if student.weights_sha256 != weights:
        callbacks.warn(f"{name}: its weights changed since its test score: {of} is left out")
        return None
    callbacks.note(f"{name}: its test score was measured before and is kept: {of}")
    return test
