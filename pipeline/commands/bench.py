"""``factory bench``."""

from typing import Annotated

import typer

from pipeline.commands.options import (
    ActorsOption,
    AddressOption,
    DeviceOption,
    JsonOption,
    RecipeOption,
    SetOption,
    next_step,
    option,
)
from pipeline.terminal import say, show


def bench(
    recipe: RecipeOption = None,
    manifest: Annotated[
        str | None,
        option("--manifest", "-m", metavar="FILE", help="What stage 2 reads (default: images of noise)."),
    ] = None,
    seconds: Annotated[float, typer.Option(min=2, max=3600, help="Time to measure, over both stages.")] = 60.0,
    out: Annotated[
        str | None,
        option("--out", "-o", metavar="FILE", help="Where the figures go (default: this user's cache folder)."),
    ] = None,
    folder: Annotated[
        str | None, option(metavar="FOLDER", help="Where to work, for workers on several machines.")
    ] = None,
    set_: SetOption = None,
    workers: ActorsOption = None,
    address: AddressOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure both stages for a minute: images, steps and data wait a second. `--dry-run` then says hours and price."""
    from pipeline.bench import run_bench
    from pipeline.executors.settings import executor
    from pipeline.rates import save_bench
    from pipeline.recipe import DEFAULT, resolve

    flags = {"synth.device": ("--device", device), "distill.device": ("--device", device)}
    resolved = resolve(recipe or DEFAULT, sets=set_ or (), flags=flags)
    place = executor(workers=workers, address=address)
    found = run_bench(resolved, place, seconds, manifest, folder)
    say(f"kept in {save_bench(found, out)}")
    show(found, as_json)
    next_step("run", "all", *(("-c", recipe) if recipe else ()), "--dry-run")
