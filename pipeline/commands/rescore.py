"""``factory rescore``: another teacher's judgement of the same images."""

from typing import Annotated

import typer

from pipeline.commands.look import ManifestArgument
from pipeline.commands.options import JsonOption, answer


def rescore(
    manifest: ManifestArgument,
    teacher: Annotated[
        str | None,
        typer.Option(metavar="FOLDER|NAME", help="Judge of the images (default: the dataset's).", show_default=False),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="Keep images whose class gets at least this (default: as before).", show_default=False),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="In the dataset's folder (default: rescored.parquet).",
            show_default=False,
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda …")] = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Teacher columns and kept flags again, for another teacher or threshold. Makes a new manifest, no new images."""
    from pipeline.rescore import report_lines
    from pipeline.rescore import rescore as judge

    answer(judge(manifest, teacher, threshold, out, device), as_json, report_lines)
