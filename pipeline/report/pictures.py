"""Which images the page shows, and how: a gallery for each class, strips of trajectories, latent CutMix, flags.

Rows are chosen from columns alone; only chosen images are read and decoded. Small images grow and large ones shrink by
whole factors.
"""

import base64
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from manifests.errors import DataError
from manifests.images import decode
from manifests.order import spread
from manifests.reader import Manifest
from pipeline.report.columns import Columns, Integers, class_names, runs

SIDE = 72
"""Pixels of a picture's side on the page, about: small images are enlarged to at most this."""
LARGEST = 144
"""Pixels of a stored picture's side at most."""
LOSSLESS = 64
"""Pixels up to which a picture is stored without loss: single pixels are seen."""
PICTURES, PICTURES_REMOTE, BYTES = 1500, 300, 6 << 20
"""Of the galleries of all classes together; from an object store each one is a request."""
PER_CLASS = 40
STRIPS, FLAGGED, UNSURE = 8, 16, 0.5
"""Strips and flagged images of a kind that are shown; confidence below which the teacher counts as unsure."""
DETAILS = [
    *("key", "label", "prompt", "prior_label", "group", "trajectory", "step", "timestep", "cosine", "confidence"),
    *("entropy", "margin", "teacher_label", "loss_bn", "kept", "reject_reason"),
]
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Encoded:
    """An image as WebP in a data URI, and its size on the page: pixels grow or shrink by a whole factor."""

    source: str
    width: int
    height: int
    enlarged: bool


