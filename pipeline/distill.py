"""Stage 2 from manifests to students.

A manifest alone is enough: its metadata holds the recipe, whose ``distill`` section applies, and names the teacher.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from manifests.errors import FactoryError, Interrupted, UsageError
from manifests.reader import Manifest, parse_source
from manifests.storage import Storage
from pipeline.events import EventLog, Loud
from pipeline.executors.driver import StopSignals
from pipeline.executors.settings import ExecutorSettings, executor
from pipeline.layers import mapping_layer
from pipeline.lease import Lease
from pipeline.outputs import STUDENTS, default_folder
from pipeline.plan import PLAN, RESOLVED, changed_lines
from pipeline.rates import Time
from pipeline.recipe import Recipe, given, recipe_of, to_yaml
from pipeline.terminal import duration, flop, pairs, plain, progress, say, share, size
from pipeline.watch import Recorder
from stages.models.source import resolve, split_name
from stages.settings import DistillSettings, ModelSettings

if TYPE_CHECKING:
    from stages.cost import DistillCost
    from stages.distill.results import DistillResult, StudentResult

NOT_STORED = (
    *("keys", "exclude_keys"),
    *("loggers", "skip_bad", "allow_other_teacher", "teacher_cache.folder", "cache_dir", "cache_gb"),
    *("device", "threads", "memory_gb", "checkpoint_seconds"),
)
"""Settings that are the user's own, never taken from the recipe in a manifest: where things go, what is let through,
what of this machine is used."""
UNTIL = "at the next checkpoint"
Source = str | tuple[str, float]
"""A manifest: path or URL, ``PATH@WEIGHT``, or ``(PATH, weight)``."""


def trained(result: "DistillResult", name: str, title: str) -> "StudentResult":
    """The student ``name``. Raises FactoryError where it was parked; ``title`` says what needed it."""
    if name in result.parked:
        raise FactoryError(f"{title}: {name} was parked: {result.parked[name]}")
    return result.students[name]


def result_lines(result: "DistillResult") -> Iterator[str]:
    """What people read of a run's result."""
    yield check_line(asdict(result.teacher_check))
    for name, student in result.students.items():
        scores = []
        if student.val_agreement is not None:
            scores.append(f"{share(student.val_agreement)} agreement with the teacher on validation images")
        if student.test:
            scores.append(f"{share(student.test.accuracy)} on the test data")
        yield f"{plain(name)}: {', '.join(scores) or 'trained'}; {student.folder}"
    for name, reason in result.parked.items():
        yield f"{plain(name)}: parked, {reason}"
    for name, reason in result.unscored.items():
        yield f"{plain(name)}: kept without a score on the test data: {reason}"
    tests = [student.test for student in result.students.values() if student.test]
    for line in dict.fromkeys(line for test in tests for line in (test.class_order, *test.decisions.values())):
        yield f"test data: {line}"
    if result.teacher_accuracy is not None:
        yield f"teacher: {share(result.teacher_accuracy)} on the test data"
    yield f"{result.images} images, {duration(result.seconds)}"


def resolve_distill(
    manifest: Manifest, source: str | None, sets: Sequence[str], flags: Mapping[str, tuple[str, Any]]
) -> Recipe:
    """The recipe stored with ``manifest``, under the file, environment, ``--set`` and flags of this command.

    Somebody else may have written that recipe: it says what to learn, not where files go, what is sent elsewhere, what
    is let through, what of this machine is used, or which code runs. Raises UsageError where a student comes from it
    that is own code, hf: or ONNX.
    """
    known = {key: value for key, value in manifest.info.recipe.items() if key in ("name", "description", "distill")}
    stored = mapping_layer(known, f"recipe stored in {manifest.url}")
    for path in NOT_STORED:
        stored = stored.without(("distill", *path.split(".")))
    mine = given(source, "distill", sets, flags)
    recipe = recipe_of(mine.over(stored))
    if "students" not in mine.values.get("distill", {}):
        for name in recipe.distill.students:
            if split_name(name)[0] in ("code", "hf", "onnx"):
                raise UsageError(
                    f"{manifest.url} was made to train '{name}', which is never built because a file says so: "
                    f"name it yourself, with --student {name}"
                )
    return recipe


def teacher_for(manifest: Manifest, recipe: Recipe) -> ModelSettings | None:
    """The teacher that the user's ``recipe`` describes, for a dataset that carries none; None where it carries its own,
    or where the recipe says nothing of one."""
    carried = manifest.info.teacher.get("kind") == "builtin"
    return None if carried or recipe.synth.teacher == ModelSettings() else recipe.synth.teacher


def default_out(manifest: Manifest, recipe: Recipe) -> str:
    """Local, since checkpoints are rewritten often; errors as :func:`pipeline.outputs.default_folder`."""
    return f"{default_folder(manifest, recipe.name)}/{STUDENTS}"


