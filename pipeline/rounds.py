"""Rounds: synthesis and distillation in turn, each later round's images steered away from what the student knows.

Round r > 1 takes the student of round r − 1 as frozen adversary (DiffDFKD, equation 8);
that student learned from the images of all rounds before it.

OUT/round-001/           a run folder of stage 1, with its own plan
OUT/round-001/distill/   the students trained on the manifests of rounds 1 to this one
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from manifests.errors import UsageError
from manifests.reader import Manifest
from manifests.storage import Storage
from pipeline import synth
from pipeline.distill import run_distill, teacher_for, trained
from pipeline.executors.settings import ExecutorSettings
from pipeline.plan import local_folder
from pipeline.recipe import Recipe, RoundsSettings
from pipeline.synth import SynthResult, run_synth
from pipeline.terminal import duration, share, table
from stages.models.folders import WEIGHTS
from stages.models.source import buildable_from_file, resolve
from stages.settings import MAX_SEED, UNSTEERED, ModelSettings, SynthSettings, student_name

if TYPE_CHECKING:
    from stages.distill.results import DistillResult

SEED_STRIDE = 1_000_003
"""Between the seeds of two rounds: each starts from new noise, and runs with seeds 0, 1, 2 … never share any."""


@dataclass(frozen=True)
class RoundResult:
    """``val_agreement``: the student's with the teacher, on images held out of all rounds; ``adversary``: the student
    that this round was steered by."""

    round: int
    adversary: str | None
    images: int
    kept: int
    teacher_label_agreement: float
    student: str
    val_agreement: float | None
    accuracy: float | None


@dataclass(frozen=True)
class RoundsResult:
    """``student``: the folder of the last round's."""

    out: str
    rounds: list[RoundResult]
    student: str
    manifests: list[str]
    seconds: float

    def lines(self) -> Iterator[str]:
        yield from table(
            (8, 8, 8, 9, 11, 8),
            ("round", "images", "kept", "steered", "agreement", "test"),
            *(
                (r.round, r.images, r.kept, "yes" if r.adversary else "no", share(r.val_agreement), share(r.accuracy))
                for r in self.rounds
            ),
        )
        yield f"student: {self.student}, {duration(self.seconds)}"


def run_rounds(
    recipe: Recipe,
    out: str,
    place: ExecutorSettings | None = None,
    *,
    workers: int = 1,
    test_data: str | None = None,
    quiet: bool = False,
) -> RoundsResult:
    """Run ``recipe.rounds.count`` rounds into ``out``; the same call resumes, a larger count adds.

    Raises UsageError for a recipe that cannot be steered, FactoryError where a round's student diverged, otherwise as
    the two stages do; a folder made with other settings is refused by its plan.
    """
    check(recipe, out)
    if test_data:
        from stages.distill.evaluate import check_data

        check_data(test_data, resolve(recipe.synth.teacher).config.class_names)  # now, not after the first round
    root, started = Storage(out), time.monotonic()
    sources: list[tuple[str, float]] = []
    adversary: str | None = None
    reports = []
    for number in range(1, recipe.rounds.count + 1):
        folder = root.folder(round_name(number))
        frozen = adversary_settings(recipe.distill.students[0], adversary) if adversary else None
        current = recipe.model_copy(update={"synth": round_settings(recipe, number, frozen)})
        dataset = run_synth(current, folder, place, workers=workers, title=f"round {number} images", quiet=quiet)
        sources.append((dataset.manifest, 1.0))
        result = run_distill(
            current,
            sources,
            root.folder(f"{round_name(number)}/distill"),
            teacher=teacher_for(Manifest.open(dataset.manifest), recipe),
            test_data=test_data,
            title=f"round {number} student",
            quiet=quiet,
        )
        reports.append(round_result(number, dataset, result, adversary, student_name(recipe.distill.students[0])))
        adversary = reports[-1].student
    return RoundsResult(
        out=root.url,
        rounds=reports,
        student=reports[-1].student,
        manifests=[url for url, _ in sources],
        seconds=round(time.monotonic() - started, 3),
    )


def check(recipe: Recipe, out: str) -> None:
    """Raises UsageError where rounds make no sense."""
    if recipe.synth.method in UNSTEERED:
        raise UsageError(f"method {recipe.synth.method} follows no adversary, so rounds would repeat: use diffdfkd")
    if recipe.synth.adversary is not None:
        raise UsageError("rounds choose their adversary themselves: leave synth.adversary and guidance.adversarial out")
    if recipe.synth.seed > (most := MAX_SEED - SEED_STRIDE * (recipe.rounds.count - 1)):
        raise UsageError(f"synth.seed {recipe.synth.seed} leaves later rounds no seeds: use at most {most}")
    local_folder(out, "rounds need a local folder, since each reads the student of the one before")


def round_name(number: int) -> str:
    """``round-001``."""
    return f"round-{number:03d}"


def adversary_settings(architecture: str, folder: str) -> ModelSettings:
    """The student in ``folder``; what no file may name is named here, as the recipe does."""
    if buildable_from_file(architecture):
        return ModelSettings(name=folder)
    config = resolve(ModelSettings(name=folder)).config
    known = {key: getattr(config, key) for key in ("input", "num_classes", "class_names", "stem")}
    return ModelSettings(name=architecture, weights=f"{folder}/{WEIGHTS}", **known)


def round_settings(recipe: Recipe, number: int, adversary: ModelSettings | None) -> SynthSettings:
    """Stage 1 of round ``number`` (from 1): new noise, and steered by the ``adversary``."""
    values = recipe.synth.model_dump()
    values["seed"] += SEED_STRIDE * (number - 1)
    if adversary is not None:
        values["adversary"] = adversary.model_dump()
        values["guidance"]["adversarial"] = recipe.rounds.adversarial
    return SynthSettings.model_validate(values)


def round_result(
    number: int, dataset: SynthResult, result: "DistillResult", adversary: str | None, name: str
) -> RoundResult:
    """What came of a round. Raises FactoryError where its student diverged, since the next one would need it."""
    student = trained(result, name, f"round {number}")
    return RoundResult(
        round=number,
        adversary=adversary,
        images=dataset.rows,
        kept=dataset.kept,
        teacher_label_agreement=result.teacher_check.teacher_label_agreement,
        student=student.folder,
        val_agreement=student.val_agreement,
        accuracy=student.test.accuracy if student.test else None,
    )


def dry_run(recipe: Recipe, out: str, workers: int = 1) -> synth.SynthEstimate:
    """What the first round would do, for the others are like it; writes nothing."""
    check(recipe, out)
    return synth.dry_run(recipe, Storage(out).folder(round_name(1)), workers)


def rounds_line(rounds: RoundsSettings) -> str:
    """How often, for people, below what the first round would do."""
    count = f"{rounds.count} like this one, a student after each; from the second on steered by the last student"
    return f"{'rounds':<16}{count}, weight {rounds.adversarial:g}"