def encoded(pixels: Pixels) -> Encoded:
    """``[h, w, 3]``, shrunk to at most :data:`LARGEST` pixels, or enlarged by the page."""
    image = Image.fromarray(pixels)
    if (factor := math.ceil(max(image.size) / LARGEST)) > 1:
        image = image.reduce(factor)
    zoom = max(1, SIDE // max(image.size))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=max(image.size) <= LOSSLESS, quality=80, method=4)
    source = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Encoded(source, image.width * zoom, image.height * zoom, zoom > 1)


@dataclass(frozen=True)
class Picture:
    """An image of the dataset on the page, with its row."""

    row: int
    image: Encoded
    details: dict[str, Any]
    class_name: str
    teacher_class: str | None

    @property
    def alt(self) -> str:
        """The picture in words."""
        confidence = self.details["confidence"]
        sure = "" if confidence is None else f", confidence {confidence:.2f}"
        step = "" if not self.details["timestep"] else f", prediction at timestep {self.details['timestep']}"
        return f"{self.class_name}{sure}{step}{'' if self.details['kept'] else ', rejected'}"


class Pictures:
    """Reads and encodes images of a manifest's rows, each row once. ``bad``: why rows have no picture, by row."""

    def __init__(self, manifest: Manifest) -> None:
        self.every = manifest.where(None, include_rejected=True)
        self.names = class_names(manifest)
        self.bad: dict[int, str] = {}
        self._pictures: dict[int, Picture] = {}
        self.side = manifest.info.image_size

    def load(self, rows: Iterable[int]) -> None:
        """Read the images of ``rows``; those that cannot be read are noted in :attr:`bad`."""
        missing = sorted({*map(int, rows)} - self._pictures.keys() - self.bad.keys())
        if not missing:
            return
        table = self.every.file.read_columns(DETAILS, self.every.rows[np.array(missing, np.int64)])
        try:
            details = table.to_pylist()
        except UnicodeDecodeError:
            raise DataError(f"{self.every.url}: a column holds text that is not UTF-8") from None
        by_row = dict(zip(missing, details, strict=True))
        for row, data in self.every.scan(missing, on_bad=lambda row, error: self.bad.update({row: str(error)})):
            try:
                pixels = decode(data, self.side)
            except ValueError as error:
                self.bad[row] = f"sample {by_row[row]['key']}: {error}"
                continue
            judged = by_row[row]["teacher_label"]
            known = judged is not None and 0 <= judged < len(self.names)
            self._pictures[row] = Picture(
                row,
                encoded(pixels),
                by_row[row],
                self.names[by_row[row]["label"]],
                self.names[judged] if known else None,
            )

    def __getitem__(self, rows: Iterable[int]) -> list[Picture]:
        """The pictures of ``rows``, without the bad ones."""
        rows = [*map(int, rows)]
        self.load(rows)
        return [self._pictures[row] for row in rows if row in self._pictures]

    def pixels(self, row: int) -> Pixels | None:
        """The decoded image of one row; None for a bad one."""
        self.load([row])
        return None if row in self.bad else self.every.pixels([row])[0]

    @cached_property
    def affordable(self) -> int:
        """Pictures of the galleries together, by the size of a few."""
        some = self[spread(np.arange(len(self.every)), 16)]
        bytes_each = 1 + sum(len(picture.image.source) for picture in some) / max(len(some), 1)
        most = PICTURES if self.every.storage.is_local else PICTURES_REMOTE
        return min(most, int(BYTES / bytes_each))

    @property
    def scale(self) -> str:
        """How large pictures are, in words."""
        if (factor := math.ceil(self.side / LARGEST)) > 1:
            return f"1/{factor} of their {self.side} pixels"
        zoom = max(1, SIDE // self.side)
        return f"{zoom} times their {self.side} pixels" if zoom > 1 else f"their {self.side} pixels, as stored"


def gallery_rows(columns: Columns, classes: int, affordable: int) -> dict[int, Integers]:
    """For each label that occurs, rows of final images by falling confidence: evenly spread over it, and up to a
    quarter of them rejected ones. At least one for each class while ``affordable`` lasts."""
    most = min(PER_CLASS, max(1, affordable // max(classes, 1)))
    rows = np.flatnonzero(columns.final if columns.final.any() else np.ones(len(columns.label), bool))
    confidence = np.nan_to_num(columns.scores["confidence"], nan=-1.0)
    chosen = {}
    for label_rows in runs(columns.label, rows[np.argsort(-confidence[rows], kind="stable")])[: max(affordable, 1)]:
        kept = columns.kept[label_rows]
        rejected_count = min(int((~kept).sum()), max(most // 4, most - int(kept.sum())))
        picked = np.concatenate(
            [spread(label_rows[kept], most - rejected_count), spread(label_rows[~kept], rejected_count)]
        )
        chosen[int(columns.label[label_rows[0]])] = picked[np.argsort(-confidence[picked], kind="stable")]
    return chosen


def trajectories(columns: Columns) -> list[Integers]:
    """Rows of up to :data:`STRIPS` trajectories of which several steps are stored, of different classes where that
    goes; each from noise to final image."""
    known = np.flatnonzero(columns.trajectory >= 0)
    _, place, counts = np.unique(columns.trajectory[known], return_inverse=True, return_counts=True)
    known = known[counts[place] > 1]
    strips = runs(columns.trajectory, known[np.argsort(columns.step[known], kind="stable")])
    several = [rows for rows in strips if (np.diff(columns.step[rows]) > 0).all()]
    first_of_class = {int(columns.label[rows[0]]): rows for rows in reversed(several)}
    ordered = [first_of_class[label] for label in sorted(first_of_class)]
    chosen = {int(rows[0]) for rows in ordered}
    return [*ordered, *(rows for rows in several if int(rows[0]) not in chosen)][:STRIPS]


@dataclass(frozen=True)
class Cut:
    """A latent CutMix on the page: trajectory and partner as predicted before it, the box put together from their
    pixels, what the prior made of it. ``before`` and ``partner`` are empty where no predictions are stored."""

    before: list[Picture]
    partner: list[Picture]
    composed: Encoded | None
    after: list[Picture]
    box: tuple[float, float, float, float]
    caption: str


def cuts(pictures: Pictures, columns: Columns, kind: str) -> list[Cut]:
    """Up to :data:`STRIPS` final images that went through latent CutMix, by their last box.

    The share of cells that was kept, λ = 1 − h·w / side², gives the latent's side, which no column holds.
    """
    if kind != "cutmix":
        return []
    mixed = np.flatnonzero(columns.final & (columns.step >= 0))
    lists = pictures.every.file.read_columns(["lca"], pictures.every.rows[mixed])["lca"]
    lengths = np.asarray(lists.combine_chunks().value_lengths().fill_null(0).to_numpy(zero_copy_only=False))
    shown = (_cut(pictures, columns, row) for row in spread(mixed[lengths > 0], STRIPS).tolist())
    return [cut for cut in shown if cut]


def _cut(pictures: Pictures, columns: Columns, row: int) -> Cut | None:
    mixes = pictures.every.row(row)["lca"]
    last = mixes[-1]
    if last is None or any(value is None for value in last.values()):
        return None
    share = 1 - last["lam"]
    if share <= 0 or last["h"] <= 0 or last["w"] <= 0:
        return None
    side = max(1, round(math.sqrt(last["h"] * last["w"] / share)))
    x, y, w, h = (min(1.0, max(0.0, last[name] / side)) for name in ("x", "y", "w", "h"))
    steps, partner = (_steps_of(columns, number) for number in (int(columns.trajectory[row]), last["partner"]))
    before, other = (rows[columns.step[rows] <= last["step"]][-1:] for rows in (steps, partner))
    after = steps[columns.step[steps] > last["step"]]
    composed = None
    if len(before) and len(other) and columns.step[before[0]] == columns.step[other[0]]:
        composed = _composed(pictures, int(before[0]), int(other[0]), (x, y, w, h))
    times = f", the last of {len(mixes)} cuts" if len(mixes) > 1 else ""
    return Cut(
        pictures[before],
        pictures[other],
        composed,
        pictures[[*after[:1], *after[1:][-1:]]],
        (x, y, w, h),
        f"{pictures.names[int(columns.label[row])]}, cut at timestep {last['timestep']}{times}",
    )


def _steps_of(columns: Columns, trajectory: int) -> Integers:
    """Rows of a trajectory, from noise to final image."""
    rows = np.flatnonzero((columns.trajectory == trajectory) & (columns.step >= 0))
    return rows[np.argsort(columns.step[rows], kind="stable")]


def _composed(pictures: Pictures, row: int, partner: int, box: Sequence[float]) -> Encoded | None:
    base, other = pictures.pixels(row), pictures.pixels(partner)
    if base is None or other is None:
        return None
    x, y, w, h = (round(part * pictures.side) for part in box)
    whole = base.copy()
    whole[y : y + h, x : x + w] = other[y : y + h, x : x + w]
    return encoded(whole)


@dataclass(frozen=True)
class Flag:
    """A kind of suspicious images: how many of how many, and some of them, in groups that belong together."""

    title: str
    meaning: str
    count: int
    total: int
    groups: list[list[Picture]]


def flags(pictures: Pictures, columns: Columns, duplicates: Sequence[Sequence[str]], examined: int) -> list[Flag]:
    """Images to look at first. ``duplicates``: near-duplicates by key among ``examined`` images."""
    used = columns.kept & (columns.final if columns.final.any() else True)
    confidence = columns.scores["confidence"]
    kinds = []

    def add(title: str, meaning: str, count: int, total: int, groups: Sequence[Iterable[int]]) -> None:
        if count:
            shown = [pictures[group] for group in groups]
            kinds.append(Flag(title, meaning, count, total, [group for group in shown if group]))

    other = np.flatnonzero(used & (columns.teacher_label >= 0) & ~columns.agrees)
    surest = other[np.argsort(-np.nan_to_num(confidence[other]), kind="stable")]
    add(
        "The teacher sees another class",
        "The label asks for one class and the teacher predicts another; the surest contradictions first. A student "
        "trained with the teacher's outputs learns the prediction, one trained with labels the label.",
        len(other),
        int(used.sum()),
        [surest[:FLAGGED]],
    )
    unsure = np.flatnonzero(used & (confidence < UNSURE))
    add(
        "The teacher is unsure",
        f"Its confidence is below {UNSURE:g}; the least sure first.",
        len(unsure),
        int(used.sum()),
        [unsure[np.argsort(confidence[unsure], kind="stable")][:FLAGGED]],
    )
    equal = [rows for rows in (rows[columns.kept[rows]] for rows in columns.same_bytes) if len(rows) > 1]
    add(
        "Equal images",
        "Stored byte for byte more than once.",
        sum(len(rows) - 1 for rows in equal),
        int(columns.kept.sum()),
        [rows[:4] for rows in equal[: FLAGGED // 2]],
    )
    add(
        "Near-duplicates",
        "In the teacher's features, hardly different from an earlier image of the class.",
        len(duplicates),
        examined,
        _rows_of_keys(pictures, columns, duplicates[: FLAGGED // 2]),
    )
    far = _far_groups(columns, used)
    add(
        "Far from the teacher's BatchNorm statistics",
        "Guidance ended with an unusually large feature-statistics loss, recorded for the whole group of an image.",
        len(far),
        int(used.sum()),
        [spread(far, FLAGGED)],
    )
    return kinds


def _rows_of_keys(pictures: Pictures, columns: Columns, pairs: Sequence[Sequence[str]]) -> list[Iterable[int]]:
    if not pairs:
        return []
    place = {key: row for row, key in enumerate(pictures.every.column("key"))}
    return [(place[earlier], place[later]) for later, earlier in pairs]


def _far_groups(columns: Columns, used: npt.NDArray[np.bool_]) -> Integers:
    """Rows of groups whose loss lies above the third quartile by three times the distance between the quartiles."""
    losses = columns.loss_bn
    present = used & np.isfinite(losses)
    groups, first = np.unique(columns.group[present], return_index=True)
    if len(groups) < 8:  # too few to call one of them unusual
        return np.zeros(0, np.int64)
    low, high = np.quantile(losses[present][first], (0.25, 0.75))
    return np.flatnonzero(present & (losses > high + 3 * (high - low)))
