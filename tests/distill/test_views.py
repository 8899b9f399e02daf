"""Views: pure functions of (seed, epoch, sample), applied as they say."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.distill.views import Views, apply_views, boxes, draw_views, mix, turns
from stages.seeds import derive, uniform
from stages.settings import AugmentSettings

IDS = np.arange(200, dtype=np.uint64)
NONE = np.zeros(200, np.uint64)
FULL = AugmentSettings(crop=0.125, flip=True, cutmix=0.4, mixup=0.3)


def fields(views):
    return [views.dy, views.dx, views.flip, views.lam, views.box]


@given(st.integers(0, 2**40), st.integers(0, 500), st.permutations(range(20)))
def test_a_view_depends_on_its_sample_alone(seed, epoch, order):
    order = np.array(order)
    together = draw_views(FULL, 32, seed, epoch, IDS[:20], NONE[:20])
    apart = draw_views(FULL, 32, seed, epoch, IDS[order], NONE[order])
    assert all(torch.equal(a[order], b) for a, b in zip(fields(together), fields(apart), strict=True))


def test_seed_epoch_and_repetition_matter():
    base = draw_views(FULL, 32, 0, 0, IDS, NONE)
    for other in (
        draw_views(FULL, 32, 1, 0, IDS, NONE),
        draw_views(FULL, 32, 0, 1, IDS, NONE),
        draw_views(FULL, 32, 0, 0, IDS, NONE + np.uint64(1)),
    ):
        assert (base.dy != other.dy).float().mean() > 0.5


def test_uniform_numbers_are_uniform():
    numbers = uniform(3, "x", np.arange(20_000, dtype=np.uint64))
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert np.histogram(numbers, 10, (0, 1))[0] / 2000 == pytest.approx(np.ones(10), abs=0.1)
    assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 0.03
    assert derive(1, "a", 2) != derive(1, "a", 3)


def test_flip_alternates_between_epochs():
    even, odd = (draw_views(AugmentSettings(flip=True), 8, 0, epoch, IDS, NONE).flip for epoch in (4, 5))
    assert torch.equal(even, ~odd)
    assert 0.3 < even.float().mean() < 0.7


def test_shift_reaches_both_ends():
    views = draw_views(AugmentSettings(crop=0.125, cutmix=0, mixup=0), 16, 0, 0, IDS, NONE)
    assert set(views.dy.tolist()) == set(views.dx.tolist()) == {-2, -1, 0, 1, 2}
    assert (views.lam == 1).all()


def still(n, **changes):
    zero = torch.zeros(n, dtype=torch.long)
    views = {"dy": zero, "dx": zero, "flip": zero.bool(), "lam": torch.ones(n), "box": torch.zeros(n, 4).long()}
    return Views(**(views | changes))


def test_apply_shifts_reflects_and_flips():
    row = torch.arange(4, dtype=torch.uint8)
    pixels = row.view(1, 1, 4, 1).expand(3, 2, 4, 3)
    views = still(3, dx=torch.tensor([1, -2, 0]), flip=torch.tensor([False, False, True]))
    found = apply_views(pixels, views)[:, 0, :, 0].tolist()
    assert found == [[1, 2, 3, 2], [2, 1, 0, 1], [3, 2, 1, 0]]


def test_boxes_by_hand():
    # λ = 0.75: half the side; centred at half; clipped at the corner
    found = boxes(np.array([0.75, 0.75, 1.0]), np.array([0.5, 0.0, 0.5]), np.array([0.5, 0.0, 0.5]), 8)
    assert found.tolist() == [[2, 2, 4, 4], [0, 0, 2, 2], [4, 4, 0, 0]]


def test_mix_pastes_boxes_and_blends():
    own, partner = torch.ones(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    views = still(2, lam=torch.tensor([0.75, 0.3]), box=torch.tensor([[0, 1, 1, 1], [0, 0, 0, 0]]))
    found = mix(own, partner, views)
    assert found[0, 0].tolist() == [[1, 0], [1, 1]]
    assert found[1].flatten().tolist() == pytest.approx([0.3] * 4)


def test_lam_is_the_share_that_was_kept():
    views = draw_views(AugmentSettings(cutmix=1.0, mixup=0), 16, 0, 0, IDS, NONE)
    kept = mix(torch.ones(200, 1, 16, 16), torch.zeros(200, 1, 16, 16), views).mean((1, 2, 3))
    assert torch.allclose(kept, views.lam, atol=1e-6)
    shares = draw_views(AugmentSettings(cutmix=0.25, mixup=0.25), 16, 0, 0, IDS, NONE)
    assert 0.3 < (shares.lam < 1).float().mean() < 0.65


def test_fixed_views_recur_and_take_turns():
    fixed = AugmentSettings(num_views=3, flip=True, cutmix=0, mixup=0)

    def shown(epoch, repeats=NONE):
        views = draw_views(fixed, 16, 0, epoch, IDS, turns(fixed, epoch, repeats))
        return torch.stack([views.dy, views.dx, views.flip.long()])

    first = [shown(epoch) for epoch in range(3)]
    assert not torch.equal(first[0], first[1])
    for epoch in range(3):
        assert torch.equal(shown(epoch + 3), first[epoch])
        assert torch.equal(shown(epoch, NONE + np.uint64(1)), first[(epoch + 1) % 3])
