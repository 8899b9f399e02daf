"""The demo: what guidance is worth at equal images, measured on real digits that neither stage has seen.

``factory demo`` makes a guided and an unguided dataset from one recipe (unguided: method ``dmkd``, the same prior,
seeds and number of images), distills one student from each, and prints teacher and students side by side.
``factory demo --photos`` does so with photographs, in a clone of the repository, which holds no real ones to test on.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manifests.errors import FactoryError, UsageError
from manifests.local import temporary_name
from manifests.reader import Manifest
from manifests.storage import Storage
from pipeline.distill import run_distill, trained
from pipeline.executors.settings import executor
from pipeline.inspect import contact_sheet, hstack, png, samples
from pipeline.plan import local_folder
from pipeline.recipe import Recipe, resolve
from pipeline.synth import SynthResult, run_synth
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
DATASETS = ("guided", "unguided")
"""Folders of the demo's datasets."""
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
    recipes = _recipes(guided)
    datasets = _datasets(recipes, root, place)
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


def _recipes(guided: Recipe) -> dict[str, Recipe]:
    return dict(zip(DATASETS, (guided, guided.changed(*UNGUIDED)), strict=True))


def _datasets(recipes: Mapping[str, Recipe], root: Storage, place: Any) -> dict[str, SynthResult]:
    """The datasets of both methods, and a picture of both."""
    made = {name: run_synth(each, root.folder(name), place, title=f"{name} images") for name, each in recipes.items()}
    root.write(PICTURE, picture(made["unguided"].run, made["guided"].run))
    return made


PHOTOS_MINUTES = 15
PHOTOS = ("synth.shards=4", "synth.group_size=100", "distill.epochs=160")
"""What the demo changes in the recipe ``photos``, to end in time."""
HELD_OUT = ("synth.shards=1", "synth.seed=1")
"""Images that no student learns from."""
CLONE = Path(__file__).resolve().parents[1]
PRIOR, TEACHER = CLONE / "priors" / "natural32", CLONE / "benchmarks" / "cifar10-teacher"


@dataclass(frozen=True)
class PhotosResult:
    """``agreement``: how often a student names the class that the teacher names, on ``held_out`` synthetic images of
    each method, by student and method. ``accuracy``: of teacher and students on real images, where the user has some;
    ``images``: behind each student."""

    out: str
    agreement: dict[str, dict[str, float]]
    held_out: int
    images: dict[str, int]
    accuracy: dict[str, float]
    picture: str
    student: str
    seconds: float

    def lines(self) -> Iterator[str]:
        yield ""
        real = ("on real",) if self.accuracy else ()
        rows: list[tuple[object, ...]] = []
        for name in DATASETS:
            cells = (share(self.agreement[name][other]) for other in DATASETS)
            rows.append((f"student, {name} synthesis", self.images[name], *cells, *self._real(name)))
        if self.accuracy:
            rows.insert(0, ("teacher (the real training images)", "", "", "", *self._real("teacher")))
        heads = ("agreement with the teacher", "images", "on guided", "on unguided", *real)
        yield from table((36, 8, 11, 13, *((9,) if real else ())), heads, *rows)
        yield ""
        yield f"on {self.held_out} synthetic images of each method that no student learned from, from other noise;"
        yield (
            "on real: accuracy on your images"
            if self.accuracy
            else "no accuracy: the repository holds no real photographs. --eval DATA scores on labeled CIFAR-10 images"
        )
        yield "so few photographs and steps do not show what guidance is worth: docs/results.md has 1,500 images"
        yield f"pictures: {self.picture} (unguided beside guided)"
        yield f"student:  {self.student}"
        yield f"took {duration(self.seconds)}"

    def _real(self, name: str) -> tuple[str | None, ...]:
        return (share(self.accuracy.get(name)),) if self.accuracy else ()


def run_photos(
    out: str, sets: Sequence[str] = (), workers: int = 1, retry_failed: bool = False, test_data: str | None = None
) -> PhotosResult:
    """The demo with photographs: ``priors/natural32``, the CIFAR-10 teacher beside it, the recipe ``photos``.

    ``test_data``: labeled CIFAR-10 images, to measure accuracy. Raises UsageError outside a clone of the repository,
    otherwise as :func:`run_demo` does.
    """
    missing = [path for path in (PRIOR, TEACHER) if not path.is_dir()]
    if missing:
        raise UsageError(
            f"--photos needs a clone of the repository: there is no {missing[0]}; the package leaves it out"
        )
    guided = resolve("photos", sets=[f"synth.prior.path={PRIOR}", f"synth.teacher.name={TEACHER}", *PHOTOS, *sets])
    place = executor(workers=workers, retry_failed=retry_failed)
    root = local_folder(out, "the demo needs a local folder")
    from stages.distill.evaluate import check_data, evaluate
    from stages.models.source import resolve as resolve_model

    if test_data:
        check_data(test_data, resolve_model(guided.synth.teacher).config.class_names)  # now, not after the images
    say(f"about {PHOTOS_MINUTES} minutes on two CPU cores: guided and unguided images, then a student from each")
    started = time.monotonic()
    recipes = _recipes(guided)
    datasets = _datasets(recipes, root, place)
    fresh = {
        name: run_synth(each.changed(*HELD_OUT), root.folder(f"held-out/{name}"), place, title=f"{name}, held out")
        for name, each in recipes.items()
    }
    folders, accuracy, agreement = {}, dict[str, float](), dict[str, dict[str, float]]()
    for name, each in recipes.items():
        title, to = f"{name} student", root.folder(f"{name}/distill")
        result = run_distill(each, [datasets[name].manifest], to, test_data=test_data, title=title)
        student = trained(result, student_name(each.distill.students[0]), title)
        folders[name] = student.folder
        if student.test:
            accuracy[name] = student.test.accuracy
            accuracy["teacher"] = student.test.teacher_accuracy or 0.0
        scores = {other: evaluate(student.folder, made.manifest, guided.synth.teacher) for other, made in fresh.items()}
        agreement[name] = {other: found.model_teacher_agreement or 0.0 for other, found in scores.items()}
    return PhotosResult(
        out=root.url,
        agreement=agreement,
        held_out=min(made.kept for made in fresh.values()),
        images={name: made.kept for name, made in datasets.items()},
        accuracy=accuracy,
        picture=root.path(PICTURE),
        student=folders["guided"],
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
