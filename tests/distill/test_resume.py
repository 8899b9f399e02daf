"""Stopped, killed, changed, damaged: the same command ends in the same weights, or says why not."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from manifests.checked_json import dump_checked, load_checked
from manifests.errors import DataError, Interrupted
from manifests.merge import merge
from manifests.reader import Manifest
from manifests.shard import done_records
from manifests.storage import Storage
from stages.distill import checkpoint
from stages.distill.run import run_distill
from tests.distill.drawn import write_dataset
from tests.distill.short import TWO, settings, weights


def stop_at(step):
    """A ``should_stop`` that is true when asked for the ``step``-th time."""
    asked = iter(range(1, 10_000))
    return lambda: next(asked) == step


def test_stopped_anywhere_it_resumes_to_the_same_weights(dataset, tmp_path):
    asked = settings(**TWO, checkpoint_seconds=1e9)
    run_distill(asked, [(dataset, 1.0)], str(tmp_path / "whole"))
    for step in (2, 5, 6):  # inside an epoch, at its end, after it
        with pytest.raises(Interrupted, match="the same command resumes"):
            run_distill(asked, [(dataset, 1.0)], str(tmp_path / "parts"), should_stop=stop_at(step))
    run_distill(asked, [(dataset, 1.0)], str(tmp_path / "parts"))
    for name in TWO["students"]:
        assert weights(tmp_path / "parts", name) == weights(tmp_path / "whole", name)
        whole, parts = (
            [json.loads(line) for line in (tmp_path / run / name / "metrics.jsonl").read_text().splitlines()]
            for run in ("whole", "parts")
        )
        for line in (*whole, *parts):
            del line["seconds"], line["data_wait"]
        assert whole == parts


def test_the_head_of_the_feature_term_learns_and_resumes(dataset, tmp_path):
    asked = settings(loss={"kd": 1.0, "feature": 3.0}, checkpoint_seconds=1e9, epochs=2)
    run_distill(asked, [(dataset, 1.0)], str(tmp_path / "whole"))
    with pytest.raises(Interrupted, match="the same command resumes"):
        run_distill(asked, [(dataset, 1.0)], str(tmp_path / "parts"), should_stop=stop_at(2))
    run_distill(asked, [(dataset, 1.0)], str(tmp_path / "parts"))
    (name,) = asked.students
    assert weights(tmp_path / "parts", name) == weights(tmp_path / "whole", name)
    lines = [json.loads(line) for line in (tmp_path / "whole" / name / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["feature"] < lines[0]["feature"]
    without = settings(loss={"kd": 1.0}, checkpoint_seconds=1e9, epochs=2)
    run_distill(without, [(dataset, 1.0)], str(tmp_path / "without"))
    assert weights(tmp_path / "without", name) != weights(tmp_path / "whole", name)


def test_a_manifest_whose_recipe_was_edited_is_the_same_data(tmp_path):
    """Stage 1, run again, stores edited settings of stage 2: a run goes on where they do not differ for it."""
    path = write_dataset(tmp_path / "d")
    asked = settings(checkpoint_seconds=1e9)
    run_distill(asked, [(path, 1.0)], str(tmp_path / "whole"))
    with pytest.raises(Interrupted):
        run_distill(asked, [(path, 1.0)], str(tmp_path / "parts"), should_stop=stop_at(2))
    storage = Storage(tmp_path / "d")
    merge(storage, replace(Manifest.open(path).info, recipe={"distill": {"epochs": 9}}), list(done_records(storage)))
    assert Manifest.open(path).info.recipe == {"distill": {"epochs": 9}}
    run_distill(asked, [(path, 1.0)], str(tmp_path / "parts"))
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    with pytest.raises(DataError, match=r"holds another run: settings.epochs: 3 -> 9\. Use the same settings"):
        run_distill(settings(epochs=9), [(path, 1.0)], str(tmp_path / "parts"))


KILLED = """
import os, signal, sys
import manifests.local as local
from stages.distill.run import run_distill
from stages.settings import DistillSettings

dataset, out, step, where = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
def die(): os.kill(os.getpid(), signal.SIGKILL)
writes = 0
class Dying(type(os)):
    def __getattr__(self, name): return getattr(os, name)
    @staticmethod
    def replace(old, new, **folders):
        global writes
        if str(new).endswith("checkpoint.pt"):
            writes += 1
            if where == "write" and writes == step: die()
        os.replace(old, new, **folders)
