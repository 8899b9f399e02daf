"""``factory eval``: score a saved model on labelled images."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.commands.options import JsonOption, answer


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
    """Accuracy, calibration and confusions of a model folder on labelled images; agreement with a teacher."""
    from pipeline.progress import say
    from pipeline.text import plain
    from stages.distill.evaluate import evaluate as measure
    from stages.models.settings import ModelSettings

    def lines(result: dict[str, Any]) -> Iterator[str]:
        yield f"{'images':<24}{result['images']:>8}"
        for name in ("accuracy", "teacher_accuracy", "agreement", "ece"):
            if name in result:
                yield f"{name.replace('_', ' '):<24}{result[name]:>8.1%}"
        for name, share in result["per_class"].items():
            yield f"{plain(name)[:24]:<24}" + (f"{share:>8.1%}" if share is not None else f"{'–':>8}")

        if "picture" in result:
            yield f"confusion matrix: {plain(result['picture'])}"

    result = measure(model, data, ModelSettings(name=teacher) if teacher else None, device)
    say(f"class order: {result['class_order']}")
    if confusion is not None:
        from pipeline.pictures import save
        from stages.distill.confusion import confusion_picture

        picture = confusion_picture(result["confusion"], [plain(name) for name in result["per_class"]])
        save(picture, confusion)
        result["picture"] = str(confusion)
    answer(result, as_json, lines)
