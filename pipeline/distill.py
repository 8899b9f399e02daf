"""Stage 2 from manifests to students. Used by ``factory run distill`` and ``factory demo``.

A manifest alone is enough: its metadata holds the recipe, whose ``distill`` section applies, and names the teacher.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from manifests.errors import DataError, FactoryError, Interrupted, UsageError
from manifests.reader import Manifest, parse_source
from manifests.storage import Storage
from pipeline.events import EventLog
from pipeline.executors.driver import StopSignals
from pipeline.executors.settings import ExecutorSettings
from pipeline.layers import mapping_layer, validate
from pipeline.lease import Lease
from pipeline.plan import PLAN, RESOLVED, refuse_file
from pipeline.recipe import Recipe, given, to_yaml
from pipeline.terminal import duration, flop, plain, plain_block, progress, say, size
from stages.models.source import resolve, split_name
from stages.settings import DistillSettings, ModelSettings

NOT_STORED = frozenset({"loggers", "skip_bad", "allow_other_teacher"})
"""Settings that are the user's own: never taken from the recipe in a manifest; nor is teacher_cache.folder."""
INLINE = ExecutorSettings()
UNTIL = "at the next checkpoint"


def resolve_distill(
    manifest: Manifest, source: str | None, sets: Sequence[str], flags: Mapping[str, tuple[str, Any]]
) -> Recipe:
    """The recipe stored with ``manifest``, under the file, environment, ``--set`` and flags of this command.

    Somebody else may have written that recipe: it says what to learn, not where files go, what is sent elsewhere, what
    is let through, or which code runs. Raises UsageError where a student comes from it that is own code, hf: or ONNX.
    """
    stored = {key: value for key, value in manifest.info.recipe.items() if key in ("name", "description", "distill")}
    if isinstance(stored.get("distill"), dict):
        stored["distill"] = {key: value for key, value in stored["distill"].items() if key not in NOT_STORED}
        if isinstance(cache := stored["distill"].get("teacher_cache"), dict):
            stored["distill"]["teacher_cache"] = {key: value for key, value in cache.items() if key != "folder"}
    mine = given(source, section="distill", sets=sets, flags=flags)
    recipe = validate(Recipe, mine.over(mapping_layer(stored, f"recipe stored in {manifest.url}")))
    if "students" not in mine.values.get("distill", {}):
        for name in recipe.distill.students:
            if split_name(name)[0] in ("code", "hf", "onnx"):
                raise UsageError(
                    f"{manifest.url} was made to train '{name}', which is never built because a file says so: "
                    f"name it yourself, with --student {name}"
                )
    return recipe


def open_sources(texts: Sequence[str]) -> tuple[list[tuple[str, float]], Manifest]:
    """``PATH`` or ``PATH@WEIGHT`` texts as sources, and the first manifest; every one is opened, its tars not yet."""
    sources = [parse_source(text) for text in texts]
    opened = [Manifest.open(url, skip_bad=True) for url, _ in sources]
    return [(manifest.url, weight) for manifest, (_, weight) in zip(opened, sources, strict=True)], opened[0]


def default_out(manifest: Manifest, recipe: Recipe) -> str:
    """Beside the manifest where that is a local folder, since checkpoints are rewritten often."""
    return manifest.storage.folder("distill") if manifest.storage.is_local else f"runs/{recipe.name}-distill"


