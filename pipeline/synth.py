"""Stage 1 from recipe to manifest: plan, lease, executor over the missing shards, merge. Used by ``factory run synth``
and ``factory demo``.
"""

import time
from collections.abc import Iterator
from typing import Any

from manifests.dataset import DATASET, DatasetInfo
from manifests.errors import FactoryError, Interrupted
from manifests.merge import MANIFEST, merge
from manifests.storage import Storage
from pipeline.events import EventLog, Loud
from pipeline.executors.driver import execute
from pipeline.executors.pool import WorkerSpec
from pipeline.executors.settings import ExecutorSettings
from pipeline.lease import Lease
from pipeline.plan import Plan, TeacherCopy, make_plan, open_or_create, prepare, publish, resume_plan
from pipeline.recipe import Recipe
from pipeline.terminal import duration, plain, progress, say, size
from stages.synth.inputs import SynthInputs, inspect_inputs, pinned_models

WORKER, NOISE_WORKER = "stages.synth.worker:ShardWorker", "stages.synth.noise:NoiseWorker"


def run_synth(
    recipe: Recipe,
    out: str,
    place: ExecutorSettings,
    *,
    worker: str | None = None,
    title: str = "synth",
    quiet: bool = False,
) -> dict[str, Any]:
    """Make what is missing of the dataset in ``out`` and merge its manifest; returns a report.

    Raises DataError for a folder of another plan, FactoryError where shards failed or another driver is at work,
    Interrupted where a signal stopped it; in every case the same command resumes.
    """
    inputs = inspect_inputs(recipe.synth)
    plan = make_plan(recipe, inputs)
    storage = Storage(out)
    teacher = teacher_copy(recipe, inputs)
    open_or_create(storage, plan)
    storage.folder("shards")  # a link there is found now, not by the first shard
    with EventLog(storage) as events, Lease(storage, on_event=events.write, on_line=say) as lease:

        def note(line: str) -> None:
            events.write("note", message=line)
            say(line)

        stored = resume_plan(storage, plan, note)
        publish(storage, teacher)
        info = dataset_info(stored, inputs, teacher)
        del teacher  # its weights
        storage.write(DATASET, info.to_json())
        started = time.monotonic()
        events.write("run_started", shards=stored.shards, workers=place.workers, versions=plan.versions)
        factory = worker or (NOISE_WORKER if recipe.synth.method == "noise" else WORKER)
        spec = WorkerSpec(
            factory,
            {
                "settings": recipe.synth.model_dump(mode="json"),
                "storage": storage.url,
                "fingerprint": stored.fingerprint,
                "planned": pinned_models(plan.semantics),
            },
            {"sources": inputs.sources} if factory == WORKER and place.inline else {},
        )
        try:
            with progress(title, quiet=quiet) as shown:
                outcome = execute(spec, range(stored.shards), place, Loud(events), storage, shown, lease)
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
    return report(storage, seconds)


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


def report(storage: Storage, seconds: float) -> dict[str, Any]:
    """The result of a finished run. ``seconds`` are this command's own."""
    from manifests.reader import Manifest

    manifest = Manifest.open(storage.path(MANIFEST))
    return {
        "out": storage.url,
        "manifest": storage.path(MANIFEST),
        "fingerprint": manifest.info.fingerprint,
        "shards": len(manifest.info.tars),
        "rows": manifest.num_rows,
        "kept": len(manifest),
        "bytes": sum(tar.bytes for tar in manifest.info.tars),
        "seconds": round(seconds, 3),
    }


def report_lines(result: dict[str, Any]) -> Iterator[str]:
    """The report for people."""
    yield (
        f"{result['rows']} images ({result['kept']} kept) in {result['shards']} shards, {size(result['bytes'])}, "
        f"{duration(result['seconds'])}"
    )
    yield f"manifest: {plain(result['manifest'])}"


def teacher_copy(recipe: Recipe, inputs: SynthInputs) -> TeacherCopy:
    """The copy of the teacher that the dataset carries. Raises DataError where its weights are damaged."""
    if recipe.synth.method == "noise":  # a load test: no model is loaded, so none is checked or copied
        return TeacherCopy({}, inputs.teacher)
    return prepare(inputs.sources["teacher"])
