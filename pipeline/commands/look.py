"""``factory status``, ``inspect`` and ``verify``: read a dataset, change nothing in it; ``inspect`` adds a picture."""

import time
from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.options import JsonOption, RunArgument, answer

SHEET = "sheet.png"
ManifestArgument = Annotated[
    str, typer.Argument(metavar="MANIFEST", help="m.parquet (path or URL).", show_default=False)
]


def status(
    run: RunArgument,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Again and again until the run ends.")] = False,
    interval: Annotated[float, typer.Option(help="Seconds between looks.", min=0.1)] = 2.0,
    as_json: JsonOption = False,
) -> None:
    """Where a run stands: done, running, failed, rate, time left. Works from any process."""
    from manifests.storage import Storage
    from pipeline.status import lines
    from pipeline.status import status as look

    storage = Storage(run)
    while True:
        result = look(storage)
        answer(result, as_json, lines)
        if not watch or result["state"] != "running":
            return
        if not as_json:
            print(flush=True)
        time.sleep(interval)


def inspect(
    manifest: ManifestArgument,
    where: Annotated[
        str | None, typer.Option(help='Rows to look at, e.g. "confidence > 0.9".', show_default=False)
    ] = None,
    sheet: Annotated[
        Path | None,
        typer.Option(help="Contact sheet to write (PNG) (default: sheet.png beside the manifest).", show_default=False),
    ] = None,
    columns: Annotated[int, typer.Option(help="Pictures per class on the sheet.", min=1, max=200)] = 12,
    metrics: Annotated[
        bool, typer.Option("--metrics", help="Statistics gap, diversity, near-duplicates (runs the teacher).")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Summary of a manifest, metrics that need no real data, and a contact sheet of its kept images."""
    from manifests.errors import DataError, StoreError
    from manifests.reader import Manifest
    from pipeline import inspect as look
    from pipeline.pictures import save
    from pipeline.progress import say

    opened = Manifest.open(manifest)
    summary = look.summarise(opened, where)
    if metrics:
        summary["metrics"] = look.metrics(opened, where) if summary["kept"] else None
    if summary["kept"]:
        picture = look.sheet(opened, where, columns)
        target = str(sheet) if sheet is not None else opened.storage.path(SHEET)
        try:
            if sheet is not None:
                save(picture, sheet)
            else:
                opened.storage.write(SHEET, picture, beside=True)
            summary["sheet"] = target
        except (StoreError, DataError) as error:
            if sheet is not None:
                raise
            say(f"no contact sheet: {error}; --sheet FILE puts it elsewhere")
    answer(summary, as_json, look.lines)


def verify(
    run: Annotated[str, typer.Argument(metavar="RUN|MANIFEST", help="Run folder or m.parquet.", show_default=False)],
    quick: Annotated[bool, typer.Option("--quick", help="Existence and sizes only, no checksums.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Check plan, done records, tars, tables, manifest and every image; exit 3 where something is wrong."""
    from manifests.errors import DataError
    from manifests.verify import verify as check
    from pipeline.text import plain

    problems = [{"where": problem.where, "what": problem.what} for problem in check(run, deep=not quick)]
    result = {"run": run, "ok": not problems, "problems": problems}
    answer(
        result,
        as_json,
        lambda r: [f"{plain(p['where'])}: {plain(p['what'])}" for p in r["problems"]] or [f"{plain(run)}: intact"],
    )
    if problems:
        raise typer.Exit(DataError.exit_code)
