"""The commands of stage 2, in this process: what they print, write and exit with."""

import io
import json
import tarfile

import numpy as np
import pytest
from typer.testing import CliRunner

from manifests.errors import DataError, FactoryError, UsageError
from manifests.storage import Storage
from pipeline.cli import app
from pipeline.lease import Lease
from tests.distill.drawn import NAMES, square, teacher_files, write_dataset

SHORT = ("--epochs", "2", "--batch-size", "8", "--set", "val_fraction=0.2")


@pytest.fixture
def student(tmp_path) -> str:
    (tmp_path / "student").mkdir()
    for name, data in teacher_files().items():
        (tmp_path / "student" / name).write_bytes(data)
    return str(tmp_path / "student")


def factory(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def test_export(student, tmp_path):
    done = factory("export", "student", student, "--torch-export", tmp_path / "s.pt2")
    assert done.exit_code == 0, done.output
    assert "images batch × 1 × 8 × 8 in [0, 1] to 3 logits" in done.stdout
    assert (tmp_path / "s.pt2").exists()
    assert isinstance(factory("export", "student", student).exception, UsageError)


def test_eval_writes_a_picture(student, dataset, tmp_path):
    args = ("eval", student, dataset, "--teacher", student, "--confusion", tmp_path / "new" / "c.png", "--json")
    done = factory(*args)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["model_teacher_agreement"] == 1
    assert (tmp_path / "new" / "c.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["c.png"]


def test_what_labels_mean_is_said(student, dataset, tmp_path):
    line = "labels are matched to the model's classes by name"
    done = factory("eval", student, dataset, "--json")
    assert json.loads(done.stdout)["class_order"] == line
    assert f"class order: {line}" in done.stderr
    done = factory("run", "distill", "-m", dataset, "-o", tmp_path / "out", *SHORT, "--test-data", dataset)
    assert done.exit_code == 0, done.output
    assert f"test data: {line}" in done.stderr
    assert f"test data: {line}" in done.stdout
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["students"]["digits-cnn-small"]["test"]["class_order"] == line


def test_test_data_of_other_classes_is_refused_before_the_training(dataset, tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / "data" / name).mkdir(parents=True)
    args = ("run", "distill", "-m", dataset, "-o", tmp_path / "out", *SHORT, "--test-data", tmp_path / "data")
    refused = factory(*args).exception
    assert isinstance(refused, DataError)
    assert "3 name no class of the model: a, b, c" in str(refused) and "\n" not in str(refused)
    assert not (tmp_path / "out").exists()
    layers = "loss.student_layers=[nothing]"
    args = ("run", "distill", "-m", dataset, "-o", tmp_path / "out", *SHORT, "--set", "loss.gradcam=1", "--set", layers)
    assert "nothing" in str(factory(*args).exception)
    assert not (tmp_path / "out").exists()


def cut_short(folder) -> str:
    """Labeled images, of which the last one lacks its end."""
    images = [square(i % 3, np.random.default_rng(i)) for i in range(9)]
    for i, image in enumerate(images):
        place = folder / NAMES[i // 3]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i}.png").write_bytes(image[:-40] if i == 8 else image)
    return str(folder)


def test_a_bad_last_test_image_is_found_before_the_training(dataset, tmp_path):
    data = cut_short(tmp_path / "data")
    refused = factory("run", "distill", "-m", dataset, "-o", tmp_path / "out", *SHORT, "--test-data", data).exception
    assert isinstance(refused, DataError)
    assert str(refused) == f"{data}: sample 'top/8.png' is no image: not a readable image: image file is truncated"
    assert not (tmp_path / "out").exists()


def test_a_bad_test_image_that_shows_at_the_end_costs_the_score_alone(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("stages.distill.evaluate.DECODE_SECONDS", 0.0)
    args = (
        "run",
        "distill",
        "-m",
        dataset,
        "-o",
        tmp_path / "out",
        *SHORT,
        "--test-data",
        cut_short(tmp_path / "data"),
    )
    done = factory(*args)
    assert done.exit_code == 3
    assert "test data: 9 in 3 folders; the first 0 were decoded, of the others format and size checked" in done.stderr
    why = "sample 'top/8.png' is no image: not a readable image: image file is truncated"
    assert f"digits-cnn-small: kept without a score on the test data: {tmp_path}/data: {why}" in done.stdout
    kept = [(tmp_path / "out" / name).read_bytes() for name in ("checkpoint.pt", "digits-cnn-small/model.safetensors")]
    again = factory(*args, "--json")
    assert again.exit_code == 3
    assert why in json.loads(again.stdout)["unscored"]["digits-cnn-small"]
    assert kept == [
        (tmp_path / "out" / name).read_bytes() for name in ("checkpoint.pt", "digits-cnn-small/model.safetensors")
    ]
    assert factory(*args[:-2]).exit_code == 0


def test_test_data_are_gone_through_once_before_the_training(dataset, tmp_path, monkeypatch):
    from stages.distill import eval_data

    opened = []
    original = eval_data.find_files
    monkeypatch.setattr(eval_data, "find_files", lambda *args: opened.append(args) or original(*args))
    args = ("run", "distill", "-m", dataset, "-o", tmp_path / "out", *SHORT, "--test-data", dataset, "--no-report")
    assert factory(*args).exit_code == 0
    assert len(opened) == 2  # to check them, and for the score


def test_eval_says_what_it_decided(student, tmp_path):
    folder = tmp_path / "data"
    cut_short(folder)
    (folder / "top/8.png").rename(folder / "top/._8.png")
    done = factory("eval", student, folder)
    assert done.exit_code == 0, done.output
    assert "images: 8 in 3 folders; left out: 1 hidden file ._8.png" in done.stderr
    found = json.loads(factory("eval", student, folder, "--json").stdout)
    assert found["decisions"]["images"] == "8 in 3 folders; left out: 1 hidden file ._8.png"
    assert "class order: labels are matched" in done.stderr


def test_eval_of_several_files(student, tmp_path):
    for number in (0, 1):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for name, data in (("a.png", square(number, np.random.default_rng(0))), ("a.cls", b"%d" % number)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    done = factory("eval", student, tmp_path / "0.tar", tmp_path / "1.tar", "--json")
    assert json.loads(done.stdout)["images"] == 2, done.output


@pytest.mark.parametrize("device", ["foo", "meta", "hpu", "cuda:99"])
def test_a_device_that_cannot_compute_is_refused_in_one_line(student, dataset, device):
    for command in (("eval", student, dataset), ("run", "distill", "-m", dataset, *SHORT)):
        refused = factory(*command, "--device", device).exception
        assert isinstance(refused, UsageError)
        assert str(refused).startswith(f"device '{device}' cannot be used: ") and "\n" not in str(refused)


def test_distil_tells_about_the_teacher_and_skips_bad_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_dataset(tmp_path / "d")
    sorted((tmp_path / "d" / "shards").glob("*.tar"))[1].unlink()
    refused = factory("run", "distill", "-m", path, *SHORT)
    assert "missing tar of shard 1" in str(refused.exception)
    done = factory("run", "distill", "-m", path, *SHORT, "--skip-bad")
    assert done.exit_code == 0, done.output
    assert "24 images are left out" in done.stderr
    assert "of the labels, mean confidence" in done.stderr
    assert "images in each of 3 classes" in done.stderr


def test_the_same_command_without_test_data_keeps_the_score(dataset, tmp_path):
    args = ("run", "distill", "-m", dataset, "-o", tmp_path / "out", *SHORT, "--json")
    first, second = (json.loads(factory(*args, *more).stdout) for more in (("--test-data", dataset), ()))
    scores = [found["students"]["digits-cnn-small"]["test"] for found in (first, second)]
    assert scores[0] == scores[1] and scores[0]["images"] == 48
    lines = factory(*args[:-1])
    assert f"its test score was measured before and is kept: {scores[0]['accuracy']:.1%} on 48 images" in lines.stderr
    assert f"{scores[0]['accuracy']:.1%} on the test data" in lines.stdout


def test_one_process_at_a_time_trains_in_a_folder(dataset, tmp_path):
    out = tmp_path / "out"
    with Lease(Storage(out)):
        refused = factory("run", "distill", "-m", dataset, "-o", out, *SHORT)
        assert type(refused.exception) is FactoryError
        assert not (out / "run.json").exists()
    assert factory("run", "distill", "-m", dataset, "-o", out, *SHORT).exit_code == 0


def test_out_that_is_a_file_is_refused(dataset, tmp_path):
    (tmp_path / "out").write_text("x")
    refused = factory("run", "distill", "-m", dataset, "-o", tmp_path / "out", *SHORT).exception
    assert isinstance(refused, UsageError) and "out is a file; --out names a folder" in str(refused)


def test_a_parked_student_fails_the_command_and_the_others_finish(dataset, tmp_path, monkeypatch):
    from stages.distill import student as module

    original = module.student_terms

    def terms(net, *args):
        spoilt = type(net).__name__ == "ResNetCifar"
        return {name: value * float("nan") if spoilt else value for name, value in original(net, *args).items()}

    monkeypatch.setattr(module, "student_terms", terms)
    students = ("--student", "digits-cnn-small", "--student", "resnet8")
    done = factory("run", "distill", "-m", dataset, "-o", tmp_path / "out", *SHORT, *students)
    assert done.exit_code == 1
    assert "resnet8: parked, loss is nan at step 0" in done.stdout
    assert (tmp_path / "out" / "digits-cnn-small" / "model.safetensors").exists()


def test_the_dry_run_counts_the_steps_of_the_run(dataset, tmp_path):
    other = write_dataset(tmp_path / "other", count=20, seed=1)
    args = ("run", "distill", "-m", f"{dataset}@2.5", "-m", f"{other}@0.3", "-o", tmp_path / "out", *SHORT, "--json")
    shown = json.loads(factory(*args, "--dry-run").stdout)
    assert factory(*args).exit_code == 0
    lines = (tmp_path / "out/digits-cnn-small/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines][-1] == shown["steps"]
    assert shown["images_per_epoch"] > 2 * 48 * 0.8


def test_the_dry_run_tells_of_workers(dataset):
    shown = factory("run", "distill", "-m", dataset, *SHORT, "--workers", "2", "--dry-run")
    assert "workers   2 through Ray Train, about 4 images of each batch for one" in shown.stdout
    assert "Ray Train" not in factory("run", "distill", "-m", dataset, *SHORT, "--dry-run").stdout
