"""``factory bench``: how fast this machine or cluster runs a recipe, kept for ``--dry-run``, which then says hours.

Stage 1 makes a few groups of the recipe; stage 2 trains for some seconds on a manifest, where it is stored, or on
noise. Both work in a folder that goes afterwards. What is kept is work done a second, counted as ``--dry-run`` counts
it, so that a recipe with other steps or sizes can be estimated too: exactly for the benchmarked settings, roughly for
others.
"""

import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pydantic import Field, ValidationError

from manifests.errors import DataError, Interrupted, UsageError
from manifests.storage import Storage
from pipeline.events import read_events
from pipeline.executors.settings import ExecutorSettings
from pipeline.recipe import Recipe
from pipeline.terminal import duration, flop, pairs, plain, share
from stages.settings import Settings

FILE = "bench.json"
BATCHES, MOST = 8, 2048
"""Batches that stage 2 trains on, unless a manifest is given, and their images at most."""
WARM_UP = 2
"""Trajectories of the group that says how many groups fit the time."""


class Pace(Settings):
    """One stage: images of its unit of work a second (stage 2: views trained on), all ``workers`` together.

    ``group_size``: trajectories together (stage 1). ``flop_per_image``: counted work of one; None where it cannot be
    counted. ``data_wait``: share of the time without a batch (stage 2).
    """

    recipe: str
    images_per_second: float = Field(gt=0)
    flop_per_image: int | None = Field(None, ge=0)
    workers: int = Field(1, gt=0)
    images: int = Field(gt=0)
    seconds: float = Field(gt=0)
    group_size: int | None = None
    steps_per_second: float | None = None
    data_wait: float | None = None

    @property
    def text(self) -> str:
        many = f" by {self.workers} workers" if self.workers > 1 else ""
        work = f", {flop(self.flop_per_image * self.images_per_second)} a second" if self.flop_per_image else ""
        steps = ""
        if self.steps_per_second is not None:
            steps = f"{self.steps_per_second:.3g} steps a second, {share(self.data_wait)} of the time without a batch; "
        group = f", groups of {self.group_size}" if self.group_size else ""
        took = f"{self.images} in {duration(self.seconds)}{group}"
        return f"{steps}{self.images_per_second:.3g} images a second{many}{work} ({took})"

    def hours(self, images: float, work: int | None, workers: int) -> float:
        """For ``images`` that cost ``work`` FLOPs in all, by ``workers``: as much for one as here."""
        seconds = images / self.images_per_second
        if work and self.flop_per_image:
            seconds = work / (self.flop_per_image * self.images_per_second)
        return seconds * self.workers / workers / 3600


class Bench(Settings):
    """What ``factory bench`` measured, where and when."""

    machine: str
    date: str
    synth: Pace | None = None
    distill: Pace | None = None

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    def lines(self) -> Iterator[str]:
        yield from pairs(
            10,
            ("machine", f"{self.machine}, {self.date}"),
            ("stage 1", self.synth.text if self.synth else None),
            ("stage 2", self.distill.text if self.distill else None),
        )


def bench_file() -> str:
    """Where the last benchmark of this user is: ``FACTORY_BENCH``, else a file in the cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.environ.get("FACTORY_BENCH") or os.path.join(
        os.environ.get("FACTORY_CACHE") or os.path.join(home, "dfkd-factory"), FILE
    )


def read_bench(path: str | None = None) -> Bench | None:
    """The last benchmark, None where there is none. Raises DataError for a file that is not one."""
    name = path or bench_file()
    try:
        with open(name, encoding="utf-8") as file:
            return Bench.model_validate(json.loads(file.read(1 << 16)))
    except FileNotFoundError:
        if path or os.environ.get("FACTORY_BENCH"):
            raise DataError(f"{name}: no such file; `factory bench` writes one") from None
        return None
    except (OSError, ValueError, ValidationError) as error:
        raise DataError(
            f"{name}: not what `factory bench` wrote; run it again ({str(error).splitlines()[0]})"
        ) from None


@dataclass(frozen=True)
class Time:
    """How long a stage takes by a benchmark, and what that costs; its lines belong into a dry run."""

    hours: float
    price: float | None
    workers: int
    source: str
    exact: bool

    @classmethod
    def of(
        cls, stage: str, recipe: Recipe, images: float, work: int | None, workers: int, price: float | None
    ) -> "Time | None":
        """Of ``images`` of a ``stage`` (synth or distill) of ``recipe``. ``price`` is that of one worker's hour."""
        if price is not None and not 0 <= price < 1e6:
            raise UsageError(f"--price {price:g}: expected the price of one GPU's hour")
        found = read_bench()
        pace: Pace | None = getattr(found, stage) if found else None
        if found is None or pace is None:
            if price is not None:
                raise UsageError(
                    "--price needs a rate: run `factory bench` first, on the machine that will do the work"
                )
            return None
        same_work = not work or not pace.flop_per_image or _near(work / images, pace.flop_per_image)
        same_groups = pace.group_size in (None, recipe.synth.group_size)
        exact = pace.recipe == recipe.name and same_work and same_groups
        hours = pace.hours(images, work, workers)
        return cls(hours, None if price is None else hours * workers * price, workers, found.machine, exact)

    def entries(self) -> Sequence[tuple[str, str | None]]:
        how = (
            "as benchmarked"
            if self.exact
            else "scaled by counted work from other settings or smaller groups: a rough figure"
        )
        cost = None if self.price is None else f"{self.price:,.2f}, {self.workers} × {self.hours:.2f} h"
        return (
            ("time", f"about {duration(self.hours * 3600)} on {plain(self.source)} ({how}); see factory bench"),
            ("price", cost),
        )


def _near(one: float, other: float) -> bool:
    return abs(one - other) <= 0.01 * max(one, other)


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


def save_bench(found: Bench, path: str | None = None) -> str:
    """Keep it for ``--dry-run``; the path of its file."""
    name = os.path.abspath(path or bench_file())
    storage = Storage(os.path.dirname(name))
    storage.write(os.path.basename(name), (json.dumps(found.to_dict(), indent=1) + "\n").encode(), beside=True)
    return name


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
        update={"epochs": 10**6, "checkpoint_seconds": 1e9, "eval_every": 0, "loggers": ()}
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
    epoch = settings.model_copy(update={"epochs": 1})
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