def run_distill(
    recipe: Recipe,
    sources: Sequence[tuple[str, float]],
    out: str,
    *,
    teacher: str | ModelSettings | None = None,
    test_data: str | None = None,
    place: ExecutorSettings = INLINE,
    title: str = "distill",
    quiet: bool = False,
) -> dict[str, Any]:
    """Train the recipe's students from ``sources`` into ``out``; the same call resumes. Returns the stage's results.

    ``teacher`` (settings, or a name as ``--teacher`` takes it) replaces the one that the manifest names.
    Raises UsageError where ``out`` is a file or a run of stage 1, DataError where data, teacher and folder do not fit,
    Interrupted (after a checkpoint) on the first Ctrl-C, FactoryError while another process trains in ``out``.
    """
    if test_data and "://" not in test_data and not os.path.exists(test_data):
        raise DataError(f"--test-data {test_data}: no such file or folder")  # now, not after the training
    storage = Storage(out)
    refuse_file(storage)
    if storage.exists(PLAN):  # both stages write RESOLVED, events and a lease
        raise UsageError(f"--out {out}: a run of stage 1 is there; use {storage.path('distill')}, say")
    from stages.distill.run import begin, prepare, train_students
    from stages.distill.runtime import Callbacks

    chosen = ModelSettings(name=teacher) if isinstance(teacher, str) else teacher
    with (
        EventLog(storage) as events,
        progress(title, quiet=quiet) as shown,
        ExitStack() as stack,
    ):
        signals = stack.enter_context(StopSignals(UNTIL))
        lease = Lease(storage, on_event=events.write, on_line=say)

        def on_event(kind: str, **fields: Any) -> None:
            if kind == "run_started":  # data and teacher fit; nothing was written yet
                stack.enter_context(lease)
            if kind == "teacher_checked":  # data, teacher and folder fit: from here on this is a run folder
                storage.write(RESOLVED, to_yaml(recipe, ("name", "description", "distill")))
            events.write(kind, **fields)
            if kind == "teacher_checked":
                say(check_line(fields))
            if kind in ("note", "warning"):
                say(fields["message"])
            if kind == "worker_lost":
                say(f"{fields['error']}; all workers start again from the last checkpoint")

        def should_stop() -> bool:
            lease.check()
            return signals.draining

        if place.inline:
            prepared = prepare(recipe.distill, sources, chosen)
            begin(prepared, storage, on_event)
            result = train_students(prepared, storage, test_data, Callbacks(on_event, shown, should_stop))
            assert result is not None
            return result.to_dict()

        import torch

        from pipeline.executors.ray import cluster
        from pipeline.executors.ray_train import train_on_ray
        from stages.distill.runtime import Ranks

        place = _with_gpus(place, recipe.distill)
        # here once, on the CPU: what does not fit is said at once, and by one process
        begin(
            prepare(recipe.distill, sources, chosen, Ranks(device=torch.device("cpu"))),
            storage,
            on_event,
            place.workers,
        )
        stack.enter_context(cluster(place))
        if signals.draining:
            raise Interrupted("interrupted before the workers started; the same command resumes")
        signals = stack.enter_context(StopSignals(UNTIL))  # again: starting Ray installs a handler of its own
        job = {
            "settings": recipe.distill.model_dump(mode="json"),
            "sources": list(sources),
            "teacher": chosen.model_dump(mode="json") if chosen else None,
            "out": storage.url,
            "test_data": test_data,
        }
        return train_on_ray(job, place, on_event, shown, should_stop)


def learnt_by(student: str, result: dict[str, Any], title: str) -> dict[str, Any]:
    """What ``result`` of :func:`run_distill` tells of ``student``. Raises FactoryError where it was parked."""
    if student in result["parked"]:
        raise FactoryError(f"{title}: {student} was parked: {result['parked'][student]}")
    facts: dict[str, Any] = result["students"][student]
    return facts


def _with_gpus(place: ExecutorSettings, settings: DistillSettings) -> ExecutorSettings:
    """``place`` with the GPU that each worker gets for itself: one where there are any, unless ``device`` says more."""
    if settings.device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"device {settings.device!r}: workers get a device each; use auto, cpu or cuda")
    gpus = {"auto": None, "cpu": 0.0, "cuda": 1.0}[settings.device]
    return place.model_copy(update={"gpus_per_worker": gpus, "threads": settings.threads})


def check_line(check: Mapping[str, Any]) -> str:
    """The teacher check for people."""
    counts = check["classes"].values()
    gap = "" if check["bn_gap"] is None else f"BatchNorm gap {check['bn_gap']:.2f}; "
    return (
        f"teacher agrees with {check['teacher_label_agreement']:.1%} of the labels, mean confidence "
        f"{check['confidence']:.1%} ({check['images']} images looked at); {gap}{min(counts)} to "
        f"{max(counts)} images in each of {len(counts)} classes"
    )


def report_lines(result: dict[str, Any]) -> Iterator[str]:
    """The results for people."""
    yield check_line(result["teacher_check"])
    for name, facts in result["students"].items():
        scores = []
        if facts["val_agreement"] is not None:
            scores.append(f"{facts['val_agreement']:.1%} agreement with the teacher on validation images")
        if facts["test"]:
            scores.append(f"{facts['test']['accuracy']:.1%} on the test data")
        yield f"{plain(name)}: {', '.join(scores) or 'trained'}; {plain(facts['folder'])}"
    for name, reason in result["parked"].items():
        yield f"{plain(name)}: parked, {plain(reason)}"
    for order in dict.fromkeys(facts["test"]["class_order"] for facts in result["students"].values() if facts["test"]):
        yield f"test data: {order}"
    if "teacher_accuracy" in result:
        yield f"teacher: {result['teacher_accuracy']:.1%} on the test data"
    yield f"{result['images']} images, {duration(result['seconds'])}"


