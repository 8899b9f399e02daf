"""``factory recipes``: the recipes that come with the package."""

from typing import Annotated

import typer

from manifests.errors import UsageError
from pipeline.commands.options import JsonOption, answer


def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Print this one, to be edited.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the packaged recipes, or print one: `factory recipes NAME > mine.yaml`, then `-c mine.yaml`."""
    from pipeline.layers import suggest
    from pipeline.recipe import packaged, packaged_text, resolve

    if name is None:
        found = {each: resolve(each, environ={}).description for each in packaged()}
        width = max(map(len, found))
        answer(found, as_json, lambda result: (f"{each:<{width}}  {text}" for each, text in result.items()))
        return
    if name not in packaged():
        raise UsageError(f"no recipe {name!r}; {suggest(name, packaged())}")
    if as_json:
        answer(resolve(name, environ={}).model_dump(mode="json"), True, lambda _: ())
    else:
        print(packaged_text(name), end="")
