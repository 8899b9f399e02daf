"""An input rule with a center crop, end to end: pictures are cropped, images of a dataset are not."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T

from manifests.reader import Manifest
from stages.distill.evaluate import evaluate
from stages.distill.export import export_onnx, load_student
from stages.models import nets
from stages.models.inputs import to_unit
from stages.models.loading import load_teacher, save_model
from stages.models.source import ModelConfig
from stages.settings import InputSettings, ModelSettings
from tests.distill.drawn import NAMES

RULE = InputSettings(size=16, resize_size=24, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25), channel_order="bgr")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    net = nets.build("resnet8", 3).eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    net.train()(torch.randn(64, 3, 16, 16))  # answers that differ from image to image
    folder = tmp_path_factory.mktemp("model")
    config = ModelConfig(architecture="resnet8", num_classes=3, channels=3, input=RULE, class_names=NAMES)
    save_model(folder, net.eval(), config)
    return str(folder)


def pictures(seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(12):
        height, width = rng.integers(20, 60, 2)
        yield Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_pictures_are_scored_as_by_the_reference_transform(model, tmp_path):
    teacher = load_teacher(ModelSettings(name=model))
    transform = T.Compose([T.Resize(24), T.CenterCrop(16), T.ToTensor(), T.Normalize(RULE.mean, RULE.std)])
    logits = [teacher.net(transform(picture)[None].flip(1))[0] for picture in pictures()]
    for number, (picture, scores) in enumerate(zip(pictures(), logits, strict=True)):
        (tmp_path / NAMES[int(scores.argmax())]).mkdir(exist_ok=True)
        picture.save(tmp_path / NAMES[int(scores.argmax())] / f"{number}.png")
    found = evaluate(model, str(tmp_path), ModelSettings(name=model))
    assert (found.accuracy, found.teacher_accuracy) == (1.0, 1.0)
    assert "short side to 24 and center crop" in found.decisions["input"]
    torch.testing.assert_close(load_student(model)(list(pictures())), torch.stack(logits), atol=1e-5, rtol=0)


def test_images_of_a_dataset_are_not_cropped(model, dataset):
    teacher, rows = load_teacher(ModelSettings(name=model)), Manifest.open(dataset)
    images = torch.from_numpy(np.stack(rows.pixels(range(len(rows)))))
    labels = torch.tensor([int(label) for label in rows.column("label")])
    whole = (teacher.logits(to_unit(images)).argmax(1) == labels).double().mean().item()
    assert evaluate(model, dataset).accuracy == whole


def test_an_exported_student_keeps_its_channel_order(model, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    export_onnx(model, str(tmp_path / "m.onnx"))
    teacher, x = load_teacher(ModelSettings(name=model)), torch.rand(2, 3, 16, 16)
    answer = onnxruntime.InferenceSession(tmp_path / "m.onnx").run(None, {"images": x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(answer), teacher.logits(x * 2 - 1), atol=1e-4, rtol=0)


def test_the_rule_is_stored(model):
    stored = json.loads(Path(model, "config.json").read_text())["input"]
    assert (stored["resize_size"], stored["channel_order"]) == (24, "bgr")
