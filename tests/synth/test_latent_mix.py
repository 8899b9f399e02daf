"""Latent augmentation: boxes and windows by hand, the equation on latents and eps together, records that rebuild it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.seeds import python_rng
from stages.settings import LatentMixSettings
from stages.synth.group import Group
from stages.synth.latent_mix import Mix, cells, draw_box, draw_mixes, draw_window, mixing
from stages.synth.priors.schedule import Prediction

GROUP = Group(3, tuple(range(30, 38)), (0, 1, 0, 1, 2, 0, 1, 0), ("p",) * 8)
SHAPE = (4, 8, 8)
KINDS = ("cutmix", "mixup", "traditional")


def every_step(kind="cutmix", **kw):
    return LatentMixSettings(kind=kind, every=1, interval=(0, 1), **kw)


@given(st.floats(0, 1), st.floats(0, 0.999), st.floats(0, 0.999), st.integers(2, 64), st.integers(2, 64))
def test_a_box_stays_inside_and_is_never_larger_than_drawn(lam, cy, cx, height, width):
    y, x, h, w = draw_box(lam, cy, cx, height, width)
    assert min(y, x) >= 0 and y + h <= height and x + w <= width
    assert h <= round(height * (1 - lam) ** 0.5) and w <= round(width * (1 - lam) ** 0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_mixes_stay_in_the_class_and_depend_only_on_seed_group_and_step(kind):
    mixes = draw_mixes(every_step(kind), GROUP, 7, 2, 600, SHAPE)
    assert mixes and mixes == draw_mixes(every_step(kind), GROUP, 7, 2, 600, SHAPE)
    assert mixes != draw_mixes(every_step(kind), GROUP, 7, 3, 600, SHAPE)
    for position, mix in mixes.items():
        if kind == "traditional":
            assert (mix.partner, mix.lam) == (position, 1.0)
            continue
        assert GROUP.labels[mix.partner] == GROUP.labels[position] and mix.partner != position
        if kind == "cutmix":
            assert mix.lam == pytest.approx(1 - mix.h * mix.w / 64)
        else:
            assert (mix.y, mix.x, mix.h, mix.w) == (0, 0, 8, 8) and mix.lam == np.float32(mix.lam)
    assert (4 in mixes) == (kind == "traditional")  # alone in its class: no partner


def test_cutmix_draws_what_it_drew_before_there_were_other_kinds():
    """Equal settings give equal bytes, also with a later version."""
    mixes = draw_mixes(every_step(), GROUP, 7, 2, 600, SHAPE)
    drawn = {p: (m.partner, m.y, m.x, m.h, m.w) for p, m in mixes.items()}
    assert drawn == {
        0: (2, 0, 5, 3, 3),
        1: (3, 2, 0, 5, 4),
        2: (7, 0, 3, 6, 5),
        3: (1, 4, 0, 4, 5),
        5: (0, 0, 0, 6, 6),
        6: (1, 1, 0, 3, 2),
        7: (5, 4, 5, 4, 3),
    }


@pytest.mark.parametrize("kind", ["cutmix", "mixup"])
def test_permutations_give_a_class_one_box_and_every_latent_one_place(kind):
    group = replace(GROUP, trajectories=tuple(range(60)), labels=tuple(i % 3 for i in range(60)), prompts=("p",) * 60)
    settings = every_step(kind, pairs="permutation")
    mixes = draw_mixes(settings, group, 7, 2, 600, SHAPE)
    assert mixes == draw_mixes(settings, group, 7, 2, 600, SHAPE) != draw_mixes(settings, group, 7, 3, 600, SHAPE)
    assert mixes != draw_mixes(settings, replace(group, index=4), 7, 2, 600, SHAPE)
    for label in range(3):
        positions = [p for p in range(60) if group.labels[p] == label]
        own = [mixes[p] for p in positions if p in mixes]
        assert len({(m.y, m.x, m.h, m.w, m.lam) for m in own}) == 1
        partners = [mixes[p].partner if p in mixes else p for p in positions]
        assert sorted(partners) == positions and len(own) > 10  # nothing is lost, and little meets itself
        assert all(mixes[p].partner != p for p in positions if p in mixes)
    boxes = {(m.y, m.x, m.h, m.w, m.lam) for m in mixes.values()}
    assert len(boxes) == 3  # one a class


def test_permutations_by_hand():
    """Two of a class exchange the box: what one loses the other has."""
    x = torch.stack([torch.zeros(1, 4, 4), torch.ones(1, 4, 4)])
    mix = {"step": 1, "timestep": 0, "y": 1, "x": 0, "h": 2, "w": 3, "lam": 10 / 16}
    mixed = mixing({0: Mix(partner=1, **mix), 1: Mix(partner=0, **mix)}, 2, (1, 4, 4), "cutmix")(x)
    assert mixed[0].sum() == 6 and mixed[1].sum() == 10 and torch.equal(mixed[0] + mixed[1], torch.ones(1, 4, 4))


def test_permutations_leave_classes_out_with_probability():
    group = replace(
        GROUP, trajectories=tuple(range(400)), labels=tuple(i // 4 for i in range(400)), prompts=("p",) * 400
    )
    mixes = draw_mixes(every_step("mixup", pairs="permutation", probability=0.5), group, 0, 1, 0, SHAPE)
    assert 35 < len({group.labels[p] for p in mixes}) < 65  # of 100
    with pytest.raises(ValueError, match="takes no partner"):
        every_step("traditional", pairs="permutation")


def test_probability_thins_the_mixes():
    group = replace(GROUP, trajectories=tuple(range(400)), labels=(0,) * 400, prompts=("p",) * 400)
    for kind in KINDS:
        half = draw_mixes(every_step(kind, probability=0.5), group, 0, 1, 0, SHAPE)
        assert 140 < len(half) < 240  # of cutmix, boxes that round to nothing drop out
        assert draw_mixes(every_step(kind, probability=0.0), group, 0, 1, 0, SHAPE) == {}


def test_clock_and_window():
    settings = LatentMixSettings(every=4, interval=(0.0, 0.6))
    assert [s for s in range(20) if settings.at(s, 20)] == [4, 8]
    assert not any(LatentMixSettings(every=0).at(s, 20) for s in range(20))


def rebuilt(before, mix, own, kind):
    """One latent as its record alone tells it, without the code under test."""
    expected = before[own].clone()
    if kind == "cutmix":
        box = (slice(None), slice(mix.y, mix.y + mix.h), slice(mix.x, mix.x + mix.w))
        expected[box] = before[mix.partner][box]
    elif kind == "mixup":
        expected = torch.lerp(before[own], before[mix.partner], 1 - mix.lam)
    else:
        for i in range(8):
            for j in range(8):
                column = 7 - j if mix.w < 0 else j
                y, x = mix.y + int((i + 0.5) * mix.h / 8), mix.x + int((column + 0.5) * abs(mix.w) / 8)
                expected[:, i, j] = before[own][:, min(max(y, 0), 7), min(max(x, 0), 7)]
    return expected


@pytest.mark.parametrize("kind", KINDS)
def test_everything_is_mixed_together_and_the_record_reproduces_it(kind):
    n = 8
    state = Prediction(*(torch.randn(n, *SHAPE) if i != 1 else 2 for i in range(4)), before=torch.randn(n, *SHAPE))
    mixes = draw_mixes(every_step(kind, probability=0.7), GROUP, 7, 2, 600, SHAPE)
    stored = {p: replace(m, lam=float(np.float32(m.lam))) for p, m in mixes.items()}
    assert 0 < len(mixes) < n
    after = state.mapped(mixing(mixes, n, SHAPE, kind))
    for field in ("z", "output", "z0", "before"):
        old, new = getattr(state, field), getattr(after, field)
        for i in range(n):
            assert torch.equal(new[i], rebuilt(old, stored[i], i, kind) if i in stored else old[i])
        assert not torch.equal(new, old)


def test_mixup_by_hand():
    x = torch.tensor([1.0, 5.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    blended = mixing({0: Mix(1, 0, 1, 0, 0, 2, 2, 0.75)}, 2, (1, 2, 2), "mixup")(x)
    assert blended[:, 0, 0, 0].tolist() == [2.0, 5.0]  # 0.75·1 + 0.25·5; the partner keeps its own


def test_windows_by_hand():
    row = [10, 20, 30, 40]

    def through(y, x, h, w):
        return torch.tensor([row, [0] * 4]).flatten()[cells([(y, x, h, w)], 2, 4)[0, 0]].view(2, 4).tolist()

    assert through(0, 0, 2, 4) == [row, [0] * 4]
    assert through(0, 0, 2, -4) == [[40, 30, 20, 10], [0] * 4]  # flip
    assert through(0, 1, 2, 4) == [[20, 30, 40, 40], [0] * 4]  # shift, edge repeated
    assert through(-1, -1, 2, 4) == [[10, 10, 20, 30]] * 2
    assert through(0, 1, 1, 2) == [[20, 20, 30, 30]] * 2  # crop and resize


def test_traditional_draws_flips_shifts_and_crops_within_their_limits():
    drawn = [draw_window(python_rng(0, i), 16, 16) for i in range(300)]
    flips = [d for d in drawn if d[3] < 0]
    shifts = [d for d in drawn if d[2:] == (16, 16)]
    crops = [d for d in drawn if 0 < d[3] < 16]
    assert len(flips) + len(shifts) + len(crops) == 300 and min(map(len, (flips, shifts, crops))) > 70
    assert set(flips) == {(0, 0, 16, -16)}
    assert {abs(v) for d in shifts for v in d[:2]} == {0, 1, 2}
    assert all(12 <= h < 16 and 12 <= w < 16 and 0 <= y <= 16 - h and 0 <= x <= 16 - w for y, x, h, w in crops)
