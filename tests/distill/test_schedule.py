"""Learning rates at the points that define each schedule."""

import pytest
import torch

from stages.distill.student import lr_factor
from stages.settings import OptimizerSettings


def factors(total=100, **settings):
    wanted = OptimizerSettings.model_validate(settings)
    return [lr_factor(wanted, step, total) for step in range(total)]


def test_cosine_with_warmup():
    found = factors(schedule="cosine", warmup=0.1)
    assert found[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert found[10] == 1.0
    assert found[55] == pytest.approx(0.5)
    assert 0 < found[99] < 0.001


def test_step():
    found = factors(schedule="step", warmup=0.0, milestones=[0.5, 0.8], gamma=0.1)
    assert [found[0], found[49], found[50], found[79], found[80]] == pytest.approx([1, 1, 0.1, 0.1, 0.01])


def test_onecycle():
    found = factors(schedule="onecycle", warmup=0.3)
    assert found[0] == pytest.approx(1 / 25)
    assert found[29] == 1.0 == max(found)
    assert found[99] == pytest.approx(4e-6)


@pytest.mark.parametrize(("total", "warmup"), [(100, 0.3), (37, 0.25), (11, 0.05), (2, 0.0)])
def test_onecycle_is_pytorchs(total, warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total, pct_start=warmup)
    expected = []
    for _ in range(total):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        if len(expected) < total:
            schedule.step()
    assert factors(total, schedule="onecycle", warmup=warmup) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", ["cosine", "step", "onecycle"])
def test_one_step_runs(name):
    assert 0 < factors(total=1, schedule=name)[0] <= 1
