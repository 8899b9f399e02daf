"""``factory export``: a student for other runtimes."""

from collections.abc import Iterator
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
    from pipeline.text import plain, size
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
    answer({"files": files}, as_json, lines)
