"""LCA: boxes by hand, and the equation on latents and eps together."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.synth import latent_cutmix as lca
from stages.synth.groups import Group
from stages.synth.prior import Prediction
from stages.synth.settings import LatentCutMixSettings

GROUP = Group(3, tuple(range(30, 38)), (0, 1, 0, 1, 2, 0, 1, 0), ("p",) * 8)
EVERY_STEP = LatentCutMixSettings(every=1, interval=(0, 1))


@given(st.floats(0, 1), st.floats(0, 0.999), st.floats(0, 0.999), st.integers(2, 64), st.integers(2, 64))
def test_a_box_stays_inside_and_is_never_larger_than_drawn(lam, cy, cx, height, width):
    y, x, h, w = lca.draw_box(lam, cy, cx, height, width)
    assert min(y, x) >= 0 and y + h <= height and x + w <= width
    assert h <= round(height * (1 - lam) ** 0.5) and w <= round(width * (1 - lam) ** 0.5)


def test_cuts_stay_in_the_class_and_depend_only_on_seed_group_and_step():
    cuts = lca.draw_cuts(EVERY_STEP, GROUP, 7, 2, 600, (4, 8, 8))
    assert cuts and cuts == lca.draw_cuts(EVERY_STEP, GROUP, 7, 2, 600, (4, 8, 8))
    assert cuts != lca.draw_cuts(EVERY_STEP, GROUP, 7, 3, 600, (4, 8, 8))
    for position, cut in cuts.items():
        assert GROUP.labels[cut.partner] == GROUP.labels[position] and cut.partner != position
        assert cut.lam == pytest.approx(1 - cut.h * cut.w / 64)
    assert 4 not in cuts  # alone in its class: no partner


def test_probability_thins_the_cuts():
    group = replace(GROUP, trajectories=tuple(range(400)), labels=(0,) * 400, prompts=("p",) * 400)
    half = LatentCutMixSettings(every=1, interval=(0, 1), probability=0.5)
    assert 140 < len(lca.draw_cuts(half, group, 0, 1, 0, (4, 8, 8))) < 230  # tiny boxes that round to nothing drop out
    none = LatentCutMixSettings(every=1, interval=(0, 1), probability=0.0)
    assert lca.draw_cuts(none, group, 0, 1, 0, (4, 8, 8)) == {}


def test_clock_and_window():
    settings = LatentCutMixSettings(every=4, interval=(0.0, 0.6))
    assert [s for s in range(20) if lca.due(settings, s, 20)] == [4, 8]
    assert not any(lca.due(LatentCutMixSettings(every=0), s, 20) for s in range(20))


def test_latents_and_outputs_are_cut_together_and_the_manifest_reproduces_them():
    n, shape = 8, (4, 8, 8)
    state = Prediction(torch.randn(n, *shape), 2, torch.randn(n, *shape), torch.randn(n, *shape))
    cuts = lca.draw_cuts(EVERY_STEP, GROUP, 7, 2, 600, shape)
    mixed = state.mixed(lca.partners(cuts, n), lca.box_mask(cuts, n, shape))
    for field in ("z", "output", "z0"):
        before, after = getattr(state, field), getattr(mixed, field)
        for i in range(n):
            expected = before[i].clone()
            if i in cuts:  # rebuilt from the recorded box alone
                c = cuts[i]
                box = (slice(None), slice(c.y, c.y + c.h), slice(c.x, c.x + c.w))
                expected[box] = before[c.partner][box]
            assert torch.equal(after[i], expected)