def refuse_run(storage: Storage) -> None:
    """Raises UsageError for a run folder of stage 1: both stages write RESOLVED, events and a lease."""
    if storage.exists(PLAN):
        raise UsageError(f"--out {storage.url}: a run of stage 1 is there; use {storage.path('distill')}, say")


def run_distill(
    recipe: Recipe,
    manifests: Sequence[Source],
    out: str | None = None,
    *,
    teacher: str | ModelSettings | None = None,
    test_data: str | None = None,
    workers: int = 1,
    place: ExecutorSettings | None = None,
    title: str = "distill",
    quiet: bool = False,
) -> "DistillResult":
    """Train the recipe's students on ``manifests`` into ``out``; the same call resumes.

    Default of ``out``: ``runs/RECIPE-FINGERPRINT/distill`` in the working directory, of the first manifest.

    ``teacher`` (settings, or a name as ``--teacher`` takes it) replaces the one that the manifest names; ``test_data``
    (folder of images, Parquet, tars or manifest) scores the students once, at the end. ``workers``: 1 trains in this
    process, more through Ray Train; ``place`` says more of them.

    Raises UsageError where ``out`` is a file or a run of stage 1, DataError where data, teacher and folder do not fit,
    Interrupted (after a checkpoint) on the first Ctrl-C, FactoryError while another process trains in ``out``.
    """
    place = place or executor(workers=workers)
    sources = [parse_source(source) if isinstance(source, str) else source for source in manifests]
    if out is None:
        out = default_out(Manifest.open(sources[0][0], skip_bad=True), recipe)
    storage = Storage(out)
    storage.refuse_file()
    refuse_run(storage)
    from stages.distill.evaluate import check_data
    from stages.distill.run import Prepared, begin, prepare, train_students
    from stages.distill.runtime import Callbacks

    chosen = ModelSettings(name=teacher) if isinstance(teacher, str) else teacher
    parts = place.workers
    with EventLog(storage) as events, ExitStack() as stack:
        signals = stack.enter_context(StopSignals(UNTIL))
        lease, loud = Lease(storage, on_event=events.write, on_line=say), Loud(events)

        def on_event(kind: str, **fields: Any) -> None:
            if kind == "run_started":  # data and teacher fit; nothing was written yet
                stack.enter_context(lease)
            if kind == "teacher_checked":  # data, teacher and folder fit: from here on this is a run folder
                storage.write(RESOLVED, to_yaml(recipe, ("name", "description", "distill")))
                say(check_line(fields))
            loud.write(kind, **fields)

        def should_stop() -> bool:
            lease.check()
            return signals.draining

        def check_and_begin(prepared: Prepared) -> None:
            with progress("test data", quiet=quiet or not test_data, brief=True) as looked_at:

                def on_progress(done: float, total: float, note: str) -> None:
                    looked_at(done, total, note)
                    if signals.draining:
                        raise Interrupted("interrupted before the training began; the same command starts again")

                names = prepared.teacher.class_names
                found = check_data(test_data, names, on_progress) if test_data else {}
            begin(prepared, storage, on_event, parts)
            for line in found.values():
                on_event("note", message=f"test data: {line}")

        if place.inline:
            prepared = prepare(recipe.distill, sources, chosen)
            check_and_begin(prepared)
            shown = Recorder(storage, stack.enter_context(progress(title, quiet=quiet)))
            result = train_students(prepared, storage, test_data, Callbacks(on_event, shown, should_stop))
            assert result is not None  # of the first rank
            shown.finish()
            return result

        import torch

        from pipeline.executors.ray import cluster
        from pipeline.executors.ray_train import train_on_ray
        from stages.distill.results import DistillResult
        from stages.distill.runtime import Ranks

        place = _with_gpus(place, recipe.distill)
        # here once, on the CPU: what does not fit is said at once, and by one process
        prepared = prepare(recipe.distill, sources, chosen, Ranks(device=torch.device("cpu")))
        check_and_begin(prepared)
        shown = Recorder(storage, stack.enter_context(progress(title, quiet=quiet)))
        stack.enter_context(cluster(place))
        if signals.draining:
            raise Interrupted("interrupted before the workers started; the same command resumes")
        signals = stack.enter_context(StopSignals(UNTIL))  # again: starting Ray installs a handler of its own
        job = {
            "settings": recipe.distill.model_dump(mode="json"),
            "sources": sources,
            "teacher": chosen.model_dump(mode="json") if chosen else None,
            "out": storage.url,
            "test_data": test_data,
        }
        result = DistillResult.from_dict(train_on_ray(job, place, on_event, shown, should_stop))
        shown.finish()
        return result


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


@dataclass(frozen=True)
class SourceRows:
    manifest: str
    weight: float
    rows: int
    selected: int


