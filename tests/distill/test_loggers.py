"""Metrics to TensorBoard and Weights & Biases."""

import sys
import types

import pytest

from manifests.errors import UsageError
from manifests.storage import Storage
from stages.distill.run import run_distill
from stages.settings import DistillSettings

SMALL = {"epochs": 2, "batch_size": 8, "val_fraction": 0.2}


def test_tensorboard(dataset, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_distill(DistillSettings.model_validate(SMALL | {"loggers": ["tensorboard"]}), [(dataset, 1.0)], str(tmp_path))
    events = EventAccumulator(str(tmp_path / "tensorboard" / "digits-cnn-small")).Reload()
    assert [e.step for e in events.Scalars("val_agreement")] == [5, 10]
    with pytest.raises(UsageError, match="local folder only"):
        run_distill(
            DistillSettings.model_validate(SMALL | {"loggers": ["tensorboard"]}),
            [(dataset, 1.0)],
            Storage("memory://tb"),
        )


def test_wandb(dataset, tmp_path, monkeypatch):
    calls = []

    class Run:
        def log(self, values, step):
            calls.append((step, values))

        def finish(self):
            calls.append("finish")

    def init(**options):
        calls.append(options)
        return Run()

    fake = types.ModuleType("wandb")
    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    settings = DistillSettings.model_validate(SMALL | {"loggers": ["wandb"]})
    run_distill(settings, [(dataset, 1.0)], str(tmp_path / "one"))
    assert calls[0]["resume"] == "allow"
    assert calls[0]["config"]["epochs"] == 2
    assert [step for step, _ in calls[1:3]] == [5, 10]
    assert "digits-cnn-small/val_agreement" in calls[1][1]
    assert calls[-1] == "finish"
    run_distill(settings, [(dataset, 1.0)], str(tmp_path / "one"))
    run_distill(settings, [(dataset, 1.0)], str(tmp_path / "two"))
    first, same, other = (call["id"] for call in calls if isinstance(call, dict))
    assert first == same != other  # resumed by its folder alone, whatever path a container gives to it


def test_an_extra_that_is_not_installed(dataset, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match=r"pip install 'dfkd-factory\[wandb\]'"):
        run_distill(DistillSettings.model_validate(SMALL | {"loggers": ["wandb"]}), [(dataset, 1.0)], str(tmp_path))
