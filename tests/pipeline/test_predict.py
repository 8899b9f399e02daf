"""``factory predict``: pictures of files, folders and patterns; those that cannot be read cost a line each."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from manifests.errors import DataError, UsageError
from pipeline.cli import app
from pipeline.predict import predict
from stages.distill.export import load_student

MODEL = "embedded:digits"


def factory(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture
def pictures(tmp_path):
    """Three pictures of different shapes, one of them in a folder below, and a file that is none."""
    (tmp_path / "below").mkdir()
    rng = np.random.default_rng(0)
    for name, shape in (("a.png", (8, 8, 3)), ("b.jpg", (40, 30, 3)), ("below/c.webp", (64, 64, 3))):
        Image.fromarray(rng.integers(0, 255, shape, np.uint8)).save(tmp_path / name)
    (tmp_path / "bad.png").write_bytes(b"nothing")
    (tmp_path / "notes.txt").write_text("not looked at")
    return tmp_path


def test_a_folder_is_searched_and_a_bad_file_costs_a_line_and_exit_3(pictures):
    done = factory("predict", MODEL, pictures, "-k", 2)
    assert done.exit_code == 3
    lines = done.stdout.splitlines()
    assert [line.partition(": ")[0].rsplit("/", 1)[-1] for line in lines] == ["a.png", "b.jpg", "bad.png", "c.webp"]
    assert "no picture" in lines[2] and lines[0].count("%") == 2
    assert "1 of 4 images could not be read" in done.stderr


def test_probabilities_are_those_of_the_loaded_student(pictures):
    student = load_student("stages/assets/digits-teacher")
    with torch.no_grad():
        expected = student(Image.open(pictures / "b.jpg")).softmax(1)[0]
    (found,) = predict(MODEL, [str(pictures / "b.jpg")], top=10)
    names = student.config.class_names
    assert dict(found.top) == pytest.approx({names[i]: float(expected[i]) for i in range(10)}, abs=1e-5)
    assert [value for _, value in found.top] == sorted((value for _, value in found.top), reverse=True)


def test_json_and_csv_say_the_same(pictures):
    done = factory("predict", MODEL, pictures / "*.png", "--json", "--csv", pictures / "t.csv", "-k", 1)
    assert done.exit_code == 3
    found = json.loads(done.stdout)["predictions"]
    rows = [*csv.DictReader((pictures / "t.csv").open())]
    assert [row["file"] for row in rows] == [each["file"] for each in found] == [
        str(pictures / "a.png"), str(pictures / "bad.png"),
    ]  # fmt: skip
    assert rows[0]["class_1"] == found[0]["top"][0]["class"] and rows[0]["error"] == ""
    assert rows[1]["error"] == found[1]["error"] and rows[1]["class_1"] == ""


@pytest.mark.parametrize(
    ("images", "error"), [("gone-*.png", "no file has such a name"), ("empty", "no image below this folder")]
)
def test_nothing_to_look_at_is_said_before_the_model_loads(pictures, images, error):
    (pictures / "empty").mkdir()
    with pytest.raises(DataError, match=error):
        predict("nowhere", [str(pictures / images)])
    with pytest.raises(UsageError, match="expected 1 or more"):
        predict(MODEL, [str(pictures)], top=0)
    (missing,) = predict(MODEL, [str(pictures / "gone.png")])
    assert missing.error == "cannot be read: No such file or directory"
