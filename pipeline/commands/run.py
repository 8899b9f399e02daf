"""``factory demo``, ``run synth``, ``run distill`` and ``run rounds``: what makes datasets and students."""

import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from manifests.errors import DataError, FactoryError, UsageError
from pipeline.commands.options import (
    ActorsOption,
    AddressOption,
    BestOption,
    Commands,
    DeviceOption,
    DryRunOption,
    EpochsOption,
    ExcludeKeysOption,
    ImagesOption,
    JsonOption,
    KeysOption,
    NoReportOption,
    PriceOption,
    RecipeOption,
    RetryOption,
    SetOption,
    StepsOption,
    TestDataOption,
    WhereOption,
    exclusive,
    next_step,
    option,
    place_option,
)
from pipeline.terminal import say, show

if TYPE_CHECKING:
    from stages.distill.results import DistillResult


def demo(
    out: Annotated[
        str | None,
        option("--out", "-o", metavar="FOLDER", help="Where the results go (default: demo, or demo-photos)."),
    ] = None,
    photos: Annotated[
        bool, typer.Option("--photos", help="With photographs and a CIFAR-10 teacher; in a clone, 15 minutes.")
    ] = False,
    eval_: Annotated[
        str | None, option("--eval", metavar="DATA", help="With --photos: labeled CIFAR-10 images to score on.")
    ] = None,
    set_: SetOption = None,
    workers: Annotated[
        int, typer.Option(envvar="FACTORY_WORKERS", help="1 runs in this process, more as Ray actors.")
    ] = 1,
    retry_failed: RetryOption = False,
    no_report: NoReportOption = False,
    as_json: JsonOption = False,
) -> None:
    """Guided and unguided data, a student from each, and a table. Run again, it takes up where it stopped."""
    from manifests.storage import check_url
    from pipeline.demo import DATASETS, TEST, DemoResult, PhotosResult, run_demo, run_photos
    from pipeline.report import write_report

    if eval_ and not photos:
        raise UsageError("--eval goes with --photos: the demo brings its own test digits")
    folder = check_url(("demo-photos" if photos else "demo") if out is None else out)
    result: DemoResult | PhotosResult
    if photos:
        result = run_photos(folder, set_ or [], workers, retry_failed, eval_)
    else:
        result = run_demo(folder, set_ or [], workers, retry_failed)
    show(result, as_json)
    if not no_report:
        students = [f"{result.out}/{name}/distill" for name in DATASETS]
        write_report(f"{result.out}/{DATASETS[0]}", result.out, students, eval_ if photos else f"{result.out}/{TEST}")
    next_step("init", "YOUR-TEACHER", "-o", "mine.yaml")


