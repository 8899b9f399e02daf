"""Which rows are trained on, in which order, and which are held out: from manifests to numbers, no image touched."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from manifests.curate import Selection
from manifests.dataset import MAX_SHARD
from manifests.errors import DataError, UsageError
from manifests.order import mixed_order
from manifests.reader import Manifest
from stages.seeds import derive, mixed, uniform
from stages.settings import DistillSettings

Ints = npt.NDArray[np.int64]
BY_KEY = ("keys", "exclude_keys")


@dataclass(frozen=True)
class Rows:
    """All selected rows of all manifests, laid end to end; every array has one entry a row.

    ``source``: number of the manifest; ``ids``: stable 64-bit sample ids; ``derived``: made from another image;
    ``bad``: why rows were left out, by manifest.
    """

    selections: list[Manifest]
    weights: list[float]
    source: Ints
    label: Ints
    ids: npt.NDArray[np.uint64]
    derived: npt.NDArray[np.bool_]
    starts: Ints = field(repr=False)
    bad: list[list[str]]

    def __len__(self) -> int:
        return len(self.label)

    def read(self, rows: Ints) -> list[bytes]:
        """Stored images of ``rows``, in that order."""
        images = [b""] * len(rows)
        for number, selection in enumerate(self.selections):
            mine = np.flatnonzero(self.source[rows] == number)
            if len(mine):
                for position, image in zip(mine, selection.read_many(rows[mine] - self.starts[number]), strict=True):
                    images[position] = image
        return images

    def tars(self, rows: Ints) -> list[tuple[int, int]]:
        """(number of the manifest, number in its tars) of each tar that holds one of ``rows``, by first use."""
        places = np.stack([self.source[rows], self.tar[rows]], 1)
        places, first = np.unique(places[places[:, 1] >= 0], axis=0, return_index=True)
        return [(int(number), int(tar)) for number, tar in places[np.argsort(first)]]

    @cached_property
    def tar(self) -> Ints:
        """Number of each row's tar in its manifest, −1 where it has none."""
        return np.concatenate([selection.tars for selection in self.selections])

    @cached_property
    def place(self) -> Ints:
        """Each row's place among all, by manifest and tar."""
        place = np.empty(len(self), np.int64)
        place[np.lexsort((self.tar, self.source))] = np.arange(len(self))
        return place

    @cached_property
    def size(self) -> Ints:
        """Bytes of each row's stored image."""
        return np.concatenate([selection.sizes for selection in self.selections])

    def name(self, row: int) -> str:
        """The row as an error message names it."""
        number = int(self.source[row])
        return self.selections[number].name(int(row - self.starts[number]))


def intact(selection: Manifest) -> tuple[Manifest, list[str]]:
    """``selection`` without rows whose image is missing or altered, and what is wrong with those. Reads every image."""
    bad: dict[int, str] = {}
    for _ in selection.scan(on_bad=lambda index, error: bad.__setitem__(index, str(error))):
        pass
    if len(bad) == len(selection):
        raise DataError(f"{selection.url}: none of its {len(bad)} selected images is intact")
    left = selection.take(np.delete(np.arange(len(selection)), list(bad))) if bad else selection
    return left, [bad[index] for index in sorted(bad)]


def select_rows(manifests: Sequence[tuple[Manifest, float]], settings: DistillSettings) -> Rows:
    """Open selections of ``(manifest, weight)`` pairs as one table of rows."""
    chosen = {name: getattr(settings, name) for name in ("where", "include_rejected", *BY_KEY, "best")}
    if len(manifests) > 1 and (named := [name for name in BY_KEY if chosen[name]]):
        raise UsageError(
            f"{named[0]}: a key names an image of one dataset, and there are {len(manifests)}: use factory export data"
        )
    selections = [Selection(**chosen).of(manifest) for manifest, _ in manifests]
    bad: list[list[str]] = [[] for _ in selections]
    if settings.skip_bad:
        checked = [intact(selection) for selection in selections]
        selections, bad = [left for left, _ in checked], [wrong for _, wrong in checked]
    sizes = [len(selection) for selection in selections]
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    labels = np.concatenate([selection.labels for selection in selections])
    ids, derived = [], []
    for selection in selections:
        place = np.concatenate([places_of(part["key"], selection.url) for part in in_parts(selection, "key")])
        ids.append(mixed(place ^ _salt(selection)))
        derived.append(np.concatenate([part["source_key"].is_valid() for part in in_parts(selection, "source_key")]))
    return Rows(
        selections=selections,
        weights=[weight for _, weight in manifests],
        source=np.repeat(np.arange(len(sizes)), sizes),
        label=labels,
        ids=np.concatenate(ids),
        derived=np.concatenate(derived),
        starts=starts,
        bad=bad,
    )


