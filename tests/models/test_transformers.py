"""Classifiers in the format of transformers: loaded, saved, or asked about where their files leave something open."""

import hashlib
import json
import shutil

import pytest
import safetensors.torch
import torch

from manifests.errors import DataError, UsageError
from stages.models import build
from stages.models.folders import processor_input, read_json
from stages.models.loading import load_model, load_teacher, save_model
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


@pytest.mark.parametrize("kind", ["ViT", "ConvNext", "Bit", "MobileNetV2"])
def test_ordinary_processors_are_understood(kind, tmp_path):
    import transformers

    own = getattr(transformers, f"{kind}ImageProcessor")()
    own.save_pretrained(tmp_path)
    found = processor_input(read_json(tmp_path / "preprocessor_config.json"), 3)
    assert (found.mean, found.std) == (tuple(own.image_mean), tuple(own.image_std))


def test_an_input_that_is_not_ours_or_not_said_is_asked_for(folder, tmp_path):
    from transformers import MobileViTImageProcessor

    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    MobileViTImageProcessor(crop_size={"height": 8, "width": 8}).save_pretrained(tmp_path)  # BGR in [0, 1]
    with pytest.raises(UsageError, match="do not tell input: the recipe must"):
        resolve(ModelSettings(name=f"hf:{tmp_path}"))
    said = read_json(folder / "preprocessor_config.json")
    malformed = ({"rescale_factor": None}, {"resample": []}, {"image_mean": "half"}, {"size": {"height": []}})
    for other in ({"do_normalize": None}, {"do_flip_channel_order": True}, {"rescale_offset": True}, *malformed):
        assert processor_input(said | other, 3) is None
    assert processor_input(said | {"do_normalize": False}, 3).mean == (0.0,) * 3


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
