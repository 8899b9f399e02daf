"""Rounds: synthesis and distillation in turn, each later round's images steered away from what the student knows.

Used by ``factory run rounds``. Round r > 1 takes the student of round r − 1 as frozen adversary (DiffDFKD, equation 8);
that student learned from the images of all rounds before it.

OUT/round-001/           a run folder of stage 1, with its own plan
OUT/round-001/distill/   the students trained on the manifests of rounds 1 to this one
"""

import time
from collections.abc import Iterator
from typing import Any

from manifests.errors import UsageError
from manifests.reader import Manifest
from manifests.storage import Storage
from pipeline import estimate
from pipeline import synth as stage
from pipeline.distill import learnt_by, run_distill
from pipeline.executors.settings import ExecutorSettings
from pipeline.plan import local_folder
from pipeline.recipe import Recipe
from pipeline.terminal import duration, plain
from stages.models.folders import WEIGHTS
from stages.models.source import buildable_from_file, resolve
from stages.settings import MAX_SEED, UNSTEERED, ModelSettings, SynthSettings, student_name

SEED_STRIDE = 1_000_003
"""Between the seeds of two rounds: each starts from new noise, and runs with seeds 0, 1, 2 … never share any."""


def run_rounds(
    recipe: Recipe, out: str, place: ExecutorSettings, *, test_data: str | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Run ``recipe.rounds.count`` rounds into ``out``; the same call resumes, a larger count adds. Returns a report.

    Raises UsageError for a recipe that cannot be steered, otherwise as the two stages do; a folder made with other
    settings is refused by its plan.
    """
    check(recipe, out)
    root, started = Storage(out), time.monotonic()
    sources: list[tuple[str, float]] = []
    adversary: str | None = None
    reports = []
    for number in range(1, recipe.rounds.count + 1):
        folder = root.folder(round_name(number))
        frozen = adversary_settings(recipe.distill.students[0], adversary) if adversary else None
        current = recipe.model_copy(update={"synth": round_settings(recipe, number, frozen)})
        made = stage.run_synth(current, folder, place, title=f"round {number} images", quiet=quiet)
        sources.append((made["manifest"], 1.0))
        carried = Manifest.open(made["manifest"]).info.teacher.get("kind") == "builtin"
        learnt = run_distill(
            current,
            sources,
            root.folder(f"{round_name(number)}/distill"),
            teacher=None if carried else recipe.synth.teacher,
            test_data=test_data,
            title=f"round {number} student",
            quiet=quiet,
        )
        reports.append(round_report(number, made, learnt, adversary, student_name(recipe.distill.students[0])))
        adversary = reports[-1]["student"]
    return {
        "out": root.url,
        "rounds": reports,
        "student": reports[-1]["student"],
        "manifests": [url for url, _ in sources],
        "seconds": round(time.monotonic() - started, 3),
    }


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


def round_report(
    number: int, made: dict[str, Any], learnt: dict[str, Any], adversary: str | None, student: str
) -> dict[str, Any]:
    """What came of a round. Raises FactoryError where its student diverged, since the next one would need it."""
    facts = learnt_by(student, learnt, f"round {number}")
    return {
        "round": number,
        "adversary": adversary,
        "images": made["rows"],
        "kept": made["kept"],
        "teacher_label_agreement": learnt["teacher_check"]["teacher_label_agreement"],
        "student": facts["folder"],
        "val_agreement": facts["val_agreement"],
        "accuracy": facts["test"]["accuracy"] if facts["test"] else None,
    }


def report_lines(result: dict[str, Any]) -> Iterator[str]:
    """The report for people. ``agreement`` is the student's with the teacher, on images held out of all rounds."""
    yield f"{'round':<8}{'images':>8}{'kept':>8}{'steered':>9}{'agreement':>11}{'test':>8}"
    for found in result["rounds"]:
        shares = "".join(
            f"{value:>{width}.1%}" if value is not None else f"{'–':>{width}}"
            for value, width in ((found["val_agreement"], 11), (found["accuracy"], 8))
        )
        steered = "yes" if found["adversary"] else "no"
        yield f"{found['round']:<8}{found['images']:>8}{found['kept']:>8}{steered:>9}{shares}"
    yield f"student: {plain(result['student'])}, {duration(result['seconds'])}"


def dry_run(recipe: Recipe, out: str, place: ExecutorSettings) -> dict[str, Any]:
    """What the first round would do, and how many there are; writes nothing."""
    check(recipe, out)
    first = estimate.dry_run(recipe, Storage(out).folder(round_name(1)), place)
    return first | {"rounds": recipe.rounds.model_dump(mode="json")}


def dry_run_lines(result: dict[str, Any]) -> Iterator[str]:
    """The dry run for people."""
    yield from estimate.dry_run_lines(result)
    rounds = result["rounds"]
    yield (
        f"rounds          {rounds['count']} like this one, a student after each; from the second on steered by the "
        f"last student, weight {rounds['adversarial']:g}"
    )
