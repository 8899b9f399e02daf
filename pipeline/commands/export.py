"""``factory export data`` and ``factory export student``."""

from dataclasses import asdict
from typing import Annotated

import typer

from manifests.errors import UsageError
from pipeline.commands.options import (
    BestOption,
    Commands,
    ExcludeKeysOption,
    JsonOption,
    KeysOption,
    WhereOption,
    argument,
    next_step,
    option,
)
from pipeline.terminal import plain, show, size

app = typer.Typer(
    cls=Commands, no_args_is_help=True, help="Write a dataset or a student in the formats of other tools."
)

MODEL_HELP = "Model folder, e.g. RUN/distill/student, or .yaml."


@app.command(epilog="Example: factory export data runs/mine --imagefolder images")
def data(
    run: Annotated[str, argument(metavar="RUN|MANIFEST", help="Run folder or manifest (path or URL).")],
    parquet: Annotated[
        str | None, option(metavar="OUT", help="Parquet with image bytes, labels and all columns.")
    ] = None,
    imagefolder: Annotated[str | None, option(metavar="OUT", help="A folder of images for each class.")] = None,
    webdataset: Annotated[str | None, option(metavar="OUT", help="Tars of KEY.png, KEY.cls and KEY.json.")] = None,
    where: WhereOption = None,
    include_rejected: Annotated[
        bool, typer.Option("--include-rejected", help="Also images that a filter of stage 1 rejected.")
    ] = False,
    keys: KeysOption = None,
    exclude_keys: ExcludeKeysOption = None,
    best: BestOption = None,
    part_mb: Annotated[int, typer.Option(help="Megabytes of images in a Parquet file or tar.", min=1)] = 500,
    as_json: JsonOption = False,
) -> None:
    """Write the kept images, or a selection, for other tools. The same command again makes what is missing."""
    from manifests.curate import Selection
    from pipeline.export_data import export_data

    chosen = {"parquet": parquet, "imagefolder": imagefolder, "webdataset": webdataset}
    given = [(form, out) for form, out in chosen.items() if out]
    if len(given) != 1:
        raise UsageError("say how to write it, once: --parquet OUT, --imagefolder OUT or --webdataset OUT")
    form, out = given[0]
    selection = Selection(where, include_rejected, keys, exclude_keys, best)
    show(export_data(run, form, out, selection, part_mb), as_json)


@app.command(epilog="Example: factory export student runs/mine/distill/resnet8 --onnx resnet8.onnx")
def student(
    student: Annotated[str, argument(metavar="STUDENT", help=MODEL_HELP)],
    onnx: Annotated[str | None, option(metavar="FILE", help="Write ONNX.")] = None,
    torch_export: Annotated[str | None, option(metavar="FILE", help="Write a torch.export program (.pt2).")] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Quantize the ONNX file; needs --calibrate.")] = False,
    calibrate: Annotated[
        str | None, option(metavar="RUN", help="Dataset whose images calibrate INT8; no real image is needed.")
    ] = None,
    where: WhereOption = None,
    test_data: Annotated[
        list[str] | None,
        option("--test-data", metavar="DATA", help="Labeled images to compare INT8 with fp32 on, too."),
    ] = None,
    max_loss: Annotated[
        float, typer.Option(help="Share of images whose class INT8 may change, and of accuracy it may lose.")
    ] = 0.02,
    as_json: JsonOption = False,
) -> None:
    """Write a student as ONNX or torch.export, after a check that it answers as PyTorch does; as INT8, as fp32 does."""
    if not onnx and not torch_export:
        raise UsageError("say what to write: --onnx FILE or --torch-export FILE")
    if int8 != bool(calibrate) or (int8 and not onnx):
        raise UsageError("INT8 needs all of --onnx FILE --int8 --calibrate RUN")
    if int8 and onnx and calibrate:
        from manifests.reader import Manifest
        from stages.distill.quantize import export_int8

        images = Manifest.open(calibrate).where(where)
        made = export_int8(student, onnx, images, max_loss, test_data or ())
        show(made, as_json, [f"{plain(made.file)}: {plain(made.line())}"])
        if not torch_export:
            return
        onnx = None
    from stages.distill.export import export_onnx, export_torch

    files = [export_onnx(student, onnx)] if onnx else []
    files += [export_torch(student, torch_export)] if torch_export else []
    lines = (
        f"{plain(file.file)}: {file.format}, {size(file.bytes)}, images {' × '.join(map(str, file.input))} in [0, 1] "
        f"to {file.classes} logits, within {file.largest_difference:.1g} of PyTorch's"
        for file in files
    )
    show({"files": [asdict(file) for file in files]}, as_json, lines)
    next_step("predict", student, "YOUR-IMAGES")
