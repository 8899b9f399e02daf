"""``factory eval``, ``export`` and ``recipes``."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from manifests.errors import UsageError
from pipeline.commands.options import JsonOption, answer


def export(
    student: Annotated[
        str,
        typer.Argument(metavar="STUDENT", help="Model folder, e.g. RUN/distill/student, or .yaml.", show_default=False),
    ],
    onnx: Annotated[str | None, typer.Option(metavar="FILE", help="Write ONNX.", show_default=False)] = None,
    torch_export: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write a torch.export program (.pt2).", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a student as ONNX or torch.export, after a check that it answers as PyTorch does."""
    if not onnx and not torch_export:
        raise UsageError("say what to write: --onnx FILE or --torch-export FILE")
    from pipeline.terminal import plain, size
    from stages.distill.export import export_onnx, export_torch

    def lines(result: dict[str, Any]) -> Iterator[str]:
        for made in result["files"]:
            shape = " × ".join(map(str, made["input"]))
            yield (
                f"{plain(made['file'])}: {made['format']}, {size(made['bytes'])}, images {shape} in [0, 1] to "
                f"{made['classes']} logits, within {made['largest_difference']:.1g} of PyTorch's"
            )

    files = [export_onnx(student, onnx)] if onnx else []
    files += [export_torch(student, torch_export)] if torch_export else []
    answer({"files": [asdict(each) for each in files]}, as_json, lines)


# ``factory eval``: score a saved model on labeled images.


def evaluate(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Model folder, e.g. RUN/distill/student, or .yaml.", show_default=False),
    ],
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="WebDataset tar, image folder or Parquet.", show_default=False)
    ],
    teacher: Annotated[
        str | None, typer.Option(help="Model folder or embedded:NAME, to compare with.", show_default=False)
    ] = None,
    confusion: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Confusion matrix to write (PNG).", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda …")] = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Accuracy, calibration and confusions of a model folder on labeled images; agreement with a teacher."""
    from pipeline.terminal import plain, say
    from stages.distill.evaluate import evaluate as measure
    from stages.settings import ModelSettings

    def lines(result: dict[str, Any]) -> Iterator[str]:
        yield f"{'images':<24}{result['images']:>8}"
        for name in ("accuracy", "teacher_accuracy", "model_teacher_agreement", "ece"):
            if name in result:
                yield f"{name.replace('_', ' '):<24}{result[name]:>8.1%}"
        for name, share in result["per_class"].items():
            yield f"{plain(name)[:24]:<24}" + (f"{share:>8.1%}" if share is not None else f"{'–':>8}")

        if "picture" in result:
            yield f"confusion matrix: {plain(result['picture'])}"

    result = measure(model, data, ModelSettings(name=teacher) if teacher else None, device).to_dict()
    say(f"class order: {result['class_order']}")
    if confusion is not None:
        from pipeline.inspect import save
        from stages.distill.evaluate import confusion_picture

        picture = confusion_picture(result["confusion"], [plain(name) for name in result["per_class"]])
        save(picture, confusion)
        result["picture"] = str(confusion)
    answer(result, as_json, lines)


# ``factory recipes``: the recipes that come with the package.


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
