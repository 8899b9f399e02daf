"""Students in use: loaded in one call, exported with answers compared, scored with a picture."""

import io
import sys

import pytest
import torch
from PIL import Image

from manifests.errors import DataError, FactoryError, UsageError
from stages.distill import export
from stages.distill.evaluate import CELL, confusion_picture
from stages.distill.export import load_student
from stages.models.inputs import InputSpec
from stages.models.loading import load_model
from tests.distill.drawn import teacher_files


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("student")
    for name, data in teacher_files().items():
        (folder / name).write_bytes(data)
    return str(folder)


def test_load_student_takes_images_as_they_are(student):
    net, config = load_model(student)
    images = torch.rand(2, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    found = load_student(student)
    assert torch.equal(found(images), net(InputSpec(config.input)(images * 2 - 1)))
    assert not found.training
    with pytest.raises(DataError):
        load_student("/nowhere/at/all")


def test_torch_export(student, tmp_path):
    made = export.export_torch(student, str(tmp_path / "s.pt2"))
    assert made["largest_difference"] <= export.TOLERANCE
    assert made["input"] == ["batch", 1, 8, 8]
    images = torch.rand(3, 1, 8, 8)
    gray = load_student(student)(images.expand(-1, 3, -1, -1))
    assert torch.allclose(torch.export.load(tmp_path / "s.pt2").module()(images), gray, atol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["s.pt2"]


def test_onnx(student, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    made = export.export_onnx(student, str(tmp_path / "s.onnx"))
    assert made["largest_difference"] <= export.TOLERANCE
    images = torch.rand(3, 1, 8, 8)
    session = runtime.InferenceSession(tmp_path / "s.onnx", providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
    assert torch.allclose(found, load_student(student)(images.expand(-1, 3, -1, -1)), atol=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["s.onnx"]


def test_answers_that_differ_are_not_written(student, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(FactoryError, match=r"differ from PyTorch's by .*: not written"):
        export.export_torch(student, str(tmp_path / "s.pt2"))
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_is_said(student, tmp_path):
    for file, says in (
        (tmp_path / "no" / "s.pt2", "does not exist"),
        (tmp_path, "is a folder: name the file to write in it"),
        (tmp_path / ("s" * 300), "cannot be written: File name too long"),
    ):
        with pytest.raises(UsageError, match=says):
            export.export_torch(student, str(file))
    assert not list(tmp_path.iterdir())


def test_what_is_missing_is_said(student, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UsageError, match=r"needs onnxruntime: pip install 'dfkd-factory\[onnx\]'"):
        export.export_onnx(student, str(tmp_path / "s.onnx"))


def test_confusion_picture():
    image = Image.open(io.BytesIO(confusion_picture([[3, 0], [1, 1]], ["kept", "日本"])))
    dark, light, half = (image.getpixel((110 + x * CELL + 3, 34 + y * CELL + 3)) for x, y in ((0, 0), (1, 0), (0, 1)))
    assert dark == (8, 48, 107)
    assert light == (255, 255, 255)
    assert dark < half < light
    many = Image.open(io.BytesIO(confusion_picture([[0] * 40 for _ in range(40)], [str(i) for i in range(40)])))
    assert max(many.size) < 200
