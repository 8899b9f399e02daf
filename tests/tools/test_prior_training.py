"""The loop that trains priors: it stops at its budget, resumes where it stopped, and averages weights."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from prior_training import Budget, Recipe, averaged, fit


def line(path, steps, ema=0.5, loss=None):
    torch.manual_seed(0)
    net = nn.Linear(3, 1)

    def loss_of(generator):
        x = torch.randn(8, 3, generator=generator)
        return (net(x) - x.sum(1, keepdim=True)).pow(2).mean()

    return net, fit({"net": net}, loss or loss_of, Budget(steps=steps), Recipe(0.1, 2, ema=ema), path, lambda _: "")


def test_a_second_call_goes_on_and_a_finished_one_does_nothing(tmp_path):
    _, first = line(tmp_path / "a.pt", 30)
    net, again = line(tmp_path / "a.pt", 60)
    assert (first.step, again.step) == (30, 60) and again.loss < first.loss
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net, same = line(tmp_path / "a.pt", 60)
    assert same.step == 60 and all(torch.equal(net.state_dict()[name], before[name]) for name in before)


def test_averaged_weights_lag_behind_and_are_lent_only(tmp_path):
    net, fitted = line(tmp_path / "a.pt", 5, ema=0.9)
    own = net.weight.detach().clone()
    with averaged({"net": net}, fitted):
        assert not net.training and torch.equal(net.weight, fitted.ema["net"]["weight"])
    assert net.training and torch.equal(net.weight, own) and not torch.equal(own, fitted.ema["net"]["weight"])


def test_the_rate_warms_up_and_falls_to_zero():
    recipe = Recipe(lr=1.0, warmup=10)
    assert recipe.rate(4, 0.0) == pytest.approx(0.5)
    assert recipe.rate(100, 0.5) == pytest.approx(0.5) and recipe.rate(100, 1.0) == pytest.approx(0)
    assert Budget(minutes=2).progress(10, 60.0) == pytest.approx(0.5) and Budget(steps=0).progress(0, 0) == 1
