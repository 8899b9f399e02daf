"""Students in use: loaded in one call, exported with answers compared, scored with a picture."""

import io
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from manifests.checked_json import dump_checked, load_checked
from manifests.errors import DataError, FactoryError, UsageError
from manifests.reader import Manifest
from stages.distill import export
from stages.distill.evaluate import CELL, confusion_picture, evaluate
from stages.distill.export import load_student
from stages.models.build import build_net
from stages.models.folders import timm_input, timm_rule
from stages.models.inputs import InputSpec, to_unit
from stages.models.loading import load_model, save_model
from stages.models.source import NamedConfig, layout_of, resolve
from stages.settings import InputSettings, ModelSettings
from tests.distill.drawn import teacher_files, write_dataset


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


def test_what_an_exporter_cannot_follow_is_one_line(student, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("\x1b[96mone\n\ntwo")

    monkeypatch.setattr(torch.export, "export", broken)
    with pytest.raises(FactoryError, match=r"torch\.export cannot export .*one two$"):
        export.export_torch(str(student), str(tmp_path / "s.pt2"))
    assert [*tmp_path.iterdir()] == []


def test_images_that_a_network_cannot_take_are_said_before_the_export(student, tmp_path):
    copy = shutil.copytree(student, tmp_path / "copy")
    values = load_checked((copy / "config.json").read_bytes())
    values["input"]["size"] = 1
    (copy / "config.json").write_bytes(dump_checked(values))
    with pytest.raises(UsageError, match="cannot take 1 × 1 pixels"):
        export.export_torch(str(copy), str(tmp_path / "s.pt2"))


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


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[str, str]:
    """A teacher that tells the drawn squares apart, as a model folder with a card, and a dataset."""
    folder = tmp_path_factory.mktemp("trained")
    manifest = write_dataset(folder / "data", count=192)
    net, config = load_model(str(folder / "data/teacher"))
    images = Manifest.open(manifest)
    spec, x = InputSpec(config.input), torch.from_numpy(np.stack(images.pixels(range(len(images)))))
    x, labels = spec(to_unit(x)), torch.from_numpy(images.labels)
    optimizer = torch.optim.Adam(net.train().parameters(), 0.01)
    for _ in range(30):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x), labels).backward()
        optimizer.step()
    save_model(folder / "student", net.eval(), config)
    (folder / "student/README.md").write_text("# A student\n")
    return str(folder / "student"), manifest


def test_int8_without_real_images(trained, tmp_path):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    from stages.distill.quantize import export_int8

    student, manifest = trained
    images, file = Manifest.open(manifest), tmp_path / "s.onnx"
    made = export_int8(student, str(file), images, 0.02, [manifest])
    assert made.agreement >= 0.98 and made.calibration == 96 and made.held_out == 96
    assert made.bytes < made.fp32_bytes / 1.5 and file.stat().st_size > made.bytes  # with what was measured
    scores = evaluate(str(file), [manifest])  # its metadata say input and classes
    assert scores.accuracy == made.accuracy and scores.accuracy > 0.95
    export_int8(student, str(file), images)
    card = (Path(student) / "README.md").read_text()
    assert card.startswith("# A student") and card.count("**INT8** (s.onnx)") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["s.onnx"]


def test_int8_that_loses_too_much_is_not_written(trained, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    from stages.distill import quantize

    student, manifest = trained
    answers = iter([np.zeros(96), np.arange(96) < 5])
    monkeypatch.setattr(quantize, "_classes", lambda path, batches: next(answers))
    with pytest.raises(FactoryError, match=r"5.2% get another class, at most 2.0% were allowed"):
        quantize.export_int8(student, str(tmp_path / "s.onnx"), Manifest.open(manifest))
    assert not [*tmp_path.iterdir()]
    with pytest.raises(DataError, match="calibration needs 64"):
        quantize.export_int8(
            student, str(tmp_path / "s.onnx"), Manifest.open(manifest).where("label == 0").take([0, 1])
        )


def test_a_timm_student_loads_in_timm_and_in_transformers(tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    rule = InputSettings(size=96, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), resize="bicubic", resize_size=110)
    config = NamedConfig(
        architecture="timm:resnet10t", num_classes=3, channels=3, input=rule, class_names=("cat", "dog", "emu")
    )
    net = build_net(config).eval()
    save_model(tmp_path, net, config)
    pixels = np.random.default_rng(0).integers(0, 256, (120, 150, 3), dtype=np.uint8)
    with torch.no_grad():
        expected = load_student(tmp_path)(Image.fromarray(pixels))
        other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        view = timm.data.create_transform(**timm.data.resolve_data_config({}, model=other))
        assert torch.allclose(other(view(Image.fromarray(pixels))[None]), expected, atol=1e-5)
        wrapped = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
        inputs = AutoImageProcessor.from_pretrained(tmp_path)(Image.fromarray(pixels), return_tensors="pt")
        assert torch.allclose(wrapped(**inputs).logits, expected, atol=1e-5)
    assert wrapped.config.id2label == {0: "cat", 1: "dog", 2: "emu"}
    loaded, stored = load_model(tmp_path)
    assert stored.input == rule and torch.equal(loaded.state_dict()["fc.bias"], net.state_dict()["fc.bias"])
    assert resolve(ModelSettings(name=f"timm:{tmp_path}")).config.input == rule  # as of anybody's folder of timm


@pytest.mark.parametrize("changes", [{"stem": "small"}, {"architecture": "torchvision:resnet18"}])
def test_what_timm_builds_otherwise_is_not_in_its_layout(changes):
    rule = InputSettings(size=32, mean=(0.5,) * 3, std=(0.5,) * 3)
    values = {
        "architecture": "timm:resnet10t",
        "num_classes": 2,
        "channels": 3,
        "input": rule,
        "class_names": ("a", "b"),
    }
    assert layout_of(NamedConfig(**values)) is not None
    assert layout_of(NamedConfig(**values | changes)) is None
    bgr = rule.model_copy(update={"channel_order": "bgr"})
    assert layout_of(NamedConfig(**values | {"input": bgr})) is None


@pytest.mark.parametrize("size", [(224, 256), (32, 36), (97, 113), (64, None)])
def test_the_input_rule_survives_timms_words(size):
    rule = InputSettings(size=size[0], resize_size=size[1], mean=(0.1, 0.2, 0.3), std=(0.5,) * 3, resize="bicubic")
    back = timm_input(timm_rule(rule), {})
    assert back == rule or (size[1] is None and back.resize_size in (None, (64, 64)))
