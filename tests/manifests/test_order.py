import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifests.order import combined_digest, epoch_order, mixed_order, spread

SIZES = st.integers(0, 300)


def test_the_order_is_fixed_for_ever() -> None:
    assert epoch_order(8, seed=1, epoch=0, digest="abc").tolist() == [2, 6, 7, 3, 1, 5, 0, 4]


@given(n=SIZES, seed=st.integers(0, 2**63), epoch=st.integers(0, 1000))
def test_an_epoch_is_a_permutation_and_repeats_itself(n: int, seed: int, epoch: int) -> None:
    order = epoch_order(n, seed, epoch, "digest")
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(n))
    assert np.array_equal(order, epoch_order(n, seed, epoch, "digest"))


def test_every_argument_changes_the_order() -> None:
    base = epoch_order(100, 0, 0, "a")
    for other in (epoch_order(100, 1, 0, "a"), epoch_order(100, 0, 1, "a"), epoch_order(100, 0, 0, "b")):
        assert not np.array_equal(base, other)


def test_positions_are_uniform() -> None:
    firsts = np.bincount([epoch_order(10, 0, epoch, "d")[0] for epoch in range(2000)], minlength=10)
    assert firsts.min() > 140
    assert firsts.max() < 260


@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=4), epoch=st.integers(0, 5))
def test_unweighted_manifests_mix_to_one_permutation(sizes: list[int], epoch: int) -> None:
    digests = [f"d{index}" for index in range(len(sizes))]
    mixed = mixed_order(sizes, [1.0] * len(sizes), 0, epoch, digests)
    assert np.array_equal(mixed, epoch_order(sum(sizes), 0, epoch, combined_digest(digests)))


@given(n=st.integers(1, 50), weight=st.floats(0.05, 3.0), epochs=st.integers(1, 12))
def test_a_weighted_manifest_is_used_evenly(n: int, weight: float, epochs: int) -> None:
    parts = [mixed_order([n], [weight], 5, epoch, ["d"]) for epoch in range(epochs)]
    assert all(len(part) == round(n * weight) for part in parts)
    uses = np.bincount(np.concatenate(parts), minlength=n)
    assert uses.max() - uses.min() <= 1


def test_weights_are_shares_of_each_manifest() -> None:
    order = mixed_order([10, 100], [2.0, 0.3], 0, 0, ["a", "b"])
    assert np.array_equal(np.bincount(order[order < 10]), np.full(10, 2))
    assert np.sum(order >= 10) == 30
    assert order.max() < 110


def test_rows_are_spread_evenly() -> None:
    assert spread(np.arange(9), 3).tolist() == [0, 4, 8]
    assert spread(np.arange(2), 3).tolist() == [0, 1]


def test_impossible_arguments_are_refused() -> None:
    for call in (
        lambda: epoch_order(-1, 0, 0, "d"),
        lambda: mixed_order([1], [1.0, 2.0], 0, 0, ["a"]),
    ):
        with pytest.raises(ValueError):
            call()
