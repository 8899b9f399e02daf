"""``factory init`` and ``doctor``: a recipe for a teacher, and whether this machine will do."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from manifests.errors import UsageError
from pipeline.commands.options import JsonOption, RecipeOption, SetOption, next_step, option
from pipeline.terminal import plain, say, show

TEACHER_HELP = (
    "A weights file (.pt, .safetensors …), an architecture, model folder, timm:…, torchvision:NAME, hf:…, "
    "FILE.py:function or FILE.onnx."
)


def init(
    teacher: Annotated[str, typer.Argument(metavar="TEACHER", help=TEACHER_HELP, show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The recipe.")] = Path("mine.yaml"),
    weights: Annotated[str | None, option(metavar="FILE", help="What fills the architecture TEACHER.")] = None,
    arch: Annotated[
        str | None, option(metavar="NAME", help="What the weights file TEACHER fills (default: recognized).")
    ] = None,
    classes: Annotated[
        str | None, option(metavar="N|NAMES|FILE", help="Number of classes, names with commas, or a file of names.")
    ] = None,
    size: Annotated[int | None, option(metavar="PIXELS", help="Side of its input.")] = None,
    mean: Annotated[str | None, option(metavar="R,G,B", help="Its normalization, for values in [0, 1].")] = None,
    std: Annotated[str | None, option(metavar="R,G,B", help="Its normalization, for values in [0, 1].")] = None,
    channels: Annotated[int | None, option(metavar="1|3", help="1: it takes luminance.", min=1, max=3)] = None,
    images: Annotated[int | None, option(metavar="N", help="Images to make.", min=1)] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing: take what is proposed.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
) -> None:
    """Write a commented recipe for a teacher, which is loaded first."""
    from pipeline.init import Facts, load_draft, recipe_text, write_recipe

    if out.exists() and not force:  # now, not after the questions
        raise UsageError(f"{out} is there already: --force replaces it, -o names another file")

    def ask(question: str, proposed: str) -> str:
        if yes:
            return proposed
        if not sys.stdin.isatty():
            how = f" (--yes takes {proposed})" if proposed else ""
            raise UsageError(f"{teacher}: nobody to ask: {question}?{how}; factory init --help lists the options")
        return str(typer.prompt(question, default=proposed or None, err=True))

    draft = load_draft(teacher, Facts(weights, arch, classes, size, mean, std, channels), ask, confirmed=not yes)
    for what, how in draft.origins.items():
        say(f"{what}: {how}")
    if draft.guesses:
        say(f"warning: {' and '.join(draft.guesses)} guessed: a wrong one makes wrong images; see {out}")
    write_recipe(recipe_text(draft, images, str(out)), out, force)
    show({"recipe": str(out)}, lines=[f"recipe: {plain(out.resolve())}"])
    next_step("run", "all", "-c", str(out), "--dry-run")


def doctor(
    recipe: RecipeOption = None,
    out: Annotated[str, typer.Option("--out", "-o", metavar="RUN", help="Where results would go.")] = "runs",
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Try what runs rely on: torch, GPU, attention, memory, store, hub; with -c the recipe's prior and teacher, too."""
    from pipeline.doctor import diagnose
    from pipeline.recipe import resolve

    found = diagnose(out, resolve(recipe, sets=set_ or ()) if recipe else None)
    show(found, as_json)
    if not found.ok:
        raise typer.Exit(1)
    if recipe:
        next_step("run", "all", "-c", recipe, "--dry-run")
