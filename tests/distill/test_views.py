"""Views: pure functions of (seed, epoch, sample), applied as they say."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.distill.views import Views, apply_views, boxes, color_jitter, crops, draw_views, mix, resized_crop, turns
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


RICH = AugmentSettings(crop_scale=(0.2, 1), flip=True, brightness=0.4, contrast=0.4, saturation=0.4)


@given(st.integers(0, 2**40), st.integers(1, 19))
@settings(max_examples=10, deadline=None)
def test_a_rich_view_is_the_same_in_any_batch(seed, cut):
    pixels = torch.from_numpy((uniform(seed, "pixels", np.arange(6000, dtype=np.uint64)) * 256).astype(np.uint8)).view(
        20, 10, 10, 3
    )
    whole = apply_views(pixels, draw_views(RICH, 10, seed, 3, IDS[:20], NONE[:20]))
    for here in (slice(cut), slice(cut, None)):
        part = apply_views(pixels[here], draw_views(RICH, 10, seed, 3, IDS[:20][here], NONE[:20][here]))
        assert torch.equal(part, whole[here])
    assert (whole.min() >= 0) & (whole.max() <= 255)
    assert not torch.equal(whole, apply_views(pixels, draw_views(RICH, 10, seed, 4, IDS[:20], NONE[:20])))


def test_new_views_leave_the_others_as_they_were():
    plain = AugmentSettings(flip=True)
    rich = AugmentSettings(flip=True, crop_scale=(0.5, 1), brightness=0.1)
    old, new = (draw_views(each, 16, 0, 0, IDS, NONE) for each in (plain, rich))
    assert old.crop is None and old.color is None
    assert all(torch.equal(a, b) for a, b in zip(fields(old), fields(new), strict=True))


def test_crops_by_hand():
    half = np.full(3, 0.5)  # a ratio of 1
    found = crops((0.25, 1.0), np.array([0.0, 0.5, 1.0]), half, np.array([0.0, 0.5, 0.9]), np.array([0.99, 0.5, 0]), 16)
    assert found.tolist() == [[0, 8, 8, 8], [2, 2, 13, 13], [0, 0, 16, 16]]  # √0.25, √0.625, 1 of 16
    found = crops((0.25, 0.25), half, np.array([0.0, 0.5, 1.0]), 0 * half, 0 * half, 120)
    assert found[:, 2:].tolist() == [[69, 52], [60, 60], [52, 69]]  # width : height 3/4, 1, 4/3


def test_crops_lie_inside_and_fill_the_scale():
    views = draw_views(AugmentSettings(crop_scale=(0.3, 1)), 100, 0, 0, IDS, NONE).crop
    assert (views[:, :2] >= 0).all() and (views[:, :2] + views[:, 2:] <= 100).all()
    area = (views[:, 2] * views[:, 3]).double() / 100**2
    assert 0.29 < area.min() < 0.35 and 0.95 < area.max() <= 1
    ratio = views[:, 3] / views[:, 2]
    assert 0.73 < ratio.min() < 0.8 and 1.25 < ratio.max() < 1.36


def test_a_crop_is_resized_as_torch_does():
    pixels = torch.arange(2 * 8 * 8 * 3, dtype=torch.uint8).view(2, 8, 8, 3)
    found = resized_crop(pixels, torch.tensor([[0, 0, 8, 8], [1, 3, 6, 5]]))
    assert torch.equal(found[0], pixels[0].float())  # the whole image: as it is
    box = pixels[1:, 1:7, 3:8].permute(0, 3, 1, 2).float()
    expected = F.interpolate(box, size=(8, 8), mode="bilinear").permute(0, 2, 3, 1)
    assert torch.allclose(found[1:], expected, atol=1e-4)


def test_color_jitter_by_hand():
    pixels = torch.tensor([[200, 0, 0], [0, 100, 0]], dtype=torch.uint8).view(1, 1, 2, 3)
    gray = [59.8, 58.7]  # 0.299·200 and 0.587·100; their mean in whole numbers is 59.5

    def jittered(*factors):
        return color_jitter(pixels, torch.tensor([factors])).flatten().tolist()

    assert jittered(1.0, 1.0, 1.0) == [200, 0, 0, 0, 100, 0]
    assert jittered(1.5, 1.0, 1.0) == [255, 0, 0, 0, 150, 0]  # 300 is clamped
    assert jittered(1.0, 0.5, 1.0) == pytest.approx([129.75, 29.75, 29.75, 29.75, 79.75, 29.75])
    assert jittered(1.0, 1.0, 0.0) == pytest.approx([gray[0]] * 3 + [gray[1]] * 3)


@pytest.mark.parametrize("wrong", [(0.0, 1.0), (0.8, 0.5)])
def test_a_scale_of_nothing_is_refused(wrong):
    with pytest.raises(ValueError, match="two rising shares above 0"):
        AugmentSettings(crop_scale=wrong)


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
