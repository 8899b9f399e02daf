"""Metrics to TensorBoard, Weights & Biases and MLflow."""

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


def test_mlflow(dataset, tmp_path, monkeypatch):
    calls = []

    class Client:
        def get_experiment_by_name(self, name):
            return types.SimpleNamespace(experiment_id="7")

        def create_run(self, experiment, run_name):
            calls.append(("create", experiment, run_name))
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1"))

        def log_dict(self, run, values, name):
            calls.append(("settings", run, values["epochs"]))

        def update_run(self, run, status):
            calls.append((status, run))

        def log_metric(self, run, name, value, step):
            calls.append((name, run, step))

        def set_terminated(self, run):
            calls.append(("end", run))

    monkeypatch.setitem(sys.modules, "mlflow", types.SimpleNamespace(MlflowClient=Client))
    settings = DistillSettings.model_validate(SMALL | {"loggers": ["mlflow"]})
    for _ in range(2):
        run_distill(settings, [(dataset, 1.0)], str(tmp_path / "one"))
    assert [call[0] for call in calls].count("create") == 1  # the second command continues its run
    assert calls[1] == ("settings", "r1", 2) and calls[0][2].startswith("distill digits-cnn-small on ")
    assert ("digits-cnn-small/val_agreement", "r1", 5) in calls and calls[-1] == ("end", "r1")


def test_progress_tells_every_students_loss_agreement_and_the_wait(dataset, tmp_path):
    notes = []
    settings = DistillSettings.model_validate(SMALL | {"students": ["digits-cnn-small", "resnet8"]})
    run_distill(settings, [(dataset, 1.0)], str(tmp_path), progress=lambda done, total, note: notes.append(note))
    assert len(notes) == 10
    first, last = notes[0].split(", "), notes[-1].split(", ")
    assert first[0] == "epoch 1/2" and first[1].startswith("digits-cnn-small loss ") and "agreement" not in first[1]
    assert last[0] == "epoch 2/2" and " agreement " in last[1] and last[2].startswith("resnet8 loss ")
    assert last[3].startswith("data wait ") and last[3].endswith("%")


def test_an_extra_that_is_not_installed(dataset, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match=r"pip install 'dfkd-factory\[wandb\]'"):
        run_distill(DistillSettings.model_validate(SMALL | {"loggers": ["wandb"]}), [(dataset, 1.0)], str(tmp_path))
