"""Which rows are trained on, in which order, and which are held out: from manifests to numbers, no image touched."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from manifests.curate import Selection
from manifests.dataset import MAX_SHARD
from manifests.errors import DataError, UsageError
from manifests.order import mixed_order
from manifests.reader import Manifest
from manifests.schema import KEY
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
        place = np.array([place_of(key, selection.url) for key in selection.column("key")], np.uint64)
        salt = np.array([derive(0, selection.info.fingerprint)], np.uint64)  # the dataset, not the file: it may grow
        ids.append(mixed(place ^ salt))
        derived.append(np.array([key is not None for key in selection.column("source_key")]))
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


def place_of(key: str, where: str) -> int:
    """Shard and index of a sample's key as one number. Raises DataError for a key that stage 1 never writes."""
    if re.fullmatch(KEY, key, re.ASCII) and len(key) <= 19:
        shard, index = map(int, key.split("-"))
        if shard < MAX_SHARD and index < 1 << 32:
            return shard << 32 | index
    raise DataError(f"{where}: {key[:80]!r} is no key of a sample")


def rows_digest(rows: Ints) -> str:
    """Which rows of a manifest these are."""
    return f"{len(rows)} rows, sha256 {hashlib.sha256(rows.astype('<i8').tobytes()).hexdigest()}"


def links_of(rows: Rows) -> Iterator[list[tuple[object, ...]]]:
    """What ties each row to others: its own key, its trajectory, LCA partners, the image it was derived from."""
    for number, selection in enumerate(rows.selections):
        columns = (selection.column(name) for name in ("key", "trajectory", "lca", "source_key"))
        for key, trajectory, cuts, source in zip(*columns, strict=True):
            links: list[tuple[object, ...]] = [(number, "key", key)]
            near = [trajectory, *(cut["partner"] for cut in cuts or ())]
            links += [(number, "trajectory", other) for other in near if other is not None]
            links += [(number, "key", source)] if source is not None else []
            yield links


def family_numbers(rows: Iterable[Sequence[object]]) -> Ints:
    """Union-find: rows that are linked to a common thing, directly or through others, get the same number.

    >>> family_numbers([["a", "t1"], ["b", "t2"], ["c", "t3", "t1"], ["d"]]).tolist()
    [0, 1, 0, 2]
    """
    parent: dict[object, object] = {}

    def find(thing: object) -> object:
        root = thing
        while (above := parent.setdefault(root, root)) != root:
            root = above
        while thing != root:
            parent[thing], thing = root, parent[thing]
        return root

    first = []
    for links in rows:
        root = find(links[0])
        for other in links[1:]:
            parent[find(other)] = root
        first.append(links[0])
    numbers: dict[object, int] = {}
    return np.array([numbers.setdefault(find(thing), len(numbers)) for thing in first], np.int64)


def split_validation(rows: Rows, share: float, seed: int) -> tuple[Ints, Ints]:
    """Row numbers to train on and to hold out: whole families, about ``share`` of the rows (:func:`draw_families`)."""
    every = np.arange(len(rows))
    if share == 0:
        return every, every[:0]
    if len(rows) < 2:
        raise DataError(f"{len(rows)} row is left after selection; training needs 2, and val_fraction > 0 one more")
    family = family_numbers(links_of(rows))
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
    for number in order:
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
