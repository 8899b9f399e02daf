"""``factory eval``, ``predict``, ``recipes`` and ``prompts``."""

from pathlib import Path
from typing import Annotated

import typer

from manifests.errors import DataError, UsageError, suggest
from pipeline.commands.options import JsonOption, RecipeOption, SetOption, argument, next_step, option
from pipeline.terminal import pairs, plain, progress, published_bn, say, share, show, table

EVAL_HELP = (
    "Model folder, FILE.yaml with the settings of a teacher, embedded:NAME, hf:FOLDER, timm:NAME.TAG, FILE.onnx …"
)
STUDENT_HELP = "Model folder, e.g. RUN/distill/resnet8, or FILE.yaml with the settings of a model (ONNX …)."
DATA_HELP = "WebDataset tars, a folder of one sub-folder of images for each class, Parquet, or a run; patterns, too."
SHARES = ("accuracy", "top5_accuracy", "macro_f1", "teacher_accuracy", "model_teacher_agreement", "ece")


def evaluate(
    model: Annotated[str, argument(metavar="MODEL", help=EVAL_HELP)],
    data: Annotated[list[str], argument(metavar="DATA", help=DATA_HELP)],
    teacher: Annotated[str | None, option(help="Model to compare with, named as MODEL is.")] = None,
    confusion: Annotated[Path | None, option(metavar="FILE", help="Confusion matrix to write (PNG).")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda …")] = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Accuracy, macro-F1, calibration and confusions of a classifier on labeled images; agreement with a teacher."""
    from stages.distill.evaluate import confusion_picture
    from stages.distill.evaluate import evaluate as measure
    from stages.settings import ModelSettings

    with progress("eval", brief=True) as shown:
        scores = measure(model, data, ModelSettings(name=teacher) if teacher else None, device, on_progress=shown)
    for what, how in (scores.decisions | {"class order": scores.class_order}).items():
        say(f"{what}: {how}")
    if unit := published_bn(scores.published_bn):
        say(f"BatchNorm weights: {unit}")
    if confusion is not None:
        from pipeline.inspect import save

        save(confusion_picture(scores.confusion, [plain(name) for name in scores.per_class]), confusion)
    shares = {name: getattr(scores, name) for name in SHARES}
    rows = (
        ("images", scores.images),
        *((name.replace("_", " "), share(value)) for name, value in shares.items() if value is not None),
        *((name, share(accuracy)) for name, accuracy in scores.per_class.items()),
    )
    picture = str(confusion) if confusion else None
    lines = [*table((24, 8), *rows), *pairs(18, ("confusion matrix:", picture))]
    show(scores.to_dict() | ({"picture": picture} if picture else {}), as_json, lines)


def predict(
    student: Annotated[str, typer.Argument(metavar="STUDENT", help=STUDENT_HELP, show_default=False)],
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGES…", help="Files, folders, patterns.", show_default=False)
    ],
    top: Annotated[int, typer.Option("--top", "-k", metavar="K", help="Classes to name, the likeliest first.")] = 5,
    csv: Annotated[Path | None, option(metavar="FILE", help="Write a table (CSV).")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda …")] = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Classify pictures. One that cannot be read is a line of its own, and exit code 3 at the end."""
    from pipeline.inspect import save
    from pipeline.predict import csv_text
    from pipeline.predict import predict as classify

    found = []
    for each in classify(student, images, top, device):
        found.append(each)
        if not as_json:
            print(each.line(), flush=True)
    if as_json:
        show({"predictions": [each.to_dict() for each in found]}, as_json)
    if csv:
        save(csv_text(found, top).encode(), csv)
        say(f"table: {csv}")
    if bad := sum(each.error is not None for each in found):
        say(f"{bad} of {len(found)} images could not be read")
        raise typer.Exit(DataError.exit_code)


def recipes(
    name: Annotated[str | None, argument(metavar="NAME", help="Print this one, to be edited.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the packaged recipes, or print one: `factory recipes NAME > mine.yaml`, then `-c mine.yaml`."""
    from pipeline.recipe import packaged, packaged_text, resolve

    if name is None:
        found = {each: resolve(each, environ={}).description for each in packaged()}
        show(found, as_json, pairs(max(map(len, found)) + 2, *found.items()))
    elif name not in packaged():
        raise UsageError(f"no recipe {name!r}; {suggest(name, packaged())}")
    elif as_json:
        show(resolve(name, environ={}).model_dump(mode="json"), as_json)
    else:
        print(packaged_text(name), end="")


def prompts(
    recipe: RecipeOption = None,
    teacher: Annotated[str | None, option(help="Model folder or embedded:NAME.")] = None,
    prior: Annotated[str | None, option(help="Diffusers folder, hub id or embedded:NAME.")] = None,
    most: Annotated[int, typer.Option("--first", "-n", help="Prompts to show of each class.", min=1, max=1000)] = 3,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """What stage 1 would ask the prior for, class by class. Makes nothing."""
    from pipeline.prompts import prompts as asked
    from pipeline.recipe import DEFAULT, resolve

    flags = {"synth.teacher.name": ("--teacher", teacher), "synth.prior.path": ("--prior", prior)}
    resolved = resolve(recipe or DEFAULT, section="synth", sets=set_ or (), flags=flags)
    show(asked(resolved, most), as_json)
    next_step("run", "synth", *(("-c", recipe) if recipe else ()), "--dry-run")
