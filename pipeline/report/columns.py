"""The columns of a manifest that the page counts with: as arrays here, packed for the page's sliders there.

A slider offers some 200 thresholds of one score. Each row is stored as the number of thresholds that it passes, one
byte a score, compared in float32 as :mod:`manifests.where` compares: the page's counts are those of ``--where``.
"""

import base64
import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from manifests.dataset import unique_names
from manifests.errors import DataError
from manifests.order import spread
from manifests.reader import Manifest

STOPS = 200
"""Thresholds of a slider, about; below 255, since a row is one byte."""
BARS = 40
"""Bars of a histogram, about."""
MISSING = 255
"""The byte of a row without the score: selected by no comparison."""
MAX_ROWS = 500_000
"""Rows that are packed, evenly spread over the dataset where it has more: 5 MB of them."""
KEPT, AGREES, FINAL = 1, 2, 4
SCORES = {"confidence": ">=", "entropy": "<=", "cosine": ">="}
"""Each score with the comparison that keeps its better side."""

Reals = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Columns:
    """One value for each row of the file. Reals are float32 with NaN where there is none; ``teacher_label``, ``step``
    ``trajectory`` and ``group`` are −1 where there is none; ``timestep`` is 0 there. ``final``: at timestep 0; every
    row of a manifest without timesteps."""

    label: Integers
    kept: npt.NDArray[np.bool_]
    teacher_label: Integers
    timestep: Integers
    step: Integers
    trajectory: Integers
    group: Integers
    final: npt.NDArray[np.bool_]
    scores: dict[str, npt.NDArray[np.float32]]
    loss_bn: npt.NDArray[np.float32]
    reject_reasons: dict[str, int]
    same_bytes: list[Integers]
    """Rows whose stored images are equal byte for byte, a list of rows for each such image."""

    @property
    def agrees(self) -> npt.NDArray[np.bool_]:
        """Where the teacher predicts the label."""
        return self.teacher_label == self.label


def class_names(manifest: Manifest) -> list[str]:
    """Names to tell classes apart by, of bounded length."""
    return [name if len(name) <= 80 else f"{name[:79]}…" for name in unique_names(manifest.info.class_names)]


def read_columns(manifest: Manifest) -> Columns:
    """Of every row, rejected ones included. Raises DataError for a label outside the classes."""
    every = manifest.where(None, include_rejected=True)

    def column(name: str) -> pa.ChunkedArray:
        return every.file.read_columns([name], every.rows)[name]

    def integers(name: str, missing: int) -> Integers:
        return np.asarray(pc.fill_null(column(name), missing).to_numpy(), np.int64)

    def reals(name: str) -> npt.NDArray[np.float32]:
        return np.asarray(column(name).to_numpy(), np.float32)

    timestep = column("timestep")
    final = np.asarray(pc.fill_null(pc.equal(timestep, 0), timestep.null_count == len(timestep)).to_numpy(), bool)
    try:
        reasons = _reasons(column("reject_reason"))
    except UnicodeDecodeError:
        raise DataError(f"{manifest.url}: column 'reject_reason' holds text that is not UTF-8") from None
    return Columns(
        label=every.labels,
        kept=np.asarray(column("kept").to_numpy(), bool),
        teacher_label=integers("teacher_label", -1),
        timestep=np.asarray(pc.fill_null(timestep, 0).to_numpy(), np.int64),
        step=integers("step", -1),
        trajectory=integers("trajectory", -1),
        group=integers("group", -1),
        final=final,
        scores={name: reals(name) for name in SCORES},
        loss_bn=reals("loss_bn"),
        reject_reasons=reasons,
        same_bytes=_same_bytes(column("xxh3")),
    )


def _reasons(values: pa.ChunkedArray) -> dict[str, int]:
    """Reasons of rejection with their counts, the commonest first; what an image scored is left out of its reason."""
    counts: Counter[str] = Counter()
    for entry in pc.value_counts(pc.drop_null(values)).to_pylist():
        counts[re.sub(r"\d+\.\d+", "…", entry["values"], count=1)] += entry["counts"]
    return dict(counts.most_common())


