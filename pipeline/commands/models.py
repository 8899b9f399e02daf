"""``factory eval``, ``export`` and ``recipes``."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from manifests.errors import UsageError
from pipeline.commands.options import JsonOption
from pipeline.terminal import pairs, plain, print_json, progress, say, share, show, size, table

MODEL_HELP = "Model folder, e.g. RUN/distill/student, or .yaml."
EVAL_HELP = (
    "Model folder, FILE.yaml with the settings of a teacher, embedded:NAME, hf:FOLDER, timm:NAME.TAG, FILE.onnx …"
)
DATA_HELP = "WebDataset tars, a folder of one sub-folder of images for each class, Parquet, or a run; patterns, too."


@dataclass(frozen=True)
class ExportReport:
    """What :func:`stages.distill.export.export_onnx` and ``export_torch`` say of the files they wrote."""

    files: Sequence[dict[str, Any]]

    def lines(self) -> Iterator[str]:
        for file in self.files:
            shape = " × ".join(map(str, file["input"]))
            yield (
                f"{plain(file['file'])}: {file['format']}, {size(file['bytes'])}, images {shape} in [0, 1] to "
                f"{file['classes']} logits, within {file['largest_difference']:.1g} of PyTorch's"
            )


def export(
    student: Annotated[str, typer.Argument(metavar="STUDENT", help=MODEL_HELP, show_default=False)],
    onnx: Annotated[str | None, typer.Option(metavar="FILE", help="Write ONNX.", show_default=False)] = None,
    torch_export: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write a torch.export program (.pt2).", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a student as ONNX or torch.export, after a check that it answers as PyTorch does."""
    if not onnx and not torch_export:
        raise UsageError("say what to write: --onnx FILE or --torch-export FILE")
    from stages.distill.export import export_onnx, export_torch

    files = [export_onnx(student, onnx)] if onnx else []
    files += [export_torch(student, torch_export)] if torch_export else []
    show(ExportReport([asdict(file) for file in files]), as_json)


@dataclass(frozen=True)
class EvalReport:
    """Scores of :func:`stages.distill.evaluate.evaluate`, and the file of the confusion matrix where one was asked
    for."""

    scores: dict[str, Any]
    picture: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return self.scores | ({"picture": self.picture} if self.picture else {})

    def lines(self) -> Iterator[str]:
        shares = [
            name for name in ("accuracy", "teacher_accuracy", "model_teacher_agreement", "ece") if name in self.scores
        ]
        yield from table(
            (24, 8),
            ("images", self.scores["images"]),
            *((name.replace("_", " "), share(self.scores[name])) for name in shares),
            *((name, share(accuracy)) for name, accuracy in self.scores["per_class"].items()),
        )
        yield from pairs(18, ("confusion matrix:", self.picture))


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=EVAL_HELP, show_default=False)],
    data: Annotated[list[str], typer.Argument(metavar="DATA", help=DATA_HELP, show_default=False)],
    teacher: Annotated[
        str | None, typer.Option(help="Model to compare with, named as MODEL is.", show_default=False)
    ] = None,
    confusion: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Confusion matrix to write (PNG).", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda …")] = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Accuracy, calibration and confusions of a classifier on labeled images; agreement with a teacher."""
    from stages.distill.evaluate import confusion_picture
    from stages.distill.evaluate import evaluate as measure
    from stages.settings import ModelSettings

    with progress("eval", brief=True) as shown:
        scores = measure(model, data, ModelSettings(name=teacher) if teacher else None, device, on_progress=shown)
    for what, how in (scores.decisions | {"class order": scores.class_order}).items():
        say(f"{what}: {how}")
    if confusion is not None:
        from pipeline.inspect import save

        save(confusion_picture(scores.confusion, [plain(name) for name in scores.per_class]), confusion)
    show(EvalReport(scores.to_dict(), str(confusion) if confusion else None), as_json)


@dataclass(frozen=True)
class RecipeList:
    """Descriptions by name."""

    recipes: dict[str, str]

    def to_dict(self) -> dict[str, str]:
        return self.recipes

    def lines(self) -> Iterator[str]:
        return pairs(max(map(len, self.recipes)) + 2, *self.recipes.items())


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
        show(RecipeList({each: resolve(each, environ={}).description for each in packaged()}), as_json)
    elif name not in packaged():
        raise UsageError(f"no recipe {name!r}; {suggest(name, packaged())}")
    elif as_json:
        print_json(resolve(name, environ={}).model_dump(mode="json"))
    else:
        print(packaged_text(name), end="")
