"""The real-data experiment: the split of CIFAR-10, the teacher's augmentation, and a reason where it cannot run."""

import argparse
import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import cifar10
import cifar_data
import make_cifar_bench
from train_cifar_teacher import augmented

from stages.distill.eval_data import labeled_images

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "cifar10.py"


def test_training_and_validation_rows_are_apart_and_always_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar_data, "VALIDATION", 3)
    buffer = io.BytesIO()
    Image.fromarray(np.full((32, 32, 3), 200, np.uint8)).save(buffer, "PNG")
    rows = {"key": [str(i) for i in range(10)], "jpg": [buffer.getvalue()] * 10, "label": list(range(10))}
    pq.write_table(pa.table(rows), tmp_path / "t.parquet")
    train, held = (cifar_data.split_table(tmp_path / "t.parquet", split) for split in ("train", "validation"))
    keys = train["key"].to_pylist(), held["key"].to_pylist()
    assert len(keys[0]) == 7 and sorted(keys[0] + keys[1]) == rows["key"]
    assert cifar_data.split_table(tmp_path / "t.parquet", "validation").equals(held)
    images, labels = cifar_data.tensors(held)
    assert images.shape == (3, 3, 32, 32) and images.unique().tolist() == [200]
    assert [str(label) for label in labels.tolist()] == keys[1]


def test_the_hubs_cifar_becomes_what_the_benchmark_reads(tmp_path, monkeypatch):
    def png(value):
        with io.BytesIO() as buffer:
            Image.fromarray(np.full((32, 32, 3), value, np.uint8)).save(buffer, "PNG")
            return {"bytes": buffer.getvalue(), "path": None}

    for name, rows in (("train", 12), ("test", 6)):
        table = pa.table({"img": [png(10 * i) for i in range(rows)], "label": [i % 10 for i in range(rows)]})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    monkeypatch.setattr(cifar_data, "VALIDATION", 3)
    monkeypatch.setattr(make_cifar_bench, "HALF", 4)
    flags = [f"--{name}={tmp_path / name}.parquet" for name in ("train", "test")]
    monkeypatch.setattr(sys, "argv", ["make_cifar_bench.py", *flags, f"--out={tmp_path / 'bench'}"])
    make_cifar_bench.main()
    images, labels = cifar_data.tensors(cifar_data.split_table(tmp_path / "bench/cifar10-train.parquet", "train"))
    assert len(images) == 9 and all(
        image.float().mean() in (10 * label, 10 * label + 100)
        for image, label in zip(images, labels.tolist(), strict=True)
    )
    test = labeled_images(str(tmp_path / "bench/cifar10-test-a.tar"), cifar_data.CLASS_NAMES)
    assert [label for _, _, label in test] == [0, 1, 2, 3]


def test_augmented_images_are_shifted_and_mirrored_never_else():
    columns = torch.arange(32.0).expand(1, 1, 32, 32)
    x = torch.cat([columns, columns.transpose(2, 3), columns], 1).expand(64, 3, 32, 32)
    middle = augmented(x, torch.Generator().manual_seed(0))[:, :, 12:20, 12:20]
    across, down = middle[:, 0].diff(dim=2), middle[:, 1].diff(dim=1)
    assert set(across.flatten().tolist()) == {1.0, -1.0} and (across == across[:, :1, :1]).all()  # mirrored or not
    assert (down == 1).all() and (middle[:, 0] == middle[:, 2]).all()
    assert {int(v) - 12 for v in middle[:, 1, 0, 0]} == set(range(-4, 5))


@pytest.mark.parametrize("bench", [None, "empty"])
def test_without_data_the_benchmark_says_why(tmp_path, bench):
    environ = {name: value for name, value in os.environ.items() if name != "FACTORY_BENCH_DIR"}
    if bench:
        environ["FACTORY_BENCH_DIR"] = str(tmp_path)
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True, timeout=120)
    wanted = (
        f"skipped: {tmp_path} lacks cifar10-train.parquet" if bench else "skipped: FACTORY_BENCH_DIR names no folder"
    )
    assert done.stdout.startswith(wanted) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--rates", "RATES"], "--rates needs --cpu-seconds"),
        (["--rates", "absent.json", "--cpu-seconds", "9"], "--rates absent.json: no such file"),
        (["--rates", "RATES", "--cpu-seconds", "9", "--rows", "guided", "real"], "has no rate of guided"),
        (["--measure", "RATES", "--rows", "real-kd", "guided"], "real-kd synthesizes nothing"),
    ],
)
def test_flags_that_do_not_fit_are_refused_in_one_line(tmp_path, monkeypatch, capsys, flags, complaint):
    (tmp_path / "rates.json").write_text('{"unguided": 4.0}')
    flags = [str(tmp_path / "rates.json") if flag == "RATES" else flag for flag in flags]
    monkeypatch.setattr(sys, "argv", ["cifar10.py", "--out", str(tmp_path / "out"), *flags])
    with pytest.raises(SystemExit) as stopped:
        cifar10.main()
    assert stopped.value.code == 2 and complaint in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_trajectories_of_a_rate_need_whole_groups_and_the_rest_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "synthesize", lambda recipe, shards, folder: (f"{shards} shards", 1.0))
    recipe = cifar10.resolve(str(SCRIPT.with_suffix(".yaml")))  # groups of 250, one a shard
    assert cifar10.of_trajectories(recipe, 2151, tmp_path) == ("9 shards", 1.0, "trajectory < 2151")


def test_a_cell_of_other_settings_is_not_reused_and_steps_are_those_that_are_taken(tmp_path, monkeypatch):
    asked = argparse.Namespace(
        set=["distill.batch_size=256"], steps=800, rates=None, cpu_seconds=None, images=2155, split="test",
        prior=SCRIPT.parents[1] / "priors/natural32", students=["resnet8"], out=tmp_path,
        teacher=cifar10.ModelSettings(name=str(SCRIPT.parent / "cifar10-teacher")),
    )  # fmt: skip
    scored, checked = SimpleNamespace(test=SimpleNamespace(accuracy=0.5)), SimpleNamespace(teacher_label_agreement=1)
    learned = SimpleNamespace(students={"resnet8": scored}, teacher_check=checked, teacher_accuracy=0.9)
    epochs = []
    monkeypatch.setattr(cifar10, "of_images", lambda *_: ("m.parquet", 1.0, "trajectory < 2155"))
    monkeypatch.setattr(cifar10.Manifest, "open", lambda _: SimpleNamespace(where=lambda _: range(2155)))
    monkeypatch.setattr(
        cifar10, "run_distill",
        lambda recipe, *_, **__: epochs.append(recipe.distill.epochs) or learned,
    )  # fmt: skip
    made = cifar10.cell("guided", 0, "test.tar", asked)
    assert (made["steps"], epochs) == (800, [100])  # eight batches an epoch: each image once, none left over
    assert cifar10.cell("guided", 0, "test.tar", asked) == made and len(epochs) == 1
    for other in ({"steps": 900}, {"set": []}, {"set": [*asked.set, "synth.guidance.step_size=0.2"]}):
        with pytest.raises(SystemExit, match=r"cell\.json was made with other settings .*: use another --out"):
            cifar10.cell("guided", 0, "test.tar", argparse.Namespace(**vars(asked) | other))
