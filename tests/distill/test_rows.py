"""Selection, held-out split and epoch order."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifests.errors import DataError, UsageError
from manifests.reader import Manifest
from stages.distill.rows import (
    EpochOrder,
    components,
    draw_families,
    family_numbers,
    places_of,
    select_rows,
    split_validation,
)
from stages.settings import DistillSettings
from tests.distill.drawn import NAMES, write_dataset


def cut(partner):
    return {"step": 1, "timestep": 5, "partner": partner, "y": 0, "x": 0, "h": 1, "w": 1, "lam": 0.9}


@pytest.fixture(scope="module")
def linked(tmp_path_factory) -> Manifest:
    """24 rows: two images a trajectory (12), trajectories 2k and 2k+1 linked by LCA: families of four rows."""
    path = write_dataset(
        tmp_path_factory.mktemp("linked") / "d",
        count=24,
        trajectory=lambda i: i // 2,
        lca=lambda i: [cut(i // 2 - 1)] if i // 2 % 2 else [],
        confidence=lambda i: i / 24,
        kept=lambda i: i != 5,
    )
    return Manifest.open(path)


@given(st.integers(1, 40), st.data())
def test_components_are_those_of_union_by_hand(count, data):
    pairs = data.draw(st.lists(st.tuples(st.integers(0, count - 1), st.integers(0, 30)), max_size=80))
    row, thing = (np.array([pair[side] for pair in pairs], np.int64) for side in (0, 1))
    groups = [{number} for number in range(count)]
    for _ in range(count):
        for number, of in pairs:
            whole = set.union(*(groups[other] for other, its in pairs if its == of), groups[number])
            for member in whole:
                groups[member] = whole
    assert components(row, thing, count, 31).tolist() == [min(group) for group in groups]


def test_a_long_chain_takes_few_rounds():
    order = np.random.default_rng(0).permutation(200_000)
    row, thing = np.repeat(order, 2)[1:-1], np.repeat(np.arange(199_999), 2)
    assert not components(row, thing, 200_000, 199_999).any()


def test_rows_of_one_family_stay_together(linked):
    rows = select_rows([(linked, 1.0)], DistillSettings(include_rejected=True))
    families = family_numbers(rows)
    assert families.tolist() == [i // 4 for i in range(24)]
    for seed in range(5):
        train, held = split_validation(rows, 0.3, seed)
        assert sorted([*train, *held]) == list(range(24))
        assert not set(families[train]) & set(families[held])
        assert len(held) == 4  # 30 % of 24 is 7.2: one family of four


def linked_and_single(sizes: list[int], seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Family numbers and sample ids of rows in random order, and the size of every row's family."""
    rng = np.random.default_rng(seed)
    family = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    return family, rng.integers(0, 2**64, len(family), np.uint64), np.array(sizes)[family]


@given(st.lists(st.integers(1, 12), min_size=2, max_size=60), st.floats(0.01, 0.9), st.integers(0, 10**6))
def test_the_held_out_share_is_what_was_asked(sizes, share, seed):
    """Never more than asked, and less by no whole family that was left; one family where none fits."""
    family, ids, _ = linked_and_single(sizes, seed)
    chosen = draw_families(family, ids, share, seed)
    held, asked = chosen[family].sum(), share * len(family)
    left = np.array(sizes)[~chosen]
    assert 0 < held < len(family)
    if min(sizes) <= asked:
        assert held <= asked < held + left.min()
    else:
        assert held == min(sizes) and chosen.sum() == 1


def test_linked_rows_are_held_out_as_often_as_others():
    """1,000 rows alone, 1,000 in families of 8 (LCA), 5 % held out: drawn by their smallest row, families were 88 %."""
    shares, linked = [], []
    for seed in range(100):
        family, ids, sizes = linked_and_single([1] * 1000 + [8] * 125, seed)
        held = draw_families(family, ids, 0.05, seed)[family]
        shares.append(held.mean())
        linked.append((sizes[held] > 1).mean())
    assert np.mean(shares) == pytest.approx(0.05, abs=0.0005) and max(shares) <= 0.05
    assert np.mean(linked) == pytest.approx(0.5, abs=0.03)


def test_split_depends_on_samples_not_on_their_place(linked, tmp_path):
    other = Manifest.open(write_dataset(tmp_path / "o", count=12, seed=1))
    settings = DistillSettings(include_rejected=True)
    first, second = (
        select_rows([(linked, 1.0), (other, 1.0)], settings),
        select_rows([(other, 1.0), (linked, 1.0)], settings),
    )
    assert set(first.ids[split_validation(first, 0.3, 0)[1]]) == set(second.ids[split_validation(second, 0.3, 0)[1]])


def test_where_and_kept(linked):
    assert len(select_rows([(linked, 1.0)], DistillSettings())) == 23
    assert len(select_rows([(linked, 1.0)], DistillSettings(where="confidence >= 0.5"))) == 12
    with pytest.raises(UsageError, match="unknown column"):
        select_rows([(linked, 1.0)], DistillSettings(where="color == 1"))
    with pytest.raises(DataError, match="none of its"):
        select_rows([(linked, 1.0)], DistillSettings(where="confidence > 2"))


