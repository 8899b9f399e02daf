"""The demo: what guidance is worth at equal images, measured on real digits that neither stage has seen.

``factory demo`` makes a guided and an unguided dataset from one recipe (unguided: method ``dmkd``, the same prior,
seeds and number of images), distills one student from each, and prints teacher and students side by side.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from manifests.errors import FactoryError
from manifests.local import temporary_name
from manifests.reader import Manifest
from manifests.storage import Storage
from pipeline.distill import run_distill, trained
from pipeline.executors.settings import executor
from pipeline.inspect import contact_sheet, hstack, png, samples
from pipeline.plan import local_folder
from pipeline.recipe import Recipe, resolve
from pipeline.synth import run_synth
from pipeline.terminal import duration, say, share, table
from stages.settings import student_name

if TYPE_CHECKING:
    from stages.distill.evaluate import Scores

MINUTES = 2
UNGUIDED = (
    "synth.method=dmkd",
    "synth.guidance.adversarial=0",
    "synth.lca.every=0",
    "synth.adversary=null",
    "distill.min_agreement=0",
)
"""The same prior, seeds and number of images; nothing that method dmkd would refuse as unused, or warn about."""
PICTURE = "guidance.png"
TEST = "test-digits.parquet"
PICTURES_PER_CLASS = 6


@dataclass(frozen=True)
class DemoResult:
    """Accuracies on the real test digits, the number of images behind each student, and where things are."""

    out: str
    teacher: float
    guided: float
    unguided: float
    images: int
    images_unguided: int
    picture: str
    student: str
    seconds: float

    def lines(self) -> Iterator[str]:
        yield ""
        yield from table(
            (36, 8, 9),
            ("accuracy on real digits", "images", "test"),
            ("teacher (the real training digits)", "", share(self.teacher)),
            ("student, guided synthesis", self.images, share(self.guided)),
            ("student, unguided synthesis", self.images_unguided, share(self.unguided)),
        )
        yield ""
        yield f"pictures: {self.picture} (unguided beside guided)"
        yield f"student:  {self.student}"
        yield f"took {duration(self.seconds)}"


def run_demo(out: str, sets: Sequence[str] = (), workers: int = 1, retry_failed: bool = False) -> DemoResult:
    """Run everything into ``out``, resuming what is there.

    Raises UsageError, before anything runs, for an ``out`` that is no local folder and for ``workers`` below 1,
    FactoryError where a student was parked or could not be scored.
    """
    guided = resolve("demo", sets=sets)
    place = executor(workers=workers, retry_failed=retry_failed)
    root = local_folder(out, "the demo needs a local folder, since the real digits lie there")
    say(f"about {MINUTES} minutes on two CPU cores: guided and unguided images, then a student from each")
    started = time.monotonic()
    recipes, datasets = {"guided": guided, "unguided": guided.changed(*UNGUIDED)}, {}
    for name, recipe in recipes.items():
        datasets[name] = run_synth(recipe, root.folder(name), place, title=f"{name} images")
    root.write(PICTURE, picture(datasets["unguided"].run, datasets["guided"].run))
    test = _test_digits(root)
    students = {
        name: _student(recipe, datasets[name].manifest, root.folder(f"{name}/distill"), test, f"{name} student")
        for name, recipe in recipes.items()
    }
    (student, guided_scores), (_, unguided_scores) = students["guided"], students["unguided"]
    assert guided_scores.teacher_accuracy is not None  # scored beside the teacher
    return DemoResult(
        out=root.url,
        teacher=guided_scores.teacher_accuracy,
        guided=guided_scores.accuracy,
        unguided=unguided_scores.accuracy,
        images=datasets["guided"].kept,
        images_unguided=datasets["unguided"].kept,
        picture=root.path(PICTURE),
        student=student,
        seconds=round(time.monotonic() - started, 1),
    )


def _student(recipe: Recipe, manifest: str, out: str, test: str, title: str) -> tuple[str, "Scores"]:
    """Folder and scores of the student trained on ``manifest``."""
    result = run_distill(recipe, [manifest], out, test_data=test, title=title)
    student = trained(result, student_name(recipe.distill.students[0]), title)
    if student.test is None:  # a warning said why
        raise FactoryError(f"the {title} has no score on the test digits")
    return student.folder, student.test


def picture(unguided: str, guided: str) -> bytes:
    """Samples of both datasets, the same classes in the same rows, as PNG bytes."""
    panels = []
    for title, folder in (("unguided", unguided), ("guided", guided)):
        panels.append((title, contact_sheet(samples(Manifest.open(folder), columns=PICTURES_PER_CLASS))))
    return png(hstack(panels))


def _test_digits(root: Storage) -> str:
    """The real digits that score the students; written here, read by nothing before the very end."""
    from stages.digits import write_split

    root.put_file(write_split("test", root.scratch() / temporary_name("write")), TEST)
    return root.path(TEST)
