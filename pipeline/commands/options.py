"""Options that several commands share. ``option`` and ``argument`` show no default: none, or the recipe's."""

import shlex
from functools import partial
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from manifests.errors import UsageError, suggest
from pipeline.terminal import say

RESULT = "Result"
option = partial(typer.Option, show_default=False)
argument = partial(typer.Argument, show_default=False)
place_option = partial(option, rich_help_panel="Where it runs")  # changes where, not what


def _packaged(incomplete: str) -> list[str]:
    """For completion in a shell; files are completed by their own start."""
    from pathlib import Path

    from pipeline.recipe import packaged

    files = [str(path) for path in sorted(Path().glob("*.y*ml"))]
    return [name for name in (*packaged(), *files) if name.startswith(incomplete)]


RecipeOption = Annotated[
    str | None,
    option(
        "--recipe",
        "-c",
        metavar="NAME|FILE",
        help="Packaged recipe (`factory recipes` lists them) or YAML file.",
        autocompletion=_packaged,
    ),
]
SetOption = Annotated[
    list[str] | None, option("--set", metavar="KEY=VALUE", help="Any setting by its dotted key; repeatable.")
]
DryRunOption = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Show settings, sizes, cost; make nothing (a hub's prior is fetched).", rich_help_panel=RESULT
    ),
]
PriceOption = Annotated[
    float | None,
    option(help="Of a GPU for an hour: the dry run says what it costs, by `factory bench`.", rich_help_panel=RESULT),
]
AddressOption = Annotated[
    str | None, place_option(help="Ray cluster: auto, HOST:PORT, ray://…", envvar="FACTORY_ADDRESS")
]
DeviceOption = Annotated[str | None, place_option(help="auto, cpu, cuda …")]
ActorsOption = Annotated[
    int | None, place_option(help="1 runs in this process (default), more as Ray actors.", envvar="FACTORY_WORKERS")
]
RetryOption = Annotated[bool, place_option("--retry-failed", help="Try quarantined shards again.")]
WhereOption = Annotated[str | None, option(help='Rows to use, e.g. "confidence > 0.5 and timestep == 0".')]
KeysOption = Annotated[
    str | None, option(metavar="FILE", help="Keys of the images to use: Parquet, CSV or a text with one on each line.")
]
ExcludeKeysOption = Annotated[str | None, option(metavar="FILE", help="Keys of images to leave out.")]
BestOption = Annotated[
    str | None,
    option(metavar="N:COLUMN", help="The N best of each class: 100:confidence; 100:-entropy takes the lowest."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.", rich_help_panel=RESULT)]
NoReportOption = Annotated[
    bool, typer.Option("--no-report", help="Write no report.html beside the results.", rich_help_panel=RESULT)
]
ImagesOption = Annotated[int | None, option(metavar="N", help="Images to make, rounded up to whole shards.")]
EpochsOption = Annotated[int | None, option(metavar="N", help="Passes over the data.")]
StepsOption = Annotated[int | None, option(metavar="N", help="Batches to train on in all, in place of epochs.")]
TestDataOption = Annotated[str | None, option(help="Labeled images to score at the end: tars, folder or Parquet.")]
RunArgument = Annotated[str, argument(metavar="RUN", help="Run folder of stage 1 (path or URL).")]


def exclusive(flag: str, value: object, other: str, other_value: object) -> None:
    """Raises UsageError where both flags were given."""
    if value is not None and other_value is not None:
        raise UsageError(f"{flag} and {other} say the same thing in two ways: give one of them")


def next_step(*command: str) -> None:
    """The command that mostly follows, on stderr, to be copied."""
    say(f"next: {shlex.join(('factory', *command))}")


STAGES = ("all", "synth", "distill", "rounds")


class Commands(TyperGroup):
    """A group of commands that says what an unknown one was meant to be, also where that is a level below."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """As click's. Raises UsageError in one line."""
        word, below = args[0], STAGES if "run" in self.commands else ()
        if word in below:
            raise UsageError(f"no command {word!r} here: that is factory run {word}")
        if word not in self.commands and not word.startswith("-"):
            raise UsageError(f"no command {word!r}; {suggest(word, [*self.commands, *below], 99)}")
        return super().resolve_command(ctx, args)