@pytest.mark.parametrize("key", ["999999999999-000000", "000000-999999999999", "000000-00000", "0" * 9000 + "-000000"])
def test_keys_that_stage_1_never_writes(key):
    keys = pa.chunked_array([["000002-000345"], [key]])
    with pytest.raises(DataError, match=f"^m.parquet: '{key[:80]}' is no key of a sample"):
        places_of(keys, "m.parquet")
    assert places_of(keys[:1], "").tolist() == [(2 << 32) + 345]


def test_derived_rows_follow_their_source(tmp_path):
    path = write_dataset(tmp_path / "d", count=6, shards=1, source_key=lambda i: "000000-000000" if i > 3 else None)
    rows = select_rows([(Manifest.open(path), 1.0)], DistillSettings())
    assert rows.derived.tolist() == [False] * 4 + [True] * 2
    assert family_numbers(rows).tolist() == [0, 1, 2, 3, 0, 0]


def test_variants_of_an_image_that_is_elsewhere_are_one_family(tmp_path):
    sources = [None, "000009-000000", "000009-000000", "cat.png", None, "cat.png"]
    path = write_dataset(tmp_path / "d", count=6, shards=1, source_key=sources.__getitem__)
    rows = select_rows([(Manifest.open(path), 1.0)], DistillSettings())
    assert family_numbers(rows).tolist() == [0, 1, 1, 2, 3, 2]


def test_one_family_cannot_be_split(tmp_path):
    rows = select_rows(
        [(Manifest.open(write_dataset(tmp_path / "d", count=6, trajectory=lambda i: 0)), 1.0)], DistillSettings()
    )
    with pytest.raises(UsageError, match="use val_fraction 0"):
        split_validation(rows, 0.5, 0)
    assert len(split_validation(rows, 0.0, 0)[0]) == 6


def test_one_row_is_too_few(linked):
    rows = select_rows([(linked, 1.0)], DistillSettings(where="trajectory == 2 and not kept", include_rejected=True))
    with pytest.raises(DataError, match="1 row is left after selection; training needs 2"):
        split_validation(rows, 0.5, 0)


def order_of(manifests, **settings):
    settings = DistillSettings(**settings)
    rows = select_rows(manifests, settings)
    return rows, EpochOrder(rows, np.arange(len(rows)), settings)


def test_an_epoch_uses_every_row_once_and_epochs_differ(linked):
    _, order = order_of([(linked, 1.0)])
    assert sorted(order(0)) == sorted(order(1)) == list(range(23))
    assert order(0).tolist() != order(1).tolist()
    assert order(3).tolist() == order_of([(linked, 1.0)])[1](3).tolist()


def test_weights_are_shares_of_a_manifest(linked, tmp_path):
    other = Manifest.open(write_dataset(tmp_path / "o", count=12, seed=1))
    rows, order = order_of([(linked, 1.0), (other, 0.5)])
    used = np.bincount(np.concatenate([order(0), order(1)]), minlength=len(rows))
    assert used[:23].tolist() == [2] * 23
    assert used[23:].tolist() == [1] * 12


def test_balance_draws_classes_equally(tmp_path):
    path = write_dataset(tmp_path / "d", count=30, shards=1, label=lambda i: 0 if i < 20 else 1 + i % 2)
    rows, order = order_of([(Manifest.open(path), 1.0)], balance=True)
    assert np.bincount(rows.label[order(0)], minlength=len(NAMES)).tolist() == [10, 10, 10]
    everything = np.concatenate([order(0), order(1)])
    assert set(everything) == set(range(30))


def test_balance_counts_all_manifests_together(tmp_path):
    one = Manifest.open(write_dataset(tmp_path / "a", count=24, shards=1, label=lambda i: i % 2))
    two = Manifest.open(write_dataset(tmp_path / "b", count=12, shards=1, seed=1, label=lambda i: 2))
    rows, order = order_of([(one, 1.0), (two, 0.5)], balance=True)  # 12 + 12 + 6 count, so 10 of each class
    assert np.bincount(rows.label[order(0)]).tolist() == [10, 10, 10]


def test_keys_and_the_best_select_rows(linked, tmp_path):
    keys = linked.column("key")[:6]
    (tmp_path / "keys.txt").write_text("\n".join(keys))
    file = str(tmp_path / "keys.txt")
    assert len(select_rows([(linked, 1.0)], DistillSettings(keys=file))) == 6
    assert len(select_rows([(linked, 1.0)], DistillSettings(exclude_keys=file))) == len(linked) - 6
    best = select_rows([(linked, 1.0)], DistillSettings(best="2:confidence"))
    assert np.bincount(best.label).max() == 2
    with pytest.raises(UsageError, match="exclude_keys: a key names an image of one dataset, and there are 2"):
        select_rows([(linked, 1.0), (linked, 1.0)], DistillSettings(exclude_keys=file))
