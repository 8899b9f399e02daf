"""Students in use: loaded in one call, exported with answers compared, scored with a picture."""

import io
import sys

import numpy as np
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
    spec = InputSpec(config.input)
    assert torch.equal(found(images), net(spec(spec.view(images * 2 - 1))))
    assert not found.training
    with pytest.raises(DataError):
        load_student("/nowhere/at/all")


def test_load_student_takes_every_kind_of_image(student):
    net = load_student(student)
    pixels = torch.randint(0, 256, (2, 3, 20, 14), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    logits = net(pixels)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
    assert torch.equal(net(pictures), logits)
    assert torch.allclose(net(pictures[1]), logits[1:], atol=1e-6)  # other batches may round differently
    assert torch.allclose(net(pixels[0]), logits[:1], atol=1e-6)
    for floats in (pixels / 255, (pixels / 255).double()):
        assert torch.allclose(net(floats), logits, atol=1e-5) and torch.allclose(net(floats[0]), logits[:1], atol=1e-5)
    gray = Image.fromarray(pixels[0, 0].numpy())
    assert torch.equal(net(gray), net(pixels[:1, :1])) and torch.equal(
        net([gray, gray.convert("RGBA")]), net([gray] * 2)
    )
    wide = Image.new("RGB", (3, 9), "red")  # 3 pixels wide is not 3 channels
    assert torch.equal(net(wide), net(torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1, 1).expand(3, 9, 3)))


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (torch.full((1, 3, 8, 8), 255.0), r"must lie in \[0, 1\], got values from 255 to 255"),
        (torch.full((3, 8, 8), -0.5), r"must lie in \[0, 1\]"),
        (torch.full((1, 3, 8, 8), float("nan")), r"must lie in \[0, 1\]"),
        (torch.zeros(8, 8, dtype=torch.uint8), r"channels first, got \[8, 8\]"),
        (torch.zeros(1, 8, 8, 3, dtype=torch.uint8), r"channels first, got \[1, 8, 8, 3\]"),
        (torch.zeros(0, 3, 8, 8), r"channels first, got \[0, 3, 8, 8\]"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int64), "as uint8, or floating point in .*, got torch.int64"),
        (Image.new("I;16", (8, 8)), "8 bits a channel, or a tensor .* got a PIL image of mode I;16"),
        (["a.png"], "got str"),
        ([], "got list"),
        (np.zeros((8, 8, 3), np.uint8), "got ndarray"),
    ],
)
def test_load_student_refuses_what_would_be_nonsense(student, images, says):
    with pytest.raises(UsageError, match=says):
        load_student(student)(images)


def test_torch_export(student, tmp_path):
    made = export.export_torch(student, str(tmp_path / "s.pt2"))
    assert made.largest_difference <= export.TOLERANCE
    assert made.input == ("batch", 1, 8, 8)
    images = torch.rand(3, 1, 8, 8)
    gray = load_student(student)(images.expand(-1, 3, -1, -1))
    assert torch.allclose(torch.export.load(tmp_path / "s.pt2").module()(images), gray, atol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["s.pt2"]


def test_onnx(student, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    made = export.export_onnx(student, str(tmp_path / "s.onnx"))
    assert made.largest_difference <= export.TOLERANCE
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
