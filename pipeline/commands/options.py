"""Options that several commands share, and how commands answer."""

from collections.abc import Callable, Iterable
from typing import Annotated, Any

import typer

from manifests.checked_json import dump_json
from pipeline.terminal import plain

RESULT = "Result"
PLACE = "Where it runs"

RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        "-c",
        metavar="NAME|FILE",
        help="Packaged recipe (`factory recipes` lists them) or YAML file.",
        show_default=False,
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any setting by its dotted key; repeatable.", show_default=False),
]
DryRunOption = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Show settings, sizes, cost; make nothing (a hub's prior is fetched).", rich_help_panel=RESULT
    ),
]
RetryOption = Annotated[
    bool, typer.Option("--retry-failed", help="Try quarantined shards again.", rich_help_panel=PLACE)
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.", rich_help_panel=RESULT)]
RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="Run folder of stage 1 (path or URL).", show_default=False)
]


def answer(result: dict[str, Any], as_json: bool, lines: Callable[[dict[str, Any]], Iterable[str]]) -> None:
    """Print ``result`` on stdout, as JSON or as the lines that ``lines`` makes of it; neither can steer a terminal."""
    if as_json:
        text = dump_json(result, indent=1, ensure_ascii=False)
        print("".join(c if c.isprintable() or c == "\n" else f"\\u{ord(c):04x}" for c in text))
    else:
        for line in lines(result):
            for part in line.split("\n"):
                print(plain(part))


def number(text: str) -> float | None:
    """``text`` as a number, None where it is none."""
    try:
        return float(text)
    except ValueError:
        return None