def dry_run(
    recipe: Recipe,
    sources: Sequence[tuple[str, float]],
    out: str,
    teacher: str | None,
    place: ExecutorSettings = INLINE,
) -> dict[str, Any]:
    """What ``run_distill`` would train on, for how long and at what cost; writes nothing, and reads no image."""
    from stages.distill.batches import batch_bounds
    from stages.distill.rows import EpochOrder, select_rows, split_validation

    settings = recipe.distill
    manifests = [(Manifest.open(url, skip_bad=settings.skip_bad), weight) for url, weight in sources]
    rows = select_rows(manifests, settings.model_copy(update={"skip_bad": False}))
    images = EpochOrder(rows, split_validation(rows, settings.val_fraction, settings.seed)[0], settings).length
    batches = len(batch_bounds(images, settings.batch_size)) - 1
    manifest = manifests[0][0]
    return {
        "out": Storage(out).url,
        "settings": settings.model_dump(mode="json"),
        "sources": [
            {"manifest": each.url, "weight": weight, "rows": each.num_rows, "selected": len(selection)}
            for (each, weight), selection in zip(manifests, rows.selections, strict=True)
        ],
        "teacher": teacher or manifest.info.teacher.get("architecture"),
        "images_per_epoch": images,
        "steps_per_epoch": batches,
        "steps": batches * settings.epochs,
        "students": list(settings.students),
        "workers": place.workers,
        "cost": cost(settings, manifest, teacher, images, len(rows)),
    }


def cost(
    settings: DistillSettings, manifest: Manifest, teacher: str | None, images: int, rows: int
) -> dict[str, Any] | None:
    """Counted FLOPs of the whole training on ``images`` of ``rows`` an epoch (the cache answers to every row), and
    bytes; None where the teacher is not at hand or a black box."""
    from stages.cost import distill_cost
    from stages.models.loading import dataset_teacher_config, untrained_teacher

    if teacher:
        shape = untrained_teacher(resolve(ModelSettings(name=teacher)))
    elif manifest.info.teacher.get("kind") == "builtin":
        shape = untrained_teacher(dataset_teacher_config(manifest))
    else:
        return None
    if shape is None:
        return None
    found = distill_cost(settings, shape, manifest.info.image_size)
    seen = images * settings.epochs
    asked = rows * settings.augment.num_views if settings.teacher_cache.enabled else seen
    return {
        "teacher": found.teacher * asked,
        "students": {name: value * seen for name, value in found.students.items()},
        "flop": found.teacher * asked + sum(found.students.values()) * seen,
        "weights_bytes": found.weights,
        "saved_bytes_per_batch": found.saved * settings.batch_size,
    }


def dry_run_lines(result: dict[str, Any]) -> Iterator[str]:
    """The dry run for people."""
    import yaml

    yield plain_block(yaml.safe_dump({"distill": result["settings"]}, sort_keys=False, allow_unicode=True, width=110))
    for source in result["sources"]:
        share = "" if source["weight"] == 1 else f", weight {source['weight']:g}"
        yield f"data      {plain(source['manifest'])}: {source['selected']} of {source['rows']} rows{share}"
    yield f"teacher   {plain(result['teacher'])}"
    yield f"students  {plain(', '.join(result['students']))}"
    if result["workers"] > 1:
        each = result["settings"]["batch_size"] / result["workers"]
        yield f"workers   {result['workers']} through Ray Train, about {each:.0f} images of each batch for one"
    yield f"length    about {result['steps']} steps ({result['steps_per_epoch']} an epoch)"
    if result["cost"]:
        found = result["cost"]
        parts = ", ".join(f"{plain(name)} {flop(value)}" for name, value in found["students"].items())
        yield f"compute   {flop(found['flop'])}: teacher {flop(found['teacher'])}, {parts} (counted)"
        saved = size(found["saved_bytes_per_batch"])
        yield f"memory    {size(found['weights_bytes'])} of weights, {saved} saved for the backward pass of a batch"
    else:
        yield "compute   not known: the teacher is named by --teacher, or a black box"
    yield f"out       {plain(result['out'])}"
