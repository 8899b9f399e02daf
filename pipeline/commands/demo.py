"""``factory demo``: both stages on the embedded default, guided and unguided, on a fresh machine, offline."""

from typing import Annotated

import typer

from pipeline.commands.options import JsonOption, RetryOption, SetOption, answer


def demo(
    out: Annotated[str, typer.Option("--out", "-o", metavar="FOLDER", help="Where the results go.")] = "demo",
    set_: SetOption = None,
    workers: Annotated[
        int, typer.Option(envvar="FACTORY_WORKERS", help="1 runs in this process, more as Ray actors.")
    ] = 1,
    retry_failed: RetryOption = False,
    as_json: JsonOption = False,
) -> None:
    """Guided and unguided data, a student from each, and a table. Run again, it takes up where it stopped."""
    from pipeline.demo import lines, run_demo

    answer(run_demo(out, set_ or [], workers, retry_failed), as_json, lines)
