"""``factory report``: a dataset and its students on one page."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.options import JsonOption
from pipeline.terminal import duration, plain, show, size


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
        typer.Option(metavar="FOLDER", help="Run of stage 2; repeatable (default: RUN/distill).", show_default=False),
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
    from pipeline.inspect import save
    from pipeline.report import make_report

    started = time.monotonic()
    page = make_report(run, students or None, test_data, measure=not no_metrics)
    name = run.rstrip("/").removesuffix("/m.parquet").rsplit("/", 1)[-1].removesuffix(".parquet")
    target = out or Path(f"report-{name or 'run'}.html")
    save(page.html, target)
    seconds = round(time.monotonic() - started, 1)
    show(ReportFile(str(target), len(page.html), page.rows, page.pictures, seconds), as_json)
