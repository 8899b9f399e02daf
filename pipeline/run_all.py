"""``factory run all``: a recipe's two stages, one after the other, into one folder.

OUT/           a run folder of stage 1, exactly as ``factory run synth`` makes it
OUT/distill/   its students; for a remote OUT they go where ``factory run distill`` puts them, on this machine
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from manifests.errors import UsageError
from manifests.reader import Manifest
from manifests.storage import Storage
from pipeline.distill import default_out, result_lines, run_distill, teacher_for
from pipeline.executors.settings import ExecutorSettings, executor
from pipeline.outputs import STUDENTS
from pipeline.recipe import Recipe
from pipeline.synth import SynthEstimate, SynthResult, run_synth
from pipeline.synth import dry_run as synth_dry_run
from pipeline.terminal import flop, pairs, say
from stages.settings import SynthSettings

if TYPE_CHECKING:
    from stages.cost import DistillCost
    from stages.distill.results import DistillResult


@dataclass(frozen=True)
class AllResult:
    """What both stages returned, and where the students are."""

    synth: SynthResult
    distill: "DistillResult"
    students_folder: str

    def lines(self) -> Iterator[str]:
        yield from self.synth.lines()
        yield from result_lines(self.distill)

    def to_dict(self) -> dict[str, Any]:
        return {"synth": asdict(self.synth), "distill": self.distill.to_dict(), "students_folder": self.students_folder}


def run_all(
    recipe: Recipe,
    out: str,
    place: ExecutorSettings | None = None,
    *,
    workers: int = 1,
    test_data: str | None = None,
    quiet: bool = False,
) -> AllResult:
    """Make the dataset of ``recipe`` in ``out`` and train its students; the same call resumes either stage.

    What stage 2 needs (students, test data) is checked before stage 1 begins. Raises as the two stages do, and
    FactoryError where no image was kept.
    """
    place = place or executor(workers=workers)
    check(recipe, test_data)
    dataset = run_synth(recipe, out, place, quiet=quiet)
    manifest = Manifest.open(dataset.manifest)
    folder = students_folder(manifest, recipe)
    result = run_distill(
        recipe,
        [dataset.manifest],
        folder,
        teacher=teacher_for(manifest, recipe),
        test_data=test_data,
        place=place,
        quiet=quiet,
    )
    return AllResult(dataset, result, folder)


def students_folder(manifest: Manifest, recipe: Recipe) -> str:
    """Beside the dataset where that is local; checkpoints are rewritten often."""
    run = manifest.storage
    return run.path(STUDENTS) if run.is_local else default_out(manifest, recipe)


def check(recipe: Recipe, test_data: str | None) -> "DistillCost | None":
    """Raises UsageError or DataError now, not after stage 1, for students and test data that cannot be. Returns the
    counted cost of the training, None where the teacher is a black box."""
    from stages.cost import distill_cost
    from stages.distill.evaluate import check_data
    from stages.models.loading import untrained_teacher
    from stages.synth.inputs import inspect_inputs

    inputs = inspect_inputs(recipe.synth)
    if test_data:
        check_data(test_data, inputs.class_names)
    if (shape := untrained_teacher(inputs.sources["teacher"])) is None:
        return None
    settings, images = recipe.distill, image_count(recipe.synth)
    kept = images - math.floor(images * settings.val_fraction)
    views = kept * settings.total_steps(per_epoch := math.ceil(kept / settings.batch_size)) // per_epoch
    answers = images * settings.augment.num_views if settings.teacher_cache.enabled else views
    return distill_cost(settings, shape, inputs.image_size, views, answers)


@dataclass(frozen=True)
class AllEstimate:
    """What ``run_all`` would do; ``training``: its counted cost if every image is kept."""

    synth: SynthEstimate
    students: tuple[str, ...]
    length: str
    training: "DistillCost | None"

    def lines(self) -> Iterator[str]:
        yield from self.synth.lines()
        work = flop(self.training.flop) if self.training else None
        run = Storage(self.synth.out)
        folder = run.path(STUDENTS) if run.is_local else f"runs/RECIPE-FINGERPRINT/{STUDENTS}, on this machine"
        yield from pairs(
            16,
            ("students", f"{', '.join(self.students)}, {self.length}, in {folder}"),
            ("training", f"{work} if every image is kept (counted)" if work else None),
        )

    def to_dict(self) -> Mapping[str, Any]:
        return asdict(self)


def dry_run(
    recipe: Recipe, out: str, test_data: str | None = None, workers: int = 1, price: float | None = None
) -> AllEstimate:
    """What ``run_all`` would do; writes nothing."""
    estimate = synth_dry_run(recipe, out, workers, price)
    training = None if estimate.unknown else check(recipe, test_data)
    return AllEstimate(estimate, recipe.distill.students, recipe.distill.length, training)


def image_count(synth: SynthSettings) -> int:
    """Images that stage 1 makes, kept or not."""
    return synth.shards * synth.images_per_shard


def with_images(recipe: Recipe, images: int | None) -> Recipe:
    """``recipe`` with the shards that hold ``images``, rounded up to whole ones, which a line then says. The size of a
    shard belongs to the plan, so it stays, and a larger number later only adds."""
    if images is None:
        return recipe
    if images < 1:
        raise UsageError(f"--images {images}: expected 1 or more")
    per_shard = recipe.synth.images_per_shard
    shards = -(-images // per_shard)
    if shards * per_shard != images:
        parts = f"{recipe.synth.groups_per_shard} groups of {recipe.synth.group_size}"
        each = recipe.synth.images_per_trajectory
        say(
            f"--images {images}: a shard holds {per_shard} ({parts}{f', {each} images each' if each > 1 else ''}), so "
            f"{shards * per_shard} are made; synth.groups_per_shard and group_size change that"
        )
    return recipe.changed(f"synth.shards={shards}")
