"""Classifiers in the format of transformers: loaded, saved, or asked about where their files leave something open."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from manifests.errors import DataError, UsageError
from stages.models import build
from stages.models.folders import read_json
from stages.models.inputs import InputSpec, to_unit
from stages.models.loading import load_model, load_teacher, save_model
from stages.models.processors import processor_input
from stages.models.source import resolve, teacher_identity
from stages.settings import ModelSettings
from tests.models.test_foreign import IMAGES, RGB, config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny ViT as transformers saves it."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    folder = tmp_path_factory.mktemp("hf")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    vit = ViTConfig(image_size=8, patch_size=4, id2label=dict(enumerate("abcde")), **small)
    ViTForImageClassification(vit).save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}, image_std=[0.25] * 3).save_pretrained(folder)
    return folder


def test_a_folder_knows_its_own(folder):
    teacher = load_teacher(ModelSettings(name=f"hf:{folder}"))
    assert teacher.input.settings == RGB
    assert teacher.class_names == tuple("abcde")
    assert not teacher.has_batchnorm and teacher.differentiable
    x = IMAGES.clone().requires_grad_()
    logits = teacher.logits(x)
    logits.sum().backward()
    assert x.grad.abs().sum() > 0
    again = teacher.with_features(IMAGES)[1] @ teacher.class_weights.T + teacher.net.classifier.bias
    torch.testing.assert_close(again, logits.detach())


def test_half_precision_checkpoints_run_in_float32(folder, tmp_path):
    from transformers import ViTForImageClassification

    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    half = ViTForImageClassification.from_pretrained(folder).half()
    half.save_pretrained(tmp_path)
    settings = ModelSettings(name=f"hf:{tmp_path}")
    teacher = load_teacher(settings)
    assert torch.equal(teacher.logits(IMAGES), half.float()(teacher.input(IMAGES)).logits)
    weights = (tmp_path / "model.safetensors").read_bytes()
    assert teacher.identity == teacher_identity(settings)
    assert teacher.identity["sha256"] != hashlib.sha256(weights).hexdigest()  # what it made in fp16 is not resumed
    weights = (folder / "model.safetensors").read_bytes()
    assert teacher_identity(ModelSettings(name=f"hf:{folder}"))["sha256"] == hashlib.sha256(weights).hexdigest()


PROCESSORS = [
    ("ViT", {}, "224 px, RGB, both sides resized"),
    ("ConvNext", {"size": {"shortest_edge": 24}}, "24 px, RGB, short side to 27 and center crop"),  # 24 / 0.875
    ("ConvNext", {}, "384 px, RGB, both sides resized"),
    ("Bit", {"size": {"shortest_edge": 9}, "crop_size": 8}, "8 px, RGB, short side to 9 and center crop"),
    ("DeiT", {}, "224 px, RGB, resized to 256×256, whatever the aspect, and center crop"),
    ("Levit", {"size": {"shortest_edge": 32}, "crop_size": 32}, "32 px, RGB, short side to 36"),  # 32 · 256/224
    ("EfficientNet", {"size": {"height": 32, "width": 32}}, "mean 0.5 0.5 0.5, std 0.25 0.25 0.25"),  # normalizes twice
    ("MobileViT", {"size": {"shortest_edge": 9}, "crop_size": 8}, "8 px, BGR, short side to 9"),
    ("ViT", {"do_normalize": False, "resample": 0}, "nearest, mean 0 0 0, std 1 1 1"),
]


@pytest.mark.parametrize(("kind", "fields", "rule"), PROCESSORS)
def test_processors_are_understood_as_they_are_run(kind, fields, rule, tmp_path):
    import transformers

    processor = getattr(transformers, f"{kind}ImageProcessor")(**fields)
    processor.save_pretrained(tmp_path)
    found = processor_input(tmp_path, "preprocessor_config.json", read_json(tmp_path / "preprocessor_config.json"), 3)
    assert rule in str(found)
    picture = np.random.default_rng(0).integers(64, 192, (301, 467, 3), dtype=np.uint8)
    theirs = processor(Image.fromarray(picture), return_tensors="pt")["pixel_values"][0]
    spec = InputSpec(found)
    off = spec(spec.view(to_unit(torch.from_numpy(picture)[None])))[0] - theirs
    assert (off.abs() * torch.tensor(found.std).view(3, 1, 1)).max() < 2.5 / 255


@pytest.mark.parametrize(
    ("kind", "fields", "line"),
    [
        ("Bit", {"do_center_crop": False}, "do_center_crop False.*resize_size: 224"),
        ("ViT", {"resample": 1}, "says size .*resample 1, .*no input rule reproduces as ViTImageProcessor does"),
        ("CLIP", {"crop_size": {"height": 32, "width": 24}}, "nearest rule is input: {size: 32"),
        ("Perceiver", {}, "says size .* as PerceiverImageProcessor does"),
        ("ImageGPT", {}, "Clusters must|do_color_quantize"),
        ("ViT", {"size": {"height": 10**6, "width": 10**6}}, "sides above 4096"),
        ("ConvNext", {"crop_pct": 1e-9}, "crop_pct below"),
    ],
)
def test_a_processor_that_does_something_else_is_asked_about(kind, fields, line, folder, tmp_path):
    import transformers

    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    getattr(transformers, f"{kind}ImageProcessor")(**fields).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=f"needs input in its settings.*{line}"):
        resolve(ModelSettings(name=f"hf:{tmp_path}"))


@pytest.mark.parametrize("wrong", [{"rescale_factor": "all"}, {"resample": [9]}, {"image_mean": "half"}])
def test_a_malformed_processor_is_refused_in_a_line(wrong, folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    said = read_json(folder / "preprocessor_config.json")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said | wrong))
    with pytest.raises(UsageError, match=r"needs input in its settings: [^\n]*$"):
        resolve(ModelSettings(name=f"hf:{tmp_path}"))


def test_the_class_that_architectures_names_is_built(tmp_path):
    from transformers import DeiTConfig, DeiTForImageClassification, DeiTForImageClassificationWithTeacher

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    for kind in (DeiTForImageClassification, DeiTForImageClassificationWithTeacher):
        deit = kind(DeiTConfig(image_size=8, patch_size=4, num_labels=5, **small)).eval()
        deit.save_pretrained(tmp_path)
        teacher = load_teacher(ModelSettings(name=f"hf:{tmp_path}", input=RGB))
        assert type(teacher.net) is kind
        torch.testing.assert_close(teacher.logits(IMAGES), deit(teacher.input(IMAGES)).logits)
    content = read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(json.dumps(content | {"architectures": ["DeiTModel"]}))
    with pytest.raises(UsageError, match="must name one of DeiTForImageClassification, DeiTForImageClassificationWith"):
        load_teacher(ModelSettings(name=f"hf:{tmp_path}", input=RGB))


def test_one_label_leaves_nothing_to_choose(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    content = read_json(folder / "config.json") | {"id2label": {"0": "a"}, "label2id": {"a": 0}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="number of classes is 1; expected 2 to"):
        resolve(ModelSettings(name=f"hf:{tmp_path}"))


def test_students_come_back(folder, tmp_path):
    named = config(f"hf:{folder}", classes=3)
    net = build.build_net(named).eval()
    save_model(tmp_path, net, named)
    again, _ = load_model(tmp_path)
    assert torch.equal(again(IMAGES), net(IMAGES)) and again(IMAGES).shape == (3, 3)
    save_model(tmp_path, net, config("hf:no/where", classes=3))
    with pytest.raises(UsageError, match="never loaded because a file says so"):
        load_model(tmp_path)
    weights = str(tmp_path / "model.safetensors")  # of 3 classes, where the named files have 5
    settings = ModelSettings(name=f"hf:{folder}", weights=weights, num_classes=3)
    assert torch.equal(load_teacher(settings).net(IMAGES), net(IMAGES))


def test_keys_that_do_not_fit_are_named(folder, tmp_path):
    state = safetensors.torch.load_file(folder / "model.safetensors")
    del state["classifier.bias"]
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(DataError, match=r"does not fit ViTForImageClassification: missing: classifier\.bias"):
        load_teacher(ModelSettings(name=f"hf:{folder}", weights=str(tmp_path / "w.safetensors")))