def _salt(selection: Manifest) -> npt.NDArray[np.uint64]:
    return np.array([derive(0, selection.info.fingerprint)], np.uint64)  # the dataset, not the file: it may grow


PART = 1 << 17
"""Rows that are looked at together, as many as a row group has: of millions none is an object of Python."""


def in_parts(selection: Manifest, *columns: str) -> Iterator[pa.Table]:
    """``columns`` of all rows, as tables of at most ``PART`` rows."""
    for start in range(0, len(selection), PART):
        yield selection.file.read_columns([*columns], selection.rows[start : start + PART])


def places_of(keys: pa.ChunkedArray, url: str) -> npt.NDArray[np.uint64]:
    """Shard and index of samples' keys as one number each. Raises DataError for a key that stage 1 never writes."""
    place, known = _places(keys)
    if not known.all():
        raise DataError(f"{url}: {_text(keys, int(known.argmin()))[:80]!r} is no key of a sample")
    return place


def _places(keys: pa.ChunkedArray) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool_]]:
    """The place of each key, and which of them are keys as stage 1 writes them."""
    found = pc.extract_regex(keys, r"^(?P<shard>[0-9]{6,12})-(?P<index>[0-9]{6,12})$")
    numbers = (pc.struct_field(found, name).cast(pa.int64()).fill_null(-1) for name in ("shard", "index"))
    shard, index = (np.asarray(column.to_numpy()) for column in numbers)
    known = (shard >= 0) & (shard < MAX_SHARD) & (index < 1 << 32) & (pc.binary_length(keys).to_numpy() <= 19)
    return (shard << 32 | index).astype(np.uint64), known


def _text(texts: pa.ChunkedArray, number: int) -> str:
    return str(texts[number].as_buffer().to_pybytes().decode(errors="backslashreplace"))


def rows_digest(rows: Ints) -> str:
    """Which rows of a manifest these are."""
    return f"{len(rows)} rows, sha256 {hashlib.sha256(rows.astype('<i8').tobytes()).hexdigest()}"


def family_numbers(rows: Rows) -> Ints:
    """Rows that are linked, directly or through others, get the same number, families by their first row: those of one
    trajectory, of trajectories that LCA mixed, and an image with those derived from it."""
    pairs, things = [], 0
    for number in range(len(rows.selections)):
        for row, thing in _links(rows, number):
            kinds, thing = np.unique(thing, return_inverse=True)
            pairs.append((row.astype(np.int32), (thing + things).astype(np.int32)))  # of millions, half the memory
            things += len(kinds)
    row, thing = (np.concatenate(side) for side in zip(*pairs, strict=True))
    del pairs
    return np.unique(components(row, thing, len(rows), things), return_inverse=True)[1]


def _links(rows: Rows, number: int) -> Iterator[tuple[Ints, npt.NDArray[Any]]]:
    """What ties rows of manifest ``number`` to others, as rows and numbers of things: keys, then trajectories."""
    selection, first = rows.selections[number], int(rows.starts[number])
    mine = np.arange(first, first + len(selection))
    derived = mine[rows.derived[mine]]
    yield np.concatenate([mine, derived]), np.concatenate([rows.ids[mine], *_source_ids(selection, len(derived))])
    row, thing = [], []
    for start, part in zip(range(0, len(mine), PART), in_parts(selection, "trajectory", "lca"), strict=True):
        own, cuts = part["trajectory"].combine_chunks(), part["lca"].combine_chunks()
        partners = pc.struct_field(cuts.flatten(), "partner")
        for values, place in ((own, np.arange(len(own))), (partners, pc.list_parent_indices(cuts).to_numpy())):
            valid = np.asarray(values.is_valid())
            row.append(mine[start + place[valid]])
            thing.append(np.asarray(values.drop_null(), np.int64))
    yield np.concatenate(row), np.concatenate(thing)


def _source_ids(selection: Manifest, count: int) -> Iterator[npt.NDArray[np.uint64]]:
    """The sample ids of the images that ``count`` rows were derived from; any number for another text than a key."""
    for part in in_parts(selection, "source_key") if count else ():
        texts = part["source_key"].drop_null()
        place, known = _places(texts)
        ids = mixed(place ^ _salt(selection))
        ids[~known] = [derive(0, _text(texts, int(other))) for other in np.flatnonzero(~known)]
        yield ids


