"""A part of ``benchmarks/sweep_schedulers.py``: a few classes of each kind."""

import diffusers
import pytest

from benchmarks.sweep_schedulers import LIMIT, classes, sweep

PLAIN = ["DDIMParallelScheduler", "EulerAncestralDiscreteScheduler", "PNDMScheduler", "HeunDiscreteScheduler"]
OTHERS = ["CogVideoXDDIMScheduler", "EDMEulerScheduler", "RePaintScheduler", "UnCLIPScheduler"]


@pytest.mark.filterwarnings("ignore")
def test_noise_schedules_are_read_exactly_or_refused_by_name():
    assert len(classes()) > 40
    for _, outcome, difference in sweep(PLAIN):
        assert outcome in ("read: 20 schedules", "read: 24 schedules") and difference <= LIMIT
    assert {outcome for _, outcome, _ in sweep(OTHERS)} == {"refused by name"}
    assert [outcome for _, outcome, _ in sweep(["LCMScheduler", "TCDScheduler"])] == ["read: 6 schedules"] * 2


def test_a_schedule_that_is_read_wrongly_is_seen(monkeypatch):
    class OtherScheduler(diffusers.DDIMScheduler):
        def __init__(self, beta_schedule="linear", trained_betas=None, prediction_type="epsilon", **others):
            others |= {"beta_schedule": beta_schedule, "trained_betas": trained_betas}
            super().__init__(prediction_type=prediction_type, **others)
            self.alphas_cumprod = self.alphas_cumprod**2

    monkeypatch.setattr(diffusers, "OtherScheduler", OtherScheduler, raising=False)
    ((_, outcome, difference),) = sweep(["OtherScheduler"])
    assert outcome.startswith("read") and difference > 0.01
