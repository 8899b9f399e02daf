"""``factory bench``: how fast this machine or cluster runs a recipe, kept for ``--dry-run``, which then says hours.

Stage 1 makes a few groups of the recipe; stage 2 trains for some seconds on a manifest, where it is stored, or on
noise. Both work in a folder that goes afterwards. What is kept is work done a second, counted as ``--dry-run`` counts
it, so that a recipe with other steps or sizes can be estimated too: exactly for the benchmarked settings, roughly for
others.
"""

import os
import platform
import shutil
import statistics
import tempfile
import time
from contextlib import suppress
from typing import Any

from manifests.errors import Interrupted, UsageError
from manifests.storage import Storage
from pipeline.events import read_events
from pipeline.executors.settings import ExecutorSettings
from pipeline.rates import Bench, Pace
from pipeline.recipe import Recipe

BATCHES, MOST = 8, 2048
"""Batches that stage 2 trains on, unless a manifest is given, and their images at most."""
WARM_UP = 2
"""Trajectories of the group that says how many groups fit the time."""


def run_bench(
    recipe: Recipe,
    place: ExecutorSettings,
    seconds: float = 60.0,
    manifest: str | None = None,
    folder: str | None = None,
) -> Bench:
    """Measure both stages of ``recipe``, each for about half of ``seconds``; loading and compiling come on top.

    ``manifest``: what stage 2 reads, in place of what stage 1 made. ``folder``: where to work; workers on several
    machines need one that all of them reach. What is made there is removed.
    """
    if place.address and not folder:
        raise UsageError("--folder: workers of a cluster need a folder or bucket that all of them reach")
    local = tempfile.mkdtemp(prefix="factory-bench-")
    try:
        run = f"{(folder or local).rstrip('/')}/factory-bench-{os.getpid()}"
        synth = bench_synth(recipe, place, seconds / 2, run)
        distill = bench_distill(recipe, seconds / 2, manifest, run, local)
        return Bench(machine=machine(recipe), date=time.strftime("%Y-%m-%d"), synth=synth, distill=distill)
    finally:
        shutil.rmtree(local, ignore_errors=True)
        if folder:
            _remove(run)


def machine(recipe: Recipe) -> str:
    """This machine in a few words."""
    from stages.memory import find_device

    device = find_device(recipe.synth.device)
    if device.type == "cuda":
        import torch

        return f"{platform.node()}, {torch.cuda.get_device_name(device)}"
    return f"{platform.node()}, {os.cpu_count()} cores ({platform.machine()})"


def bench_synth(recipe: Recipe, place: ExecutorSettings, seconds: float, run: str) -> Pace:
    """Groups of the recipe's size, one a shard, after a small one that tells how long they take."""
    from pipeline.synth import dry_run, run_synth

    group = recipe.synth.group_size
    try:
        small = recipe.changed("synth.groups_per_shard=1", f"synth.group_size={min(group, WARM_UP)}", "synth.shards=1")
    except UsageError:  # methods whose batches need larger groups
        small = recipe.changed("synth.groups_per_shard=1", "synth.shards=1")
    alone = ExecutorSettings()
    run_synth(small, f"{run}/small", alone, title="bench", quiet=True)
    each = _seconds(f"{run}/small")[0] * group / small.synth.group_size
    if each > seconds:
        group = max(small.synth.group_size, int(group * seconds / each))
        each = seconds
    count = max(1, min(round(seconds / each), 50))
    full = recipe.changed(
        "synth.groups_per_shard=1", f"synth.group_size={group}", f"synth.shards={place.workers * (count + 1)}"
    )
    result = run_synth(full, f"{run}/full", place, title="bench", quiet=True)
    took = _seconds(f"{run}/full")
    took = took[place.workers :] or took  # a worker's first shard also warms up
    counted = dry_run(full, f"{run}/full").cost
    images = result.rows // result.shards
    return Pace(
        recipe=recipe.name,
        images_per_second=place.workers * images / statistics.median(took),
        flop_per_image=round(counted.flop / result.rows) if counted else None,
        workers=place.workers,
        images=images * len(took),
        seconds=sum(took) / place.workers,
        group_size=group,
    )


def _seconds(run: str) -> list[float]:
    """Of each shard, in the order in which they were done."""
    return [event["seconds"] for event in read_events(Storage(run)) if event["kind"] == "shard_done"]


def bench_distill(recipe: Recipe, seconds: float, manifest: str | None, run: str, folder: str) -> Pace:
    """Steps of the recipe's students on ``manifest`` (None: on noise of the size that stage 1 stores), in this process,
    stopped after ``seconds``."""
    from manifests.reader import Manifest
    from pipeline.distill import cost
    from stages.distill import checkpoint
    from stages.distill.batches import batch_bounds
    from stages.distill.run import begin, prepare, train_students
    from stages.distill.runtime import Callbacks

    settings = recipe.distill.model_copy(
        update={"epochs": 10**6, "steps": None, "checkpoint_seconds": 1e9, "eval_every": 0, "loggers": ()}
    )
    storage, started = Storage(f"{folder}/students"), 0.0

    def should_stop() -> bool:
        nonlocal started
        started = started or time.monotonic()
        return time.monotonic() - started > seconds

    teacher = None if manifest else recipe.synth.teacher
    manifest = manifest or noise(recipe, f"{run}/noise")
    prepared = prepare(settings, [(manifest, 1.0)], teacher)
    begin(prepared, storage, lambda kind, **fields: None)
    with suppress(Interrupted):
        train_students(prepared, storage, None, Callbacks(should_stop=should_stop))
    state = checkpoint.parse(storage.read(checkpoint.STATE), storage, prepared.device)
    steps, took = state["step"], state["seconds"]
    length = prepared.order.length
    each = length / (len(batch_bounds(length, settings.batch_size)) - 1)
    epoch = settings.model_copy(update={"epochs": 1, "steps": None})
    counted = cost(epoch, Manifest.open(manifest), None, length, len(prepared.rows))
    return Pace(
        recipe=recipe.name,
        images_per_second=steps * each / took,
        flop_per_image=round(counted.flop / length) if counted and not settings.teacher_cache.enabled else None,
        images=round(steps * each),
        seconds=took,
        steps_per_second=steps / took,
        data_wait=state["waited"] / took,
    )


def noise(recipe: Recipe, run: str) -> str:
    """The manifest of images that cost nothing to make: enough for some batches."""
    from pipeline.synth import run_synth
    from stages.synth.inputs import inspect_inputs

    rows = min(BATCHES * recipe.distill.batch_size, MOST)
    group = min(rows, 64)
    sets: dict[str, Any] = {"method": "noise", "images.intermediates": 0, "shards": 1, "group_size": group}
    sets["groups_per_shard"] = -(-rows // group)
    sets["images.size"] = inspect_inputs(recipe.synth).image_size
    made = recipe.changed(*(f"synth.{name}={value}" for name, value in sets.items()))
    return run_synth(made, run, title="bench", quiet=True).manifest


def _remove(url: str) -> None:
    """The folder that a benchmark made, local or remote."""
    import fsspec

    with suppress(OSError, ValueError):
        fs, path = fsspec.core.url_to_fs(url)
        fs.rm(path, recursive=True)