def synth(
    recipe: RecipeOption = None,
    out: Annotated[
        str | None, option("--out", "-o", metavar="RUN", help="Run folder, path or URL (default: runs/RECIPE).")
    ] = None,
    shards: Annotated[int | None, option(help="Shards in total; may grow later.")] = None,
    images: ImagesOption = None,
    method: Annotated[str | None, option(help="diffdfkd, dmkd, dda, cmi, deepinversion, noise (a load test).")] = None,
    prior: Annotated[str | None, option(help="Diffusers folder, hub id or embedded:NAME.")] = None,
    teacher: Annotated[str | None, option(help="Model folder or embedded:NAME.")] = None,
    adversary: Annotated[str | None, option(help="Model folder of a frozen student to disagree with.")] = None,
    seed: Annotated[int | None, option(help="Seed of the whole dataset.")] = None,
    set_: SetOption = None,
    workers: ActorsOption = None,
    address: AddressOption = None,
    gpus_per_worker: Annotated[
        float | None, place_option(help="Fractions allowed (default: 1 where there are any).")
    ] = None,
    memory_per_worker: Annotated[float | None, place_option(help="GiB that each worker reserves.")] = None,
    time_limit: Annotated[float | None, place_option(help="Seconds that a shard may take.")] = None,
    device: DeviceOption = None,
    retry_failed: RetryOption = False,
    dry_run: DryRunOption = False,
    no_report: NoReportOption = False,
    price: PriceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Stage 1: synthesize a dataset. The same command again resumes; more --images or --shards add to it."""
    from manifests.storage import check_url
    from pipeline import synth as stage
    from pipeline.executors.settings import executor
    from pipeline.recipe import DEFAULT, resolve
    from pipeline.report import write_report
    from pipeline.run_all import with_images

    exclusive("--images", images, "--shards", shards)
    flags = {
        "synth.shards": ("--shards", shards),
        "synth.method": ("--method", method),
        "synth.prior.path": ("--prior", prior),
        "synth.teacher.name": ("--teacher", teacher),
        "synth.adversary.name": ("--adversary", adversary),
        "synth.seed": ("--seed", seed),
        "synth.device": ("--device", device),
    }
    resolved = with_images(resolve(recipe or DEFAULT, section="synth", sets=set_ or (), flags=flags), images)
    reserved = {"gpus_per_worker": gpus_per_worker, "memory_per_worker": memory_per_worker}
    place = executor(workers=workers, address=address, time_limit=time_limit, retry_failed=retry_failed, **reserved)
    folder = f"runs/{resolved.name}" if out is None else check_url(out)
    if dry_run:
        show(stage.dry_run(resolved, folder, place.workers, price), as_json)
        return
    result = stage.run_synth(resolved, folder, place)
    show(result, as_json)
    if not no_report:
        write_report(result.manifest)
    if result.kept:
        next_step("run", "distill", "-m", result.manifest, *(("-c", recipe) if recipe else ()))


def distill(
    manifest: Annotated[
        list[str], option("--manifest", "-m", metavar="FILE[@WEIGHT]", help="m.parquet of a dataset; repeatable.")
    ],
    recipe: RecipeOption = None,
    out: Annotated[
        str | None,
        option(
            "--out",
            "-o",
            metavar="FOLDER",
            help="Where students go (default: runs/RECIPE-FINGERPRINT/distill).",
        ),
    ] = None,
    student: Annotated[
        list[str] | None, option("--student", help="Architecture; repeatable, trained in one pass.")
    ] = None,
    teacher: Annotated[str | None, option(help="Model folder or embedded:NAME (default: the manifest's own).")] = None,
    where: WhereOption = None,
    keys: KeysOption = None,
    exclude_keys: ExcludeKeysOption = None,
    best: BestOption = None,
    epochs: EpochsOption = None,
    steps: StepsOption = None,
    batch_size: Annotated[int | None, option(help="Images per step, over all workers together.")] = None,
    seed: Annotated[int | None, option(help="Seed of the training.")] = None,
    test_data: TestDataOption = None,
    skip_bad: Annotated[
        bool, option("--skip-bad", help="Leave out images that are missing or altered; without it they stop the run.")
    ] = False,
    set_: SetOption = None,
    workers: Annotated[
        int | None,
        place_option(
            help="1 trains in this process (default), more through Ray Train, each with a GPU if any.",
            envvar="FACTORY_WORKERS",
        ),
    ] = None,
    address: AddressOption = None,
    device: DeviceOption = None,
    dry_run: DryRunOption = False,
    no_report: NoReportOption = False,
    price: PriceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Stage 2: distill students from manifests. The manifest alone is enough: it names its teacher and recipe."""
    from manifests.reader import Manifest, parse_source
    from manifests.storage import check_url
    from pipeline import distill as stage
    from pipeline.executors.settings import executor
    from pipeline.report import write_report
    from stages.settings import ModelSettings

    exclusive("--steps", steps, "--epochs", epochs)
    flags = {
        "distill.students": ("--student", student or None),
        "distill.where": ("--where", where),
        "distill.keys": ("--keys", keys),
        "distill.exclude_keys": ("--exclude-keys", exclude_keys),
        "distill.best": ("--best", best),
        "distill.epochs": ("--epochs", epochs),
        "distill.steps": ("--steps", steps),
        "distill.batch_size": ("--batch-size", batch_size),
        "distill.seed": ("--seed", seed),
        "distill.skip_bad": ("--skip-bad", skip_bad or None),
        "distill.device": ("--device", device),
    }
    sources = [parse_source(text) for text in manifest]
    first, *_ = [Manifest.open(url, skip_bad=True) for url, _ in sources]
    resolved = stage.resolve_distill(first, recipe, set_ or (), flags)
    folder = stage.default_out(first, resolved) if out is None else check_url(out)
    place = executor(workers=workers, address=address)
    named = ModelSettings(name=teacher) if teacher else stage.teacher_for(first, resolved)
    if dry_run:
        show(stage.dry_run(resolved, sources, folder, named, place.workers, price, test_data), as_json)
        return
    if out is None:
        say(f"students go to {folder}")
    result = stage.run_distill(resolved, sources, folder, teacher=named, test_data=test_data, place=place)
    show(result, as_json, stage.result_lines(result))
    if not no_report:
        write_report(first.url, folder, [folder], test_data)
    _end(result)


def _end(result: "DistillResult") -> None:
    """What to do with the students; exit codes where one was parked or has no score."""
    if student := next(iter(result.students.values()), None):
        next_step("export", "student", student.folder, "--onnx", f"{student.folder}/model.onnx")
    if result.parked or result.unscored:
        raise typer.Exit((FactoryError if result.parked else DataError).exit_code)


def run_both(
    recipe: RecipeOption = None,
    out: Annotated[
        str | None,
        option("--out", "-o", metavar="RUN", help="Folder of the dataset, its students in RUN/distill (runs/RECIPE)."),
    ] = None,
    images: ImagesOption = None,
    epochs: EpochsOption = None,
    steps: StepsOption = None,
    test_data: TestDataOption = None,
    set_: SetOption = None,
    workers: ActorsOption = None,
    address: AddressOption = None,
    device: DeviceOption = None,
    retry_failed: RetryOption = False,
    dry_run: DryRunOption = False,
    no_report: NoReportOption = False,
    price: PriceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Both stages and the report. The same command again resumes where it stopped."""
    from manifests.storage import check_url
    from pipeline import run_all as stages
    from pipeline.executors.settings import executor
    from pipeline.recipe import DEFAULT, resolve
    from pipeline.report import write_report

    exclusive("--steps", steps, "--epochs", epochs)
    flags = {
        "distill.epochs": ("--epochs", epochs),
        "distill.steps": ("--steps", steps),
        "synth.device": ("--device", device),
        "distill.device": ("--device", device),
    }
    resolved = stages.with_images(resolve(recipe or DEFAULT, sets=set_ or (), flags=flags), images)
    place = executor(workers=workers, address=address, retry_failed=retry_failed)
    folder = f"runs/{resolved.name}" if out is None else check_url(out)
    if dry_run:
        show(stages.dry_run(resolved, folder, test_data, place.workers, price), as_json)
        return
    result = stages.run_all(resolved, folder, place, test_data=test_data)
    show(result, as_json)
    if not no_report:
        write_report(result.synth.manifest, None, [result.students_folder], test_data)
    _end(result.distill)


def rounds(
    out: Annotated[str, option("--out", "-o", metavar="FOLDER", help="A folder for each round goes here.")],
    recipe: RecipeOption = None,
    count: Annotated[int | None, option("--rounds", help="Rounds in total; may grow later.")] = None,
    test_data: Annotated[
        str | None, option(help="Labeled images to score each round's student: tars, folder or Parquet.")
    ] = None,
    set_: SetOption = None,
    workers: ActorsOption = None,
    device: DeviceOption = None,
    retry_failed: RetryOption = False,
    dry_run: DryRunOption = False,
    no_report: NoReportOption = False,
    as_json: JsonOption = False,
) -> None:
    """Both stages in turn: later images avoid what the student already knows. The same command again resumes."""
    from manifests.storage import check_url
    from pipeline import rounds as stages
    from pipeline.executors.settings import executor
    from pipeline.recipe import DEFAULT, resolve
    from pipeline.report import write_report

    flags = {
        "rounds.count": ("--rounds", count),
        "synth.device": ("--device", device),
        "distill.device": ("--device", device),
    }
    resolved = resolve(recipe or DEFAULT, sets=set_ or (), flags=flags)
    place = executor(workers=workers, retry_failed=retry_failed)
    if dry_run:
        first, rounds = stages.dry_run(resolved, out, place.workers), resolved.rounds
        lines = (*first.lines(), stages.rounds_line(rounds))
        show(asdict(first) | {"rounds": rounds.model_dump(mode="json")}, as_json, lines)
        return
    result = stages.run_rounds(resolved, check_url(out), place, test_data=test_data)
    show(result, as_json)
    if not no_report:  # of the last round, with the students of all
        students = [f"{os.path.dirname(manifest)}/distill" for manifest in result.manifests]
        write_report(result.manifests[-1], result.out, students, test_data)
    next_step("export", "student", result.student, "--onnx", f"{result.student}/model.onnx")
    if test_data and any(each.accuracy is None for each in result.rounds):
        raise typer.Exit(DataError.exit_code)


COMMANDS = (
    ("all", run_both, "factory run all -c mine.yaml --images 1500 --test-data test-images"),
    ("synth", synth, "factory run synth -c mine.yaml --images 1500 --out runs/mine"),
    ("distill", distill, "factory run distill -m runs/mine/m.parquet --student resnet8 --epochs 200"),
    ("rounds", rounds, "factory run rounds -c mine.yaml --rounds 3 --out runs/rounds"),
)
"""Name, function and example of each."""
app = typer.Typer(cls=Commands, no_args_is_help=True, help="Run a stage: make the data, or distill from it; or both.")
for _name, _function, _example in COMMANDS:
    app.command(_name, epilog=f"Example: {_example}")(_function)
