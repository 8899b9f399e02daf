"""``factory eval``, ``export`` and ``recipes``."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from manifests.errors import UsageError
from pipeline.commands.options import JsonOption, argument, option
from pipeline.terminal import pairs, plain, say, share, show, size, table

MODEL_HELP = "Model folder, e.g. RUN/distill/student, or .yaml."
SHARES = ("accuracy", "teacher_accuracy", "model_teacher_agreement", "ece")


def export(
    student: Annotated[str, argument(metavar="STUDENT", help=MODEL_HELP)],
    onnx: Annotated[str | None, option(metavar="FILE", help="Write ONNX.")] = None,
    torch_export: Annotated[str | None, option(metavar="FILE", help="Write a torch.export program (.pt2).")] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a student as ONNX or torch.export, after a check that it answers as PyTorch does."""
    if not onnx and not torch_export:
        raise UsageError("say what to write: --onnx FILE or --torch-export FILE")
    from stages.distill.export import export_onnx, export_torch

    files = [export_onnx(student, onnx)] if onnx else []
    files += [export_torch(student, torch_export)] if torch_export else []
    lines = (
        f"{plain(file.file)}: {file.format}, {size(file.bytes)}, images {' × '.join(map(str, file.input))} in [0, 1] "
        f"to {file.classes} logits, within {file.largest_difference:.1g} of PyTorch's"
        for file in files
    )
    show({"files": [asdict(file) for file in files]}, as_json, lines)


def evaluate(
    model: Annotated[str, argument(metavar="MODEL", help=MODEL_HELP)],
    data: Annotated[str, argument(metavar="DATA", help="WebDataset tar, image folder or Parquet.")],
    teacher: Annotated[str | None, option(help="Model folder or embedded:NAME, to compare with.")] = None,
    confusion: Annotated[Path | None, option(metavar="FILE", help="Confusion matrix to write (PNG).")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda …")] = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Accuracy, calibration and confusions of a model folder on labeled images; agreement with a teacher."""
    from stages.distill.evaluate import confusion_picture
    from stages.distill.evaluate import evaluate as measure
    from stages.settings import ModelSettings

    scores = measure(model, data, ModelSettings(name=teacher) if teacher else None, device)
    for what, how in (scores.decisions | {"class order": scores.class_order}).items():
        say(f"{what}: {how}")
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


def recipes(
    name: Annotated[str | None, argument(metavar="NAME", help="Print this one, to be edited.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the packaged recipes, or print one: `factory recipes NAME > mine.yaml`, then `-c mine.yaml`."""
    from pipeline.layers import suggest
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
