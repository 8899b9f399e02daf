"""``factory status``, ``inspect``, ``verify``, ``gc``, ``rebuild`` and ``rescore``: look at a run and keep it."""

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.options import (
    BestOption,
    DeviceOption,
    ExcludeKeysOption,
    JsonOption,
    KeysOption,
    RecipeOption,
    RunArgument,
    SetOption,
    WhereOption,
    argument,
    next_step,
    option,
)
from pipeline.terminal import plain, show

ManifestArgument = Annotated[str, argument(metavar="MANIFEST", help="m.parquet (path or URL).")]


def status(
    run: Annotated[str, argument(metavar="RUN", help="Run folder of either stage, or a folder of runs (path or URL).")],
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Again and again until the run ends.")] = False,
    interval: Annotated[float, typer.Option(help="Seconds between looks.", min=0.1)] = 2.0,
    as_json: JsonOption = False,
) -> None:
    """Where a run stands: done, running, failed, rate, time left, how sure the teacher is, the growing contact sheet.
    Works from any process, for both stages and for folders of runs."""
    from manifests.storage import Storage
    from pipeline.status import status as look

    storage = Storage(run)
    while True:
        result = look(storage)
        show(result, as_json)
        if not watch or result.state != "running":
            return
        if not as_json:
            print(flush=True)
        time.sleep(interval)


def inspect(
    manifest: ManifestArgument,
    where: WhereOption = None,
    keys: KeysOption = None,
    exclude_keys: ExcludeKeysOption = None,
    best: BestOption = None,
    sheet: Annotated[
        Path | None, option(help="Contact sheet to write (PNG) (default: runs/RECIPE-FINGERPRINT/sheet.png).")
    ] = None,
    columns: Annotated[int, typer.Option(help="Pictures per class on the sheet.", min=1, max=200)] = 12,
    cell: Annotated[
        int | None, option(help="Pixels of a picture on the sheet (default: true scale).", min=8, max=1024)
    ] = None,
    metrics: Annotated[
        bool, typer.Option("--metrics", help="Statistics gap, diversity, near-duplicates (runs the teacher).")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Summary of a manifest, metrics that need no real data, and a contact sheet of its kept images."""
    from manifests.curate import Selection
    from manifests.errors import DataError, StoreError, UsageError
    from manifests.reader import Manifest
    from manifests.storage import Storage
    from pipeline import inspect as look
    from pipeline.outputs import SHEET, default_folder
    from pipeline.terminal import say

    opened = Manifest.open(manifest)
    if keys or exclude_keys or best:  # the best are those of the kept images, as everywhere
        opened = Selection(where, best is None, keys, exclude_keys, best).of(opened)
    summary = look.summarize(opened, where)
    if metrics and summary.kept:
        summary = replace(summary, metrics=look.metrics(opened, where))
    if summary.kept:
        picture = look.png(look.contact_sheet(look.samples(opened, where, columns), cell))
        try:
            if sheet:
                look.save(picture, sheet)
            else:
                folder = Storage(default_folder(opened, summary.recipe, "--sheet"))
                folder.write(SHEET, picture, beside=True)
            summary = replace(summary, sheet=str(sheet or folder.path(SHEET)))
        except (StoreError, DataError, UsageError) as error:
            if sheet:
                raise
            say(f"no contact sheet: {error}; --sheet FILE puts it elsewhere")
    show(summary, as_json)
    if summary.kept:
        next_step("run", "distill", "-m", opened.url)


def verify(
    run: Annotated[str, argument(metavar="RUN|MANIFEST", help="Run folder or m.parquet.")],
    quick: Annotated[bool, typer.Option("--quick", help="Existence and sizes only, no checksums.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Check plan, done records, tars, tables, manifest and every image; exit 3 where something is wrong."""
    from manifests.errors import DataError
    from manifests.integrity import verify as check

    problems = check(run, deep=not quick)
    report = {"run": run, "ok": not problems, "problems": [asdict(problem) for problem in problems]}
    show(report, as_json, map(plain, problems) if problems else [f"{plain(run)}: intact"])
    if problems:
        raise typer.Exit(DataError.exit_code)


def gc(
    run: Annotated[str, argument(metavar="RUN", help="Run folder of stage 1 or 2 (path or URL).")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove what killed attempts left behind. Done shards, checkpoints and students are never touched."""
    from manifests.storage import Storage
    from pipeline.repair import collect

    show(collect(Storage(run), dry_run), as_json)


def rebuild(run: RunArgument, as_json: JsonOption = False) -> None:
    """Make tables, done records and m.parquet again from the tars alone (a lost or damaged index)."""
    from manifests.errors import DataError
    from pipeline.repair import rebuild_run

    result = rebuild_run(run)
    show(result, as_json)
    if result.damaged:
        raise typer.Exit(DataError.exit_code)
    next_step("verify", run)


def rescore(
    manifest: ManifestArgument,
    teacher: Annotated[
        str | None, option(metavar="FOLDER|NAME", help="Judge of the images (default: the dataset's).")
    ] = None,
    threshold: Annotated[
        float | None, option(help="Keep images whose class gets at least this (default: as before).")
    ] = None,
    out: Annotated[
        str | None, option("--out", "-o", metavar="FILE", help="In the dataset's folder (default: rescored.parquet).")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda …")] = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Teacher columns and kept flags again, for another teacher or threshold. Makes a new manifest, no new images."""
    from pipeline.rescore import rescore as judge

    result = judge(manifest, teacher, threshold, out, device)
    show(result, as_json)
    next_step("run", "distill", "-m", result.manifest)


def import_(
    data: Annotated[str, argument(metavar="DATA", help="Folder of images, WebDataset tars or Parquet; patterns, too.")],
    out: Annotated[str, option("--out", "-o", metavar="RUN", help="Run folder (path or URL).")],
    teacher: Annotated[str | None, option(help="Model folder or embedded:NAME (default: the recipe's).")] = None,
    recipe: RecipeOption = None,
    labels: Annotated[str, typer.Option(help="data, teacher, or auto: those of the data where they fit.")] = "auto",
    size: Annotated[
        int | None,
        option(help="Stored side in pixels: that of the dataset to mix with (default: what the teacher sees)."),
    ] = None,
    threshold: Annotated[
        float | None, option(help="Keep images to whose class the teacher gives at least this.", min=0, max=1)
    ] = None,
    source: Annotated[str | None, option(help="Where the images come from, for the card (default: its name).")] = None,
    license_: Annotated[str | None, option("--license", help="License of the images, for the card.")] = None,
    device: DeviceOption = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Images from elsewhere as a dataset, scored by the teacher. The same command again resumes."""
    from manifests.errors import UsageError
    from pipeline.import_data import DEFAULTS, import_data
    from pipeline.layers import mapping_layer
    from pipeline.recipe import resolve

    if teacher is None and recipe is None:
        raise UsageError("name the teacher that scores the images: --teacher, or a recipe that has one")
    flags = {
        "synth.teacher.name": ("--teacher", teacher),
        "synth.images.size": ("--size", size),
        "synth.min_confidence": ("--threshold", threshold),
        "synth.device": ("--device", device),
    }
    base = mapping_layer(DEFAULTS, "factory import")
    resolved = resolve(recipe, section="synth", sets=set_ or (), flags=flags, base=base)
    result = import_data(resolved, data, out, labels, source, license_)
    show(result, as_json)
    if result.dataset.kept:
        next_step("run", "distill", "-m", result.dataset.manifest, "--where", "entropy < 0.5")
