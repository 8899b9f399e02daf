"""Stage 1 from recipe to manifest: plan, lease, executor over the missing shards, merge."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

from manifests.dataset import DATASET, DatasetInfo
from manifests.errors import DataError, FactoryError, Interrupted, UsageError
from manifests.merge import MANIFEST, merge
from manifests.reader import Manifest
from manifests.storage import Storage
from pipeline.events import EventLog, Loud
from pipeline.executors.driver import execute
from pipeline.executors.pool import WorkerSpec
from pipeline.executors.settings import ExecutorSettings, executor
from pipeline.lease import Lease
from pipeline.plan import Plan, TeacherCopy, make_plan, open_or_create, prepare, publish, resume_plan, withdraw
from pipeline.recipe import Recipe
from pipeline.terminal import duration, progress, say, size
from stages.synth.inputs import SynthInputs, inspect_inputs, pinned_models

WORKER, NOISE_WORKER = "stages.synth.worker:ShardWorker", "stages.synth.noise:NoiseWorker"


@dataclass(frozen=True)
class SynthResult:
    """A finished dataset: its folder (or URL) ``run``, and its ``manifest``, which stage 2 and :class:`Manifest` open.

    ``rows``: images, of which ``kept`` pass the teacher's judgement; ``bytes``: of all tars; ``seconds``: of this call.
    """

    run: str
    manifest: str
    fingerprint: str
    shards: int
    rows: int
    kept: int
    bytes: int
    seconds: float

    def lines(self) -> Iterator[str]:
        yield (
            f"{self.rows} images ({self.kept} kept) in {self.shards} shards, {size(self.bytes)}, "
            f"{duration(self.seconds)}"
        )
        yield f"manifest: {self.manifest}"
        if not self.kept:
            yield "no image was kept: factory inspect counts the reasons, factory rescore --threshold judges again"


def run_synth(
    recipe: Recipe,
    out: str,
    place: ExecutorSettings | None = None,
    *,
    shards: int | None = None,
    workers: int = 1,
    worker: str | None = None,
    title: str = "synth",
    quiet: bool = False,
) -> SynthResult:
    """Make what is missing of the dataset in ``out`` (folder or URL) and merge its manifest; the same call resumes.

    ``shards``: in place of ``recipe.synth.shards``; a larger number adds. ``workers``: 1 works in this process, more
    are Ray actors; ``place`` says more of them. ``worker`` (``module:function``) builds another kind of worker.

    Raises UsageError for settings that cannot work, DataError for a folder of another plan, FactoryError where shards
    failed or another driver is at work, Interrupted where a signal stopped it; then, too, the same call resumes.
    """
    if shards is not None:
        recipe = recipe.changed(f"synth.shards={shards}")
    place = (place or executor(workers=workers)).for_synth(recipe.synth)
    inputs = inspect_inputs(recipe.synth)
    plan, storage = make_plan(recipe, inputs), Storage(out)
    is_noise = recipe.synth.method == "noise"  # a load test: no model is loaded, so none is checked or copied
    teacher = TeacherCopy({}, inputs.teacher) if is_noise else prepare(inputs.sources["teacher"])
    factory = worker or (NOISE_WORKER if is_noise else WORKER)
    is_new = open_or_create(storage, plan)
    try:
        storage.folder("shards")  # a link there is found now, not by the first shard
        with EventLog(storage) as events, Lease(storage, on_event=events.write, on_line=say) as lease:
            loud = Loud(events)
            stored = resume_plan(storage, plan, lambda line: loud.write("note", message=line))
            publish(storage, teacher)
            info = dataset_info(stored, inputs, teacher)
            del teacher  # its weights
            storage.write(DATASET, info.to_json())
            started = time.monotonic()
            events.write("run_started", shards=stored.shards, workers=place.workers, versions=plan.versions)
            settings, planned = plan.recipe["synth"], pinned_models(plan.semantics)
            spec = WorkerSpec(
                factory,
                {"settings": settings, "storage": storage.url, "fingerprint": stored.fingerprint, "planned": planned},
                {"sources": inputs.sources} if factory == WORKER and place.inline else {},
            )
            try:
                with progress(title, quiet=quiet) as shown:
                    outcome = execute(spec, range(stored.shards), place, loud, storage, shown, lease)
                state = {"done": len(outcome.done), "failed": len(outcome.failed), "missing": len(outcome.missing)}
                outcome.check()
                merge(storage, info, range(stored.shards))
            except Interrupted:
                events.write("run_interrupted", **state)
                raise
            except FactoryError as error:
                events.write("run_failed", error=str(error))
                raise
            seconds = time.monotonic() - started
            events.write("run_finished", **state, seconds=round(seconds, 3))
    except (UsageError, DataError):
        if is_new:  # nothing was made: a refused command leaves nothing behind
            withdraw(storage)
        raise
    manifest = Manifest.open(storage.path(MANIFEST))
    return SynthResult(
        run=storage.url,
        manifest=manifest.url,
        fingerprint=manifest.info.fingerprint,
        shards=len(manifest.info.tars),
        rows=manifest.num_rows,
        kept=manifest.num_kept,
        bytes=sum(tar.bytes for tar in manifest.info.tars),
        seconds=round(seconds, 3),
    )


def dataset_info(plan: Plan, inputs: SynthInputs, teacher: TeacherCopy) -> DatasetInfo:
    """What the manifest says of the whole dataset; the merge adds the tars."""
    return DatasetInfo(
        fingerprint=plan.fingerprint,
        recipe=plan.recipe,
        prior=inputs.prior,
        teacher=teacher.identity,
        image_size=inputs.image_size,
        class_names=inputs.class_names,
    )