@dataclass(frozen=True)
class DistillEstimate:
    """What ``run_distill`` would train on, for how long and at what ``cost`` (None: not known)."""

    out: str
    settings: dict[str, Any]
    sources: list[SourceRows]
    teacher: str | None
    images_per_epoch: int
    steps_per_epoch: int
    steps: int
    students: list[str]
    workers: int
    cost: "DistillCost | None"
    time: Time | None

    def lines(self) -> Iterator[str]:
        each = self.settings["batch_size"] / self.workers
        at_once = f"{self.workers} through Ray Train, about {each:.0f} images of each batch for one"
        data = [
            f"{source.manifest}: {source.selected} of {source.rows} rows"
            + ("" if source.weight == 1 else f", weight {source.weight:g}")
            for source in self.sources
        ]
        compute, memory = "not known: the teacher is named by --teacher, or a black box", None
        if self.cost:
            parts = ", ".join(f"{name} {flop(value)}" for name, value in self.cost.students.items())
            compute = f"{flop(self.cost.flop)}: teacher {flop(self.cost.teacher)}, {parts} (counted)"
            saved = size(self.cost.saved_bytes_per_batch)
            memory = f"{size(self.cost.weights_bytes)} of weights, {saved} saved for the backward pass of a batch"
        yield from pairs(
            10,
            *(("data", line) for line in data),
            ("teacher", str(self.teacher)),
            ("students", ", ".join(self.students)),
            ("workers", at_once if self.workers > 1 else None),
            ("length", f"about {self.steps} steps ({self.steps_per_epoch} an epoch)"),
            ("compute", compute),
            ("memory", memory),
            *(self.time.entries() if self.time else ()),
            ("out", self.out),
            *changed_lines(self.settings, DistillSettings().model_dump(mode="json"), "distill."),
        )


def dry_run(
    recipe: Recipe,
    sources: Sequence[tuple[str, float]],
    out: str,
    teacher: str | ModelSettings | None,
    workers: int = 1,
    price: float | None = None,
    test_data: str | None = None,
) -> DistillEstimate:
    """What ``run_distill`` would do, after its own checks of device, teacher, data and folder; writes nothing, and
    reads no image."""
    from stages.distill.batches import batch_bounds
    from stages.distill.evaluate import check_data
    from stages.distill.rows import EpochOrder, select_rows, split_validation
    from stages.distill.teacher_check import find_teacher
    from stages.memory import find_device

    teacher = ModelSettings(name=teacher) if isinstance(teacher, str) else teacher
    Storage(out).refuse_file()
    refuse_run(Storage(out))

    settings = recipe.distill
    manifests = [(Manifest.open(url, skip_bad=settings.skip_bad), weight) for url, weight in sources]
    rows = select_rows(manifests, settings.model_copy(update={"skip_bad": False}))
    device = find_device(settings.device if workers == 1 else "cpu")
    loaded = find_teacher([each for each, _ in manifests], teacher, settings.allow_other_teacher, device)
    if test_data:
        check_data(test_data, loaded.class_names)
    images = EpochOrder(rows, split_validation(rows, settings.val_fraction, settings.seed)[0], settings).length
    batches = len(batch_bounds(images, settings.batch_size)) - 1
    manifest = manifests[0][0]
    steps = settings.total_steps(batches)
    seen = images * steps // batches
    total = cost(settings, manifest, teacher, seen, len(rows))
    return DistillEstimate(
        out=Storage(out).url,
        settings=settings.model_dump(mode="json"),
        sources=[
            SourceRows(each.url, weight, each.num_rows, len(selection))
            for (each, weight), selection in zip(manifests, rows.selections, strict=True)
        ],
        teacher=teacher.name if teacher else manifest.info.teacher.get("architecture"),
        images_per_epoch=images,
        steps_per_epoch=batches,
        steps=steps,
        students=list(settings.students),
        workers=workers,
        cost=total,
        time=Time.of("distill", recipe, seen, total.flop if total else None, workers, price),
    )


def cost(
    settings: DistillSettings, manifest: Manifest, teacher: ModelSettings | None, views: int, rows: int
) -> "DistillCost | None":
    """The cost of training on ``views`` of the images of ``rows`` (the cache answers to every row); None where the
    teacher is not at hand or a black box."""
    from stages.cost import distill_cost
    from stages.models.loading import dataset_teacher_config, untrained_teacher

    if not teacher and manifest.info.teacher.get("kind") != "builtin":
        return None
    if (shape := untrained_teacher(resolve(teacher) if teacher else dataset_teacher_config(manifest))) is None:
        return None
    answers = rows * settings.augment.num_views if settings.teacher_cache.enabled else views
    return distill_cost(settings, shape, manifest.info.image_size, views, answers)
