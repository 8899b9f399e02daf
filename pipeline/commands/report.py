"""``factory report``: a dataset and its students on one page."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.options import JsonOption
from pipeline.terminal import duration, plain, say, show, size


@dataclass(frozen=True)
class ReportFile:
    """The page that was written, the rows it is about and the images it shows."""

    report: str
    bytes: int
    rows: int
    pictures: int
    seconds: float

    def lines(self) -> Iterator[str]:
        about = f"{self.rows:,} rows, {self.pictures:,} pictures, {size(self.bytes)}"
        yield f"{plain(self.report)}: {about}, {duration(self.seconds)}"


def report(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN|MANIFEST", help="Run folder of stage 1, or m.parquet.", show_default=False),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="The page (default: ./report-RUN.html).", show_default=False),
    ] = None,
    students: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FOLDER", help="Run of stage 2; repeatable (default: those that status lists).", show_default=False
        ),
    ] = None,
    test_data: Annotated[
        str | None, typer.Option(help="Labeled images: show those that students get wrong.", show_default=False)
    ] = None,
    no_metrics: Annotated[
        bool, typer.Option("--no-metrics", help="Do not run the teacher: no BatchNorm gap, no diversity.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """One HTML page to look at a dataset and its students: galleries, thresholds, verdicts. Writes nothing into RUN."""
    from manifests.reader import Manifest
    from pipeline.inspect import save
    from pipeline.outputs import outside
    from pipeline.report import make_report

    started = time.monotonic()
    if out is None:
        out = Path(outside(Manifest.open(run, skip_bad=True), _page_name(run), "--out"))
    page = make_report(run, students or None, test_data, measure=not no_metrics)
    save(page.html, out)
    seconds = round(time.monotonic() - started, 1)
    show(ReportFile(str(out), len(page.html), page.rows, page.pictures, seconds), as_json)


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN…", help="Run folders of either stage, or manifests.", show_default=False),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="A page to write (HTML).", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Runs and their students side by side: accuracy, agreement, images, cost, and which settings differ."""
    from pipeline.compare import compare as beside
    from pipeline.inspect import save

    found = beside(runs)
    show(found, as_json)
    if out:
        save(found.page(), out)
        say(f"page: {out}")


def _page_name(run: str) -> str:
    name = run.rstrip("/").removesuffix("/m.parquet").rsplit("/", 1)[-1].removesuffix(".parquet")
    return f"report-{name or 'run'}.html"
