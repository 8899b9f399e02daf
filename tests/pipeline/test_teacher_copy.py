"""The dataset's copy of its teacher: same bytes for safetensors, converted otherwise, checked before use."""

import json

import pytest
import torch

from manifests.errors import DataError
from manifests.storage import Storage
from pipeline.plan import prepare, publish
from stages.models.loading import load_model, load_teacher
from stages.models.source import resolve, teacher_identity
from stages.settings import InputSettings, ModelSettings

DIGITS = ModelSettings()


def test_a_safetensors_teacher_is_copied_byte_for_byte(tmp_path):
    identity = teacher_identity(DIGITS)
    copy = prepare(resolve(DIGITS))
    publish(Storage(tmp_path), copy)
    assert (tmp_path / "teacher/model.safetensors").read_bytes() == resolve(DIGITS).read()
    assert copy.identity == identity | {"path": "teacher/model.safetensors"}
    again = load_teacher(ModelSettings(name=str(tmp_path / "teacher")))
    assert again.identity["sha256"] == identity["sha256"]
    assert again.class_names == tuple(json.loads((tmp_path / "teacher/config.json").read_text())["class_names"])


def test_a_torch_checkpoint_is_converted_and_both_checksums_kept(tmp_path):
    net, config = load_model(str(resolve(DIGITS).weights.parent))
    torch.save({"state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}}, tmp_path / "t.pt")
    settings = ModelSettings(
        name=config.architecture,
        weights=str(tmp_path / "t.pt"),
        input=InputSettings(**config.input.model_dump()),
        num_classes=config.num_classes,
        class_names=config.class_names,
    )
    copy = prepare(resolve(settings))
    assert copy.identity["source_sha256"] == teacher_identity(settings)["sha256"] != copy.identity["sha256"]
    publish(Storage(tmp_path / "run"), copy)
    copied, _ = load_model(str(tmp_path / "run/teacher"))
    x = torch.randn(2, config.channels, config.input.size, config.input.size)
    torch.testing.assert_close(copied(x), net(x), rtol=0, atol=0)


def test_truncated_weights_are_found_before_anything_is_written(tmp_path):
    (tmp_path / "short.safetensors").write_bytes(resolve(DIGITS).read()[:-100])
    settings = ModelSettings(weights=str(tmp_path / "short.safetensors"))
    with pytest.raises(DataError, match=r"short.safetensors is truncated"):
        prepare(resolve(settings))


def test_an_external_teacher_is_only_named():
    gray = InputSettings(size=8, channels=1, mean=(0.0,), std=(1.0,))
    source = resolve(ModelSettings(name="tests.models.nets:tiny", num_classes=3, input=gray))
    copy = prepare(source)
    assert source.identity["kind"] == "external"
    assert (copy.files, copy.identity) == ({}, source.identity)
