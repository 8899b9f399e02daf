"""The ``factory`` command: sub-commands, exit codes, one-line errors. Imports no torch, so that ``--help`` is quick.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 data that is missing, damaged or does not fit, 130 interrupted (the
same command resumes).
"""

import atexit
import contextlib
import io
import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from manifests.errors import FactoryError, check_utf8
from pipeline.commands import bench, data, export, models, report, run, setup
from pipeline.commands.options import Commands

LOOK, KEEP = "Look", "Keep"
COMMANDS: tuple[tuple[str, Callable[..., None], str | None, str], ...] = (
    ("demo", run.demo, None, "factory demo"),
    ("init", setup.init, None, "factory init mine.pt --arch resnet20 --classes classes.json"),
    ("doctor", setup.doctor, None, "factory doctor -c mine.yaml --out s3://bucket/run"),
    ("recipes", models.recipes, None, "factory recipes photos > mine.yaml"),
    ("prompts", models.prompts, None, "factory prompts -c mine.yaml --first 5"),
    ("status", data.status, LOOK, "factory status runs/mine --watch"),
    ("inspect", data.inspect, LOOK, "factory inspect runs/mine/m.parquet --metrics"),
    ("report", report.report, LOOK, "factory report runs/mine --out mine.html"),
    ("compare", report.compare, LOOK, "factory compare runs/guided runs/unguided --out compared.html"),
    ("verify", data.verify, LOOK, "factory verify runs/mine"),
    ("bench", bench.bench, LOOK, "factory bench -c mine.yaml --seconds 120"),
    ("eval", models.evaluate, LOOK, "factory eval runs/mine/distill/resnet8 test-images --teacher mine.yaml"),
    ("predict", models.predict, LOOK, "factory predict runs/mine/distill/resnet8 photos --top 3 --csv found.csv"),
    ("import", data.import_, KEEP, "factory import photos --teacher mine.yaml --out runs/photos --license CC-BY-4.0"),
    ("rescore", data.rescore, KEEP, "factory rescore runs/mine/m.parquet --threshold 0.8"),
    ("gc", data.gc, KEEP, "factory gc runs/mine --dry-run"),
    ("rebuild", data.rebuild, KEEP, "factory rebuild runs/mine"),
)
"""Name, function, panel of the help and example of every command but those of ``run``."""


app = typer.Typer(
    name="factory",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="A two-stage data factory: a diffusion model guided by a teacher makes data, a student is distilled from it.",
    epilog="Exit codes: 0 done, 1 failed, 2 usage, 3 data does not fit, 130 interrupted (the same command resumes).",
)
app.add_typer(run.app, name="run")
app.add_typer(export.app, name="export", rich_help_panel=KEEP)
for _name, _function, _panel, _example in COMMANDS:
    app.command(_name, rich_help_panel=_panel, epilog=f"Example: {_example}")(_function)

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
