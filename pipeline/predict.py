"""``factory predict``: what a classifier makes of pictures, file by file; one that cannot be read costs a line."""

import csv
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from glob import iglob
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manifests.errors import DataError, UsageError
from pipeline.terminal import plain, share

if TYPE_CHECKING:
    from torch import device

    from stages.models.teacher import Teacher

AT_ONCE = 32
MAX_BYTES = 1 << 28
"""Of an encoded picture."""


@dataclass(frozen=True)
class Prediction:
    """The ``top`` classes of a file and their probabilities, the largest first; or the ``error`` that kept it from
    being read."""

    file: str
    top: list[tuple[str, float]]
    error: str | None = None

    def line(self) -> str:
        found = "  ".join(f"{plain(name)} {share(probability)}" for name, probability in self.top)
        return f"{plain(self.file)}: {self.error or found}"

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self) | {"top": [{"class": name, "probability": p} for name, p in self.top]}
        return {key: value for key, value in values.items() if value is not None}


def predict(model: str, images: Sequence[str], top: int = 5, on: str = "cpu") -> Iterator[Prediction]:
    """Predictions of the classifier ``model`` (as ``factory eval`` names it) for ``images``: files, folders, patterns.

    Pictures are resized, cropped and normalized as the model's input rule says. Raises DataError where there are no
    images or no model, UsageError for ``top`` below 1, all before the first prediction.
    """
    from stages.memory import find_device
    from stages.models.loading import load_teacher
    from stages.settings import ModelSettings

    if top < 1:
        raise UsageError(f"--top {top}: expected 1 or more")
    files = list(dict.fromkeys(_expanded(images)))
    place = find_device(on)
    return _predictions(load_teacher(ModelSettings(name=model), place), files, top, place)


def _predictions(classifier: "Teacher", files: Sequence[str], top: int, place: "device") -> Iterator[Prediction]:
    import torch

    from stages.models.inputs import to_unit

    spec, names = classifier.input, classifier.class_names
    for start in range(0, len(files), AT_ONCE):
        views, errors = {}, {}
        for file in files[start : start + AT_ONCE]:
            try:
                picture = torch.from_numpy(_pixels(file).copy()).permute(2, 0, 1)[None]
                views[file] = spec.view(to_unit(picture))
            except DataError as error:
                errors[file] = str(error)
        best = None
        if views:
            with torch.no_grad():
                probabilities = classifier.logits(torch.cat([*views.values()]).to(place)).softmax(1).cpu()
            best = probabilities.topk(min(top, len(names)))
        row = 0
        for file in files[start : start + AT_ONCE]:
            if file in errors or best is None:
                yield Prediction(file, [], errors[file])
                continue
            pairs = zip(best.indices[row].tolist(), best.values[row].tolist(), strict=True)
            yield Prediction(file, [(names[at], round(value, 6)) for at, value in pairs])
            row += 1


def _pixels(file: str) -> Any:
    """uint8 ``[h, w, 3]``. Raises DataError where the file is no picture."""
    from manifests.images import LABELED_FORMATS, decode
    from manifests.plain_files import read_regular

    try:
        return decode(read_regular(file, MAX_BYTES), formats=LABELED_FORMATS)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"no picture: {error}") from None


def _expanded(images: Iterable[str]) -> Iterator[str]:
    """Files as they are named, the images below folders, and what patterns match, in the order of their names."""
    from stages.distill.eval_files import is_image

    for text in images:
        if os.path.isdir(text):
            below = sorted(
                str(Path(here) / name) for here, _, names in os.walk(text) for name in names if is_image(name)
            )
            if not below:
                raise DataError(f"{text}: no image below this folder")
            yield from below
        elif any(mark in text for mark in "*?[") and not os.path.exists(text):
            matches = sorted(name for name in iglob(text, recursive=True) if not os.path.isdir(name))
            if not matches:
                raise DataError(f"{text}: no file has such a name")
            yield from matches
        else:
            yield text


def csv_text(predictions: Sequence[Prediction], top: int) -> str:
    """A row for each file: its name, classes and probabilities in turn, and the error if there was one."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    ranks = [f"{what}_{rank}" for rank in range(1, top + 1) for what in ("class", "probability")]
    writer.writerow(["file", *ranks, "error"])
    for each in predictions:
        cells = [cell for name, probability in each.top for cell in (name, f"{probability:.6f}")]
        cells += [""] * (2 * top - len(cells))
        writer.writerow([each.file, *cells, each.error or ""])
    return out.getvalue()
