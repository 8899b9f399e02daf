"""Options that several commands share."""

from typing import Annotated

import typer

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
PriceOption = Annotated[
    float | None,
    typer.Option(
        help="Of a GPU (or worker) for an hour; the dry run then says what it costs, by `factory bench`.",
        show_default=False,
        rich_help_panel=RESULT,
    ),
]
AddressOption = Annotated[
    str | None,
    typer.Option(
        help="Ray cluster: auto, HOST:PORT, ray://…",
        envvar="FACTORY_ADDRESS",
        show_default=False,
        rich_help_panel=PLACE,
    ),
]
DeviceOption = Annotated[str | None, typer.Option(help="auto, cpu, cuda …", show_default=False, rich_help_panel=PLACE)]
ActorsOption = Annotated[
    int | None,
    typer.Option(
        help="1 runs in this process (default), more as Ray actors.",
        envvar="FACTORY_WORKERS",
        show_default=False,
        rich_help_panel=PLACE,
    ),
]
RetryOption = Annotated[
    bool, typer.Option("--retry-failed", help="Try quarantined shards again.", rich_help_panel=PLACE)
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.", rich_help_panel=RESULT)]
RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="Run folder of stage 1 (path or URL).", show_default=False)
]