local.os = Dying("os")
settings = DistillSettings.model_validate_json(sys.argv[5])
def progress(done, total, note): where == "step" and done == step and die()
run_distill(settings, [(dataset, 1.0)], out, progress=progress)
"""


def test_killed_anywhere_it_resumes_to_the_same_weights(dataset, tmp_path):
    asked = settings(checkpoint_seconds=0)
    run_distill(asked, [(dataset, 1.0)], str(tmp_path / "whole"))
    for step, where in ((3, "step"), (4, "write")):
        arguments = [dataset, str(tmp_path / "killed"), str(step), where, asked.model_dump_json()]
        done = subprocess.run([sys.executable, "-c", KILLED, *arguments], env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == -signal.SIGKILL
    run_distill(asked, [(dataset, 1.0)], str(tmp_path / "killed"))
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


def test_a_finished_run_answers_again_without_training(dataset, tmp_path):
    first = run_distill(settings(), [(dataset, 1.0)], str(tmp_path))
    steps = []
    again = run_distill(settings(), [(dataset, 1.0)], str(tmp_path), progress=lambda *where: steps.append(where))
    assert steps == []
    assert again.students["digits-cnn-small"].val_agreement == first.students["digits-cnn-small"].val_agreement


def test_changed_settings_are_refused_with_a_diff(dataset, tmp_path):
    run_distill(settings(), [(dataset, 1.0)], str(tmp_path))
    with pytest.raises(DataError, match=r"settings\.optimizer\.lr: 0\.05 -> 0\.5"):
        run_distill(settings(optimizer={"lr": 0.5}), [(dataset, 1.0)], str(tmp_path))
    other = write_dataset(tmp_path / "other", seed=5)
    with pytest.raises(DataError, match="manifests"):
        run_distill(settings(), [(other, 1.0)], str(tmp_path))
    run_distill(settings(memory_gb=0.0, checkpoint_seconds=5.0), [(dataset, 1.0)], str(tmp_path))  # these may change


def test_a_run_of_an_earlier_version_is_refused_by_its_version(dataset, tmp_path):
    run_distill(settings(), [(dataset, 1.0)], str(tmp_path))
    spec = load_checked((tmp_path / checkpoint.RUN).read_bytes()) | {"algorithm": 1}
    (tmp_path / checkpoint.RUN).write_bytes(dump_checked(spec))
    with pytest.raises(DataError, match=r"holds another run: algorithm: 1 -> [0-9]+\. Use"):
        run_distill(settings(), [(dataset, 1.0)], str(tmp_path))


def test_a_damaged_checkpoint_is_named(dataset, tmp_path):
    run_distill(settings(), [(dataset, 1.0)], str(tmp_path))
    path = tmp_path / checkpoint.STATE
    whole = path.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for data, reason in ((whole[:1000], "torn"), (whole[:-1], "altered"), (flipped, "altered"), (b"", "torn")):
        path.write_bytes(data)
        with pytest.raises(
            DataError, match=rf"checkpoint\.pt is damaged \(it (is|was) {reason}.*\): delete it to start"
        ):
            run_distill(settings(), [(dataset, 1.0)], str(tmp_path))
    torch.save({"step": 1, "students": {}}, path)  # whole, but of another program
    path.write_bytes(checkpoint.with_digest(path.read_bytes()))
    with pytest.raises(DataError, match=r"checkpoint\.pt is damaged \('seconds'\): delete it"):
        run_distill(settings(), [(dataset, 1.0)], str(tmp_path))


def test_several_weighted_manifests_resume_exactly(dataset, tmp_path):
    sources = [(dataset, 1.0), (write_dataset(tmp_path / "d", count=24, shards=1, seed=3), 0.5)]
    asked = settings(balance=True, memory_gb=0.0)
    whole = run_distill(asked, sources, str(tmp_path / "whole"))
    assert whole.images + whole.val_images == 72
    with pytest.raises(Interrupted):
        run_distill(asked, sources, str(tmp_path / "parts"), should_stop=stop_at(7))
    with pytest.raises(DataError, match=r"manifests.*0\.5"):
        run_distill(asked, [sources[0], (sources[1][0], 0.6)], str(tmp_path / "parts"))
    run_distill(asked, sources, str(tmp_path / "parts"))
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_another_content_of_a_file_of_keys_is_another_run(tmp_path):
    path = write_dataset(tmp_path / "d")
    keys, file = Manifest.open(path).column("key"), tmp_path / "keys.txt"
    file.write_text("\n".join(keys[:-4]))
    asked = settings(checkpoint_seconds=1e9, keys=str(file))
    with pytest.raises(Interrupted):
        run_distill(asked, [(path, 1.0)], str(tmp_path / "run"), should_stop=stop_at(2))
    file.write_text("\n".join(keys[:-8]))
    with pytest.raises(DataError, match="rows"):
        run_distill(asked, [(path, 1.0)], str(tmp_path / "run"))
    (tmp_path / "moved.txt").write_text("\n".join(keys[:-4]))
    run_distill(asked.model_copy(update={"keys": str(tmp_path / "moved.txt")}), [(path, 1.0)], str(tmp_path / "run"))
