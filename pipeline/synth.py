"""Stage 1 from recipe to manifest: plan, lease, executor over the missing shards, merge.

A dry run writes nothing and loads no weights but the teacher's; a prior that a hub holds is fetched into its cache.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from manifests.dataset import DATASET, DatasetInfo
from manifests.errors import DataError, FactoryError, Interrupted, UsageError
from manifests.merge import MANIFEST, merge
from manifests.reader import Manifest
from manifests.shard import committed
from manifests.storage import Storage
from pipeline.events import EventLog, Loud
from pipeline.executors.driver import execute
from pipeline.executors.pool import WorkerSpec
from pipeline.executors.settings import ExecutorSettings, executor
from pipeline.lease import Lease
from pipeline.plan import (
    Plan,
    TeacherCopy,
    changed_lines,
    check_folder,
    make_plan,
    open_or_create,
    prepare,
    publish,
    resume_plan,
    withdraw,
)
from pipeline.rates import Time
from pipeline.recipe import Recipe
from pipeline.terminal import duration, flop, pairs, progress, published_bn, say, size
from pipeline.watch import GrowingSheet, Recorder, SynthWatch, final_sheet
from stages.hub import NotFetched
from stages.progress import loggers
from stages.settings import SynthSettings
from stages.synth.inputs import SynthInputs, inspect_inputs, pinned_models, varies

if TYPE_CHECKING:
    from stages.cost import SynthCost

WORKER, NOISE_WORKER = "stages.synth.worker:ShardWorker", "stages.synth.noise:NoiseWorker"
ROW_BYTES = 3072  # the sample's label and row in its tar, with tar headers
RAW_SHARE = {"png": 0.83, "jpg": 0.2, "webp": 0.2}  # of the raw pixels; noisy images need about this much


@dataclass(frozen=True)
class SynthResult:
    """A finished dataset: its folder (or URL) ``run``, and its ``manifest``, which stage 2 and :class:`Manifest` open.

    ``rows``: images, of which ``kept`` pass the teacher's judgement; ``bytes``: of all tars; ``seconds``: of this call;
    ``sheet``: a picture of some images, where one was written.
    """

    run: str
    manifest: str
    fingerprint: str
    shards: int
    rows: int
    kept: int
    bytes: int
    seconds: float
    sheet: str | None = None

    def lines(self) -> Iterator[str]:
        yield (
            f"{self.rows} images ({self.kept} kept) in {self.shards} shards, {size(self.bytes)}, "
            f"{duration(self.seconds)}"
        )
        yield f"manifest: {self.manifest}"
        if self.sheet:
            yield f"contact sheet: {self.sheet}"
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
    inputs: SynthInputs | None = None,
    local: Mapping[str, Any] | None = None,
) -> SynthResult:
    """Make what is missing of the dataset in ``out`` (folder or URL) and merge its manifest; the same call resumes.

    ``shards``: in place of ``recipe.synth.shards``; a larger number adds. ``workers``: 1 works in this process, more
    are Ray actors; ``place`` says more of them. ``worker`` (``module:function``) builds another kind of worker.
    ``quiet``: neither progress nor a contact sheet. ``inputs``: where they are known already; ``local``: what that
    other kind of worker takes besides, in this process.

    Raises UsageError for settings that cannot work, DataError for a folder of another plan, FactoryError where shards
    failed or another driver is at work, Interrupted where a signal stopped it; then, too, the same call resumes.
    """
    if shards is not None:
        recipe = recipe.changed(f"synth.shards={shards}")
    place = (place or executor(workers=workers)).for_synth(recipe.synth)
    inputs = inputs or inspect_inputs(recipe.synth)
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
            events.shards = stored.shards
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
                {"sources": inputs.sources} if factory == WORKER and place.inline else dict(local or {}),
            )
            names, described = recipe.synth.loggers, f"synth {recipe.name} {stored.fingerprint[:8]}"
            try:
                done = committed(storage)
                with (
                    progress(title, quiet=quiet) as shown,
                    loggers(names, storage, described, settings, len(done)) as log,
                ):
                    recorder = shown if quiet else Recorder(storage, shown)
                    sheet = GrowingSheet(storage, inputs.class_names, sorted(done))
                    synth = recipe.synth
                    watch = SynthWatch(recorder, synth.images_per_shard, log, *(() if quiet else (sheet.add,)))
                    outcome = execute(spec, range(stored.shards), place, loud, storage, watch, lease)
                state = {"done": len(outcome.done), "failed": len(outcome.failed), "missing": len(outcome.missing)}
                outcome.check()
                merge(storage, info, range(stored.shards))
            except Interrupted:
                events.write("run_interrupted", **state)
                raise
            except FactoryError as error:
                events.write("run_failed", error=str(error))
                raise
            Recorder(storage, shown).finish()  # what a killed call left, too, where this one is quiet
            if len(done) < stored.shards and factory == WORKER and not quiet:
                events.write("work_counted", **_counted(synth, inputs))
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
        sheet=None if quiet else final_sheet(storage, manifest),
    )


def _counted(synth: SynthSettings, inputs: SynthInputs) -> dict[str, Any]:
    """The FLOPs of a trajectory, for the report; nothing where they cannot be counted: the images are made."""
    from stages.cost import synth_cost

    try:
        cost = synth_cost(synth, inputs.sources)
    except Exception:  # whatever a foreign network does without its weights
        return {}
    each = synth.images_per_trajectory
    return {"flop_per_trajectory": cost.flop_per_trajectory, "parts": cost.parts, "images_per_trajectory": each}


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


@dataclass(frozen=True)
class SynthEstimate:
    """What ``run_synth`` would make. What depends on a prior that cannot be fetched is None; ``unknown`` says why.

    ``published_bn``: what the papers' BatchNorm weights are for this teacher
    (:func:`stages.models.teacher.published_bn_unit`); None without BatchNorm, and for methods that match no statistics.
    """

    out: str
    fingerprint: str | None
    recipe: dict[str, Any]
    workers: int
    shards: int
    shards_done: int
    groups_per_shard: int
    trajectories: int
    images: int
    image_size: int | None
    classes: int | None
    denoiser_calls: int
    disk_bytes_at_most: int | None
    cost: "SynthCost | None"
    time: Time | None
    prior: dict[str, Any] | None
    prior_decisions: Mapping[str, str]
    teacher: dict[str, Any] | None
    published_bn: tuple[float, float] | None
    versions: dict[str, str] | None
    unknown: str | None

    def lines(self) -> Iterator[str]:
        """What it amounts to first, then the settings that differ from their defaults."""
        known: list[tuple[str, str | None]]
        known = [("unknown", f"{self.unknown}; so classes, compute, memory and fingerprint are not known")]
        if self.prior and self.teacher:
            known = [
                ("prior", f"{self.prior.get('name')}, sha256 {str(self.prior.get('sha256'))[:12]}"),
                ("", "; ".join(f"{what} {how}" for what, how in self.prior_decisions.items()) or None),
                ("teacher", f"{self.teacher.get('architecture')}, sha256 {self.teacher['sha256'][:12]}"),
                ("BatchNorm", published_bn(self.published_bn)),
                ("classes", str(self.classes)),
            ]
        pixels = f"{self.image_size} px" if self.image_size else "the prior's size"
        yield from pairs(
            16,
            ("out", f"{self.out} ({self.shards_done} of {self.shards} shards done)"),
            *known,
            ("images", f"{self.images} of {pixels}, from {self.trajectories} trajectories"),
            ("denoiser calls", f"{self.denoiser_calls} still to make (a batch of one each; CFG included)"),
            *(self._cost_lines(self.cost) if self.cost else ()),
            *(self.time.entries() if self.time else ()),
            ("disk", f"at most about {size(self.disk_bytes_at_most)}" if self.disk_bytes_at_most else None),
            ("fingerprint", self.fingerprint),
            *changed_lines(self.recipe["synth"], SynthSettings().model_dump(mode="json"), "synth."),
        )

    def _cost_lines(self, cost: "SynthCost") -> Iterator[tuple[str, str | None]]:
        parts = ", ".join(f"{name} {flop(value)}" for name, value in cost.parts.items() if value)
        fit = f"first a decoder is fitted, {flop(cost.fit_decoder_once)}, unless an earlier run left one"
        yield "compute", f"{flop(cost.flop)} in all, {flop(cost.flop / self.images)} an image (counted)"
        yield "", f"a trajectory: {parts}"
        yield "", fit if cost.fit_decoder_once else None
        yield (
            "memory",
            f"{size(cost.weights_bytes)} of weights, {size(cost.saved_bytes_per_group)} saved for backward passes "
            f"({size(cost.saved_bytes_per_trajectory)} × {self.recipe['synth']['group_size']}); "
            "working memory comes on top",
        )


def dry_run(recipe: Recipe, out: str, workers: int = 1, price: float | None = None) -> SynthEstimate:
    """What ``run_synth`` would do, after its own checks of device, teacher and folder; goes on without a prior that
    cannot be fetched. Writes nothing."""
    synth, storage = recipe.synth, Storage(out)
    storage.refuse_file()
    inputs, cost, unit, unknown = None, None, None, None
    try:
        inputs = inspect_inputs(synth)
    except NotFetched as error:
        unknown = str(error)
    if inputs and synth.method != "noise":  # which runs no model
        from stages.cost import synth_cost
        from stages.memory import find_device
        from stages.synth.worker import load_classifiers

        if workers == 1:
            find_device(synth.device)
        load_classifiers(synth, inputs.sources)
        cost = synth_cost(synth, inputs.sources)
        if synth.guides or synth.inverts:
            from stages.models.loading import load_teacher

            unit = load_teacher(inputs.sources["teacher"]).published_bn
    trajectories = synth.groups_per_shard * synth.group_size
    images = trajectories * synth.images_per_trajectory
    image_size = inputs.image_size if inputs else synth.images.size
    per_image = image_size and 3 * image_size**2 * RAW_SHARE[synth.images.format] + ROW_BYTES
    plan = make_plan(recipe, inputs) if inputs else None
    if plan:
        check_folder(storage, plan)
    done = len(committed(storage))
    left = max(0, synth.shards - done)
    work = cost.flop * left // synth.shards if cost else None
    return SynthEstimate(
        out=storage.url,
        fingerprint=plan.fingerprint if plan else None,
        recipe=recipe.model_dump(mode="json", exclude={"distill", "rounds"}),
        workers=workers,
        shards=synth.shards,
        shards_done=done,
        groups_per_shard=synth.groups_per_shard,
        trajectories=trajectories * synth.shards,
        images=images * synth.shards,
        image_size=image_size,
        classes=len(inputs.class_names) if inputs else None,
        denoiser_calls=denoiser_calls(synth, inputs) * trajectories * left,
        disk_bytes_at_most=round(images * synth.shards * per_image) if per_image else None,
        cost=cost,
        time=Time.of("synth", recipe, images * left, work, workers, price) if left else None,
        prior=inputs.prior if inputs else None,
        prior_decisions=inputs.decisions if inputs else {},
        teacher=inputs.teacher if inputs else None,
        published_bn=unit,
        versions=plan.versions if plan else None,
        unknown=unknown,
    )


def denoiser_calls(synth: SynthSettings, inputs: SynthInputs | None) -> int:
    """Denoiser evaluations per trajectory: one per step, two where classifier-free guidance is on."""
    if not synth.needs_prior:
        return 0
    prior = synth.prior
    conditional = inputs is None or not (inputs.prior["conditioning"] == "none" or inputs.prior.get("cfg_scale_input"))
    times, first = 1, 0
    if synth.method == "dda":
        alone = inputs is not None and varies(inputs.prior)
        times, first = synth.dda.variants, synth.dda.first_step(prior.steps, alone)
    return times * sum(1 + (conditional and prior.cfg_at(step) != 1) for step in range(first, prior.steps))
