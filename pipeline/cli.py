"""The ``factory`` command: sub-commands, exit codes, one-line errors. Imports no torch, so that ``--help`` is quick.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 data that is missing, damaged or does not fit, 130 interrupted (the
same command resumes).
"""

import atexit
import contextlib
import io
import os
import sys
from typing import Annotated

import typer

from manifests.errors import FactoryError, check_utf8
from pipeline.commands import bench, data, export, first, models, report, run

app = typer.Typer(
    name="factory",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="A two-stage data factory: a diffusion model guided by a teacher makes data, a student is distilled from it.",
    epilog="Exit codes: 0 done, 1 failed, 2 usage, 3 data does not fit, 130 interrupted (the same command resumes).",
)
app.add_typer(run.app, name="run")
app.command()(run.demo)
app.command()(first.init)
app.command()(first.doctor)
app.command()(models.recipes)
app.command(rich_help_panel="Look")(data.status)
app.command(rich_help_panel="Look")(data.inspect)
app.command(rich_help_panel="Look")(report.report)
app.command(rich_help_panel="Look")(data.verify)
app.command(rich_help_panel="Look")(bench.bench)
app.command(name="eval", rich_help_panel="Look")(models.evaluate)
app.command(rich_help_panel="Look")(first.predict)
app.add_typer(export.app, name="export", rich_help_panel="Keep")
app.command(rich_help_panel="Keep")(data.rescore)
app.command(rich_help_panel="Keep")(data.gc)
app.command(rich_help_panel="Keep")(data.rebuild)

DEBUG, STALL = "FACTORY_DEBUG", "FACTORY_STALL_SECONDS"


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(version("dfkd-factory"))
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", envvar=DEBUG, help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", is_eager=True, callback=_version)
    ] = False,
    stall_seconds: Annotated[
        float, typer.Option(envvar=STALL, min=1, help="How long a store may give no answer.")
    ] = 60.0,
) -> None:
    """Options of every command; ``main`` looks at ``--debug`` itself, since errors reach it outside any command."""
    from manifests.storage import PATIENCE
    from pipeline.terminal import say

    PATIENCE.stall_seconds, PATIENCE.on_wait = stall_seconds, say


def main() -> None:
    """Run the command and raise SystemExit with its exit code."""
    try:
        for word in sys.argv:
            check_utf8(word)
        app()
    except FactoryError as error:
        if "--debug" in sys.argv or os.environ.get(DEBUG):
            raise
        from pipeline.terminal import plain

        for line in str(error).splitlines() or [type(error).__name__]:
            print(plain(line), file=sys.stderr)
        sys.exit(error.exit_code)


def script() -> None:
    """The ``factory`` script: :func:`main`, then leave without tearing down native thread pools.

    Their end inside a dying interpreter now and then aborts ("terminate called without an active exception"), and a
    run whose work is done must exit 0.
    """
    code = 0
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal or pipe that is said to be ASCII
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nobody reads a closed pipe
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    script()
