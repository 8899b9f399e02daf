"""What is in a manifest: counts, score quantiles, metrics, contact sheets."""

import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from manifests.dataset import unique_names
from manifests.errors import DataError, StoreError
from manifests.images import decode
from manifests.reader import Manifest
from pipeline.terminal import number, plain, progress, published_bn, share, table

GAP = 2
NAME_WIDTH, NAME_WIDEST = 64, 160
TITLE_HEIGHT = 16
SMALL = 48
"""Pictures below this side grow by a whole factor up to it; larger ones are shown pixel by pixel."""
WIDEST, HIGHEST = 4096, 4096
"""Of a sheet in pixels: further pictures of a class, and further classes (evenly), are left out."""
BACKGROUND, INK = (250, 250, 250), (20, 20, 20)


def contact_sheet(rows: Sequence[tuple[str, Sequence[bytes]]], cell: int | None = None) -> Image.Image:
    """One row of pictures per ``(name, encoded images)``, at true scale: small ones grow by a whole factor. ``cell``:
    scaled to fit so many pixels instead. Raises DataError where an image is none."""
    first = next((images[0] for _, images in rows if images), None)
    if cell is None:
        side = SMALL if first is None else max(_decoded(first).size)
        cell = side * max(1, SMALL // side)
    step = cell + GAP
    most = max(1, HIGHEST // step)
    dropped = len(rows) - most
    rows = rows if dropped <= 0 else [rows[round(i * (len(rows) - 1) / max(most - 1, 1))] for i in range(most)]
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    widths = [NAME_WIDTH - 3 * GAP, *(ruler.textlength(printable(name)) for name, _ in rows)]
    margin = min(round(max(widths)) + 3 * GAP, NAME_WIDEST)
    columns = min(max((len(images) for _, images in rows), default=0), max(1, (WIDEST - margin) // step))
    sheet = Image.new("RGB", (margin + columns * step + GAP, len(rows) * step + GAP), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for y, (name, images) in enumerate(rows):
        draw.text((GAP, y * step + step // 2 - 6), printable(name), fill=INK)
        for x, data in enumerate(images[:columns]):
            sheet.paste(picture(data, cell), (margin + x * step, y * step + GAP))
    return sheet


def hstack(panels: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Panels next to each other, each under its title."""
    width = sum(panel.width for _, panel in panels)
    whole = Image.new("RGB", (width, TITLE_HEIGHT + max(panel.height for _, panel in panels)), BACKGROUND)
    draw, x = ImageDraw.Draw(whole), 0
    for title, panel in panels:
        draw.text((x + NAME_WIDTH, 2), printable(title), fill=INK)
        whole.paste(panel, (x, TITLE_HEIGHT))
        x += panel.width
    return whole


def picture(data: bytes, cell: int) -> Image.Image:
    """An encoded image as RGB, ``cell`` pixels square; small ones grow by whole pixels so that they stay sharp.

    Raises DataError where it is none."""
    rgb = _decoded(data)
    small = max(rgb.size) <= cell
    return rgb.resize((cell, cell), Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS)


def _decoded(data: bytes) -> Image.Image:
    try:
        return Image.fromarray(decode(data))
    except ValueError as error:
        raise DataError(f"an image of the contact sheet is {error}") from None


def png(image: Image.Image) -> bytes:
    """The picture as PNG bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def save(data: bytes, path: Path) -> None:
    """Write an encoded picture, and nothing beside it. Raises StoreError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        raise StoreError(f"{path}: cannot write: {error.strerror or error}") from error


def printable(text: str) -> str:
    """What PIL's built-in font can draw."""
    return text.encode("latin-1", "replace").decode("latin-1")


QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SCORES = ("cosine", "confidence", "entropy", "margin")


@dataclass(frozen=True)
class ClassCount:
    rows: int
    kept: int


@dataclass(frozen=True)
class Summary:
    """Rows and kept rows, per class and reason of rejection, and quantiles of each score.

    ``teacher_label_agreement``: share of the rows whose target class the teacher saw; ``metrics``: of
    :func:`stages.synth.metrics.measure`, where asked for; ``sheet``: the contact sheet's file.
    """

    manifest: str
    fingerprint: str
    recipe: str
    image_size: int
    shards: int
    rows: int
    kept: int
    classes: dict[str, ClassCount]
    rejected: dict[str, int]
    teacher_label_agreement: float | None
    scores: dict[str, dict[str, float] | None]
    metrics: dict[str, Any] | None = None
    sheet: str | None = None

    def lines(self) -> Iterator[str]:
        yield (
            f"{plain(self.manifest)}: {self.rows} rows, {self.kept} kept, {self.shards} shards, {self.image_size} px, "
            f"recipe {plain(self.recipe)}, plan {self.fingerprint[:12]}"
        )
        if self.teacher_label_agreement is not None:
            yield f"teacher agrees with the target class on {share(self.teacher_label_agreement)} of the rows"
        yield from (f"rejected: {count} × {plain(reason)}" for reason, count in self.rejected.items())
        none = dict.fromkeys(map(str, QUANTILES))
        scores = ((name, *(number(v, 3) for v in (found or none).values())) for name, found in self.scores.items())
        yield from table((16, 9, 9, 9, 9, 9), ("quantile", *QUANTILES), *scores)
        counts = ((name, count.rows, count.kept) for name, count in self.classes.items())
        yield from table((24, 8, 8), ("class", "rows", "kept"), *counts)
        if self.metrics:
            yield from metric_lines(self.metrics)
        if self.sheet:
            yield f"contact sheet: {plain(self.sheet)}"


def summarize(manifest: Manifest, where: str | None = None) -> Summary:
    """What is in ``manifest``; ``where`` narrows the rows."""
    chosen = manifest.where(where, include_rejected=True)
    kept = np.asarray(chosen.column("kept"), dtype=bool)
    unique = unique_names(manifest.info.class_names)
    names = [unique[int(label)] for label in chosen.labels]
    rows, kept_rows = Counter(names), Counter(name for name, keep in zip(names, kept, strict=True) if keep)
    return Summary(
        manifest=manifest.url,
        fingerprint=manifest.info.fingerprint,
        recipe=str(manifest.info.recipe.get("name", "")),
        image_size=manifest.info.image_size,
        shards=len(manifest.info.tars),
        rows=len(chosen),
        kept=int(kept.sum()),
        classes={name: ClassCount(count, kept_rows[name]) for name, count in rows.items()},
        rejected=dict(Counter(str(r) for r in chosen.column("reject_reason") if r is not None)),
        teacher_label_agreement=_agreement(chosen.labels, chosen.column("teacher_label")),
        scores={name: quantiles(chosen.column(name)) for name in SCORES},
    )


def quantiles(values: Iterable[float | None]) -> dict[str, float] | None:
    """``{"0.05": …, …}`` of the values that exist; None where there are none.

    >>> quantiles([0.0, 1.0, None, 2.0])["0.5"]
    1.0
    """
    numbers = np.array([value for value in values if value is not None], dtype=np.float64)
    numbers = numbers[np.isfinite(numbers)]
    if not len(numbers):
        return None
    return {str(q): round(float(v), 4) for q, v in zip(QUANTILES, np.quantile(numbers, QUANTILES), strict=True)}


def metrics(manifest: Manifest, where: str | None = None, quiet: bool = False) -> dict[str, Any]:
    """Statistics gap, diversity and near-duplicates of the kept images, as the teacher that the dataset carries sees
    them (:func:`stages.synth.metrics.measure`). Raises DataError where it carries none."""
    from stages.models.loading import dataset_teacher
    from stages.synth.metrics import measure

    teacher = dataset_teacher(manifest, ask="give it one with factory rescore --teacher")
    with progress("metrics", quiet=quiet) as shown:
        return measure(manifest.where(where), teacher, on_images=lambda done, total: shown(done, total, ""))


def samples(manifest: Manifest, where: str | None = None, columns: int = 12) -> list[tuple[str, list[bytes]]]:
    """``(class name, encoded images)`` per class, in the order of the classes: up to ``columns`` kept images, evenly
    spread over the run."""
    chosen = manifest.where(where)
    labels = chosen.labels
    rows = []
    for label in sorted(set(labels.tolist())):
        found = np.flatnonzero(labels == label)
        picked = found[np.unique(np.linspace(0, len(found) - 1, min(columns, len(found))).astype(int))]
        name = plain(manifest.info.class_names[label])
        rows.append((name, [chosen.read(int(i)) for i in picked]))
    return rows


def metric_lines(found: dict[str, Any]) -> Iterator[str]:
    """The metrics for people; ``vendi`` is the effective number of different images."""
    gap = "none, the teacher has no BatchNorm" if found["bn_gap"] is None else number(found["bn_gap"], 3)
    yield (
        f"{found['images']} kept images looked at: the teacher agrees with {share(found['teacher_accuracy'])}, "
        f"BatchNorm gap {gap}"
    )
    if unit := published_bn(found.get("published_bn")):
        yield f"BatchNorm weights: {unit}"
    if found["near_duplicates"] is None:
        yield "no diversity: the teacher shows no features"
        return
    yield f"{found['near_duplicates']} near-duplicates (feature cosine > {found['near_duplicate_cosine']:g})"
    rows = (
        (name, facts["images"], number(facts["cosine"], 3), number(facts["vendi"], 2), facts["near_duplicates"])
        for name, facts in found["classes"].items()
    )
    yield from table((24, 8, 8, 8, 8), ("class", "images", "cosine", "vendi", "alike"), *rows)


def _agreement(labels: Iterable[int], answers: Iterable[int | None]) -> float | None:
    pairs = [(label, answer) for label, answer in zip(labels, answers, strict=True) if answer is not None]
    return round(sum(int(label == answer) for label, answer in pairs) / len(pairs), 4) if pairs else None
