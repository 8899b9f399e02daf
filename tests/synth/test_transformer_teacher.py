"""A teacher without BatchNorm, here a tiny ViT out of a transformers folder: it guides by class prior and two views."""

import logging

import pyarrow.parquet as pq
import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from manifests.shard import done_records
from manifests.storage import Storage
from stages.settings import GuidanceSettings, SynthSettings
from stages.synth.guidance import Guidance
from stages.synth.inputs import inspect_inputs, semantics
from stages.synth.worker import ShardWorker


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A random ViT of 16 pixels and 5 classes, sharp enough to have opinions."""
    folder = tmp_path_factory.mktemp("vit")
    sizes = {"hidden_size": 24, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    net = ViTForImageClassification(
        ViTConfig(image_size=16, patch_size=4, num_labels=5, initializer_range=0.2, **sizes)
    )
    net.classifier.weight.data *= 3
    net.save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return f"hf:{folder}"


def made(vit, folder, **kw):
    given = {
        "prior": {"path": "embedded:strokes32", "steps": 10, "cfg_scale": 1.0},
        "teacher": {"name": vit},
        "guidance": {"step_size": 1.0, "decoder": "full", **kw.pop("guidance", {})},
        "groups_per_shard": 1,
        "group_size": 20,
        "device": "cpu",
    }
    settings = SynthSettings.model_validate(given | kw)
    ShardWorker(settings, str(folder), "f" * 64).run(0)
    rows = pq.read_table(folder / done_records(Storage(str(folder)))[0].table).to_pylist()
    return sum(row["teacher_label"] == row["label"] for row in rows) / len(rows), rows


def test_a_vit_guides_without_feature_statistics(vit, tmp_path, caplog):
    caplog.set_level(logging.WARNING, "stages")
    plain, _ = made(vit, tmp_path / "plain", method="dmkd")
    assert not caplog.messages
    guided, rows = made(vit, tmp_path / "guided")
    (note,) = caplog.messages
    assert note.endswith("has no BatchNorm: the feature-statistics term is off, view consistency is on instead")
    assert plain < 0.4 and guided > 0.6
    assert all(row["loss_ce"] is not None and row["loss_bn"] == 0 for row in rows)


def test_without_consistency_other_images_are_made(vit, tmp_path, caplog):
    made(vit, tmp_path / "two")
    made(vit, tmp_path / "one", guidance={"consistency": 0.0})
    assert caplog.messages[-1].endswith("the feature-statistics term is off")
    tars = [done_records(Storage(str(tmp_path / name)))[0].tar_sha256 for name in ("two", "one")]
    assert tars[0] != tars[1]


def test_the_setting_is_part_of_the_plan_only_where_it_is_set(vit):
    def covered(**guidance):
        settings = SynthSettings.model_validate({"teacher": {"name": vit}, "guidance": guidance})
        return semantics(settings, inspect_inputs(settings))["settings"]

    base, changed = covered(), covered(consistency=2.0)
    assert "guidance" not in base
    assert changed == base | {"guidance": {"consistency": 2.0}}


def test_the_guides_losses_carry_the_term(vit, tmp_path):
    given = {"teacher": {"name": vit}, "prior": {"cfg_scale": 1.0}, "guidance": {"decoder": "full"}, "device": "cpu"}
    settings = SynthSettings.model_validate(given)
    models = ShardWorker(settings, str(tmp_path), "f" * 64).models
    images, labels = torch.rand(6, 3, 32, 32) * 2 - 1, torch.tensor([0, 1, 2, 3, 4, 0])

    def losses(weight):
        guide = Guidance(models.prior, models.teacher, labels, GuidanceSettings(consistency=weight))
        return guide.terms(images, torch.Generator())

    assert losses(None).inconsistency.shape == (6,) and losses(None).inconsistency.min() > 0
    assert losses(0.0).inconsistency is None