def _same_bytes(digests: pa.ChunkedArray) -> list[Integers]:
    codes = np.asarray(digests.combine_chunks().dictionary_encode().indices.to_numpy(), np.int64)
    return runs(codes, np.flatnonzero(np.bincount(codes)[codes] > 1))


def runs(values: Integers, rows: Integers) -> list[Integers]:
    """``rows`` by their value, ascending; in the order that they come in within a value."""
    order = rows[np.argsort(values[rows], kind="stable")]
    return np.split(order, np.flatnonzero(np.diff(values[order])) + 1) if len(order) else []


@dataclass(frozen=True)
class Slider:
    """Thresholds of one score, and for each row how many of them it passes."""

    name: str
    operator: str
    stops: list[float]
    passed: npt.NDArray[np.uint8]


def slider(name: str, values: npt.NDArray[np.float32]) -> Slider | None:
    """None where no row has the score.

    For ``>=`` a row passes the thresholds that are not above it, so ``value >= stops[i]`` where ``passed > i``; for
    ``<=`` those that are below it, so ``value <= stops[i]`` where ``passed <= i``.
    """
    present = values[np.isfinite(values)]
    if not len(present):
        return None
    operator = SCORES[name]
    low, high = (0.0, 1.0) if name == "confidence" else (float(present.min()), float(present.max()))
    stops = nice_stops(min(low, 0.0) if operator == "<=" else low, high)
    side: Literal["left", "right"] = "right" if operator == ">=" else "left"
    passed = np.searchsorted(np.array(stops, np.float32), values, side).astype(np.uint8)
    passed[np.isnan(values)] = MISSING
    return Slider(name, operator, stops, passed)


def nice_stops(low: float, high: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten that enclose [low, high].

    >>> nice_stops(0.0, 1.0)[:3], nice_stops(0.0, 1.0)[-1]
    ([0.0, 0.005, 0.01], 1.0)
    """
    width = max(high - low, 1e-6)
    power = math.floor(math.log10(width / STOPS))
    scale = next(s for s in (1, 2, 5, 10) if width / (s * 10.0**power) <= STOPS * (1 + 1e-9))
    step, digits = scale * 10.0**power, max(0, -power)
    first, last = math.floor(low / step), math.ceil(high / step)
    if np.float32(round(last * step, digits)) < np.float32(high):  # the largest row passes the last threshold
        last += 1
    last = max(last, first + 1)
    return [round(i * step, digits) for i in range(first, last + 1)]


def sliders(columns: Columns) -> list[Slider]:
    """Of the scores that any row has."""
    return [each for name, values in columns.scores.items() if (each := slider(name, values))]


def packed(columns: Columns, classes: int) -> dict[str, Any]:
    """What the page's script counts with, JSON-able: little-endian arrays in base64."""
    rows = spread(np.arange(len(columns.label)), MAX_ROWS)
    flags = columns.kept * KEPT + columns.agrees * AGREES + columns.final * FINAL
    timesteps, place = np.unique(columns.timestep, return_inverse=True)
    return {
        "classes": classes,
        "total": len(columns.label),
        "rows": len(rows),
        "flags": _base64(flags[rows].astype("<u1")),
        "label": _base64(columns.label[rows].astype("<u4")),
        "timestep": _base64(place[rows].astype("<u2")),
        "timesteps": timesteps.tolist(),
        "sliders": [
            {
                "name": each.name,
                "operator": each.operator,
                "stops": each.stops,
                "bar": math.ceil((len(each.stops) - 1) / BARS),
                "passed": _base64(each.passed[rows]),
            }
            for each in sliders(columns)
        ],
    }


def _base64(values: npt.NDArray[Any]) -> str:
    return base64.b64encode(values.tobytes()).decode()