def components(row: Ints, thing: Ints, rows: int, things: int) -> Ints:
    """The connected components of a graph between rows and things, given as pairs: for each row the first one that is
    linked with it, directly or through others.

    >>> components(np.array([0, 1, 1, 2, 3]), np.array([0, 1, 0, 2, 2]), 5, 3).tolist()
    [0, 0, 2, 2, 4]
    """
    first = np.arange(rows, dtype=row.dtype)
    while True:
        of_thing = np.full(things, rows, row.dtype)
        np.minimum.at(of_thing, thing, first[row])
        linked = first.copy()
        np.minimum.at(linked, row, of_thing[thing])
        np.minimum.at(linked, first, linked.copy())  # the one that they had goes along: what it stands for follows
        while not np.array_equal(linked, nearer := linked[linked]):
            linked = nearer
        if np.array_equal(linked, first):
            return first
        first = linked


def split_validation(rows: Rows, share: float, seed: int) -> tuple[Ints, Ints]:
    """Row numbers to train on and to hold out: whole families, about ``share`` of the rows (:func:`draw_families`)."""
    every = np.arange(len(rows))
    if share == 0:
        return every, every[:0]
    if len(rows) < 2:
        raise DataError(f"{len(rows)} row is left after selection; training needs 2, and val_fraction > 0 one more")
    family = family_numbers(rows)
    if not family.any():
        raise UsageError("val_fraction: every row is linked to every other by trajectory or LCA; use val_fraction 0")
    held = draw_families(family, rows.ids, share, seed)[family]
    return every[~held], every[held]


def draw_families(family: Ints, ids: npt.NDArray[np.uint64], share: float, seed: int) -> npt.NDArray[np.bool_]:
    """Which of two or more families are held out; ``family``, ``ids``: family number and sample id of every row.

    Each family draws one number, by its lowest sample id, so a large one is no likelier to come first. In that order
    families are taken while they fit ``share`` of the rows; where none does, the smallest is. The result depends on
    samples and seed alone, not on the place of the rows.
    """
    sizes = np.bincount(family)
    lowest = np.full(len(sizes), np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(lowest, family, ids)
    order = np.argsort(uniform(seed, "held out", lowest), kind="stable")
    chosen, room = np.zeros(len(sizes), bool), share * len(family)
    smallest = sizes.min()
    for number in order:
        if room < smallest:
            break
        if sizes[number] <= room:
            chosen[number] = True
            room -= sizes[number]
    if not chosen.any():
        chosen[order[sizes[order].argmin()]] = True
    return chosen


class EpochOrder:
    """The training rows of each epoch: a pure function of (manifests, selection, seed, epoch)."""

    def __init__(self, rows: Rows, train: Ints, settings: DistillSettings):
        self.seed = settings.seed
        self._parts: list[Ints] = []
        self._weights: list[float] = []
        self._digests: list[str] = []
        classes = np.unique(rows.label[train]) if settings.balance else np.array([-1])
        weight = np.array(rows.weights)[rows.source[train]]
        for number, selection in enumerate(rows.selections):
            mine = rows.source[train] == number
            for label in classes:
                of_class = rows.label[train] == label if settings.balance else np.ones(len(train), bool)
                self._parts.append(train[mine & of_class])
                fair = weight.sum() / (len(classes) * weight[of_class].sum())
                self._weights.append(rows.weights[number] * fair)
                part = f"{settings.where}|{settings.include_rejected}|{settings.val_fraction}|{label}"
                self._digests.append(f"{selection.digest}|{part}")
        self._rows = np.concatenate(self._parts)
        self.length = len(self(0))
        if self.length < 2:
            raise DataError(f"{self.length} training rows are left after selection, weights and hold-out; 2 are needed")

    def __call__(self, epoch: int) -> Ints:
        sizes = [len(part) for part in self._parts]
        return self._rows[mixed_order(sizes, self._weights, self.seed, epoch, self._digests)]


def repeats(order: Ints) -> npt.NDArray[np.uint64]:
    """How often each entry has occurred before.

    >>> repeats(np.array([5, 3, 5, 5, 3])).tolist()
    [0, 0, 1, 2, 1]
    """
    by_value = np.argsort(order, kind="stable")
    values = order[by_value]
    starts = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))
    run = np.arange(len(order)) - np.repeat(starts, np.diff(np.concatenate([starts, [len(order)]])))
    out = np.empty(len(order), np.uint64)
    out[by_value] = run
    return out
