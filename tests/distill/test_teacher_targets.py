"""The teacher's answers, the layers that Grad-CAM compares, and the terms of a student."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from manifests.errors import UsageError
from stages.distill.batches import Batch
from stages.distill.losses import dkd, paired_layers, student_terms, teacher_targets, weighted
from stages.models import nets
from stages.models.inputs import InputSpec
from stages.models.loading import load_teacher
from stages.settings import DistillSettings, LossSettings, ModelSettings

EVERY = LossSettings(kd=1, ce=1, variants_ce=1, cam=1, gradcam=1)


@pytest.fixture(scope="module")
def teacher():
    return load_teacher(ModelSettings())


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(4, 3, 16, 16, generator=generator) * 2 - 1
    labels = torch.tensor([0, 1, 2, 3])
    here = np.arange(4)
    return Batch(x, labels, labels, torch.ones(4), torch.tensor([0.0, 1.0, 0.0, 0.0]), here, np.zeros_like(here), 4, 1)


def test_stages_are_paired_from_the_last_one_back(teacher):
    student = nets.build("resnet8", 10, 1)
    assert paired_layers(EVERY, teacher.net, student) == (["stage1", "stage2"], ["layer2", "layer3"])
    assert paired_layers(EVERY, student, teacher.net) == (["layer2", "layer3"], ["stage1", "stage2"])


def test_named_layers(teacher):
    student = nets.build("resnet8", 10, 1)
    named = EVERY.model_copy(update={"teacher_layers": ("stage1.0", "stage2"), "student_layers": ("conv1", "layer3.0")})
    assert paired_layers(named, teacher.net, student) == (["stage1.0", "stage2"], ["conv1", "layer3.0"])
    with pytest.raises(UsageError, match="teacher has stage1, stage2, student conv1"):
        paired_layers(EVERY.model_copy(update={"student_layers": ("conv1",)}), teacher.net, student)
    with pytest.raises(UsageError, match="no module 'layer7' in ResNetCifar: it has conv1"):
        paired_layers(EVERY.model_copy(update={"student_layers": ("conv1", "layer7")}), teacher.net, student)


def test_a_student_that_is_the_teacher_has_nothing_to_learn(teacher, batch):
    layers, _ = paired_layers(EVERY, teacher.net, teacher.net)
    targets = teacher_targets(teacher, batch.x, EVERY, layers)
    terms = student_terms(teacher.net.requires_grad_(True), teacher.input(batch.x), batch, targets, EVERY, layers)
    teacher.net.requires_grad_(False)
    assert list(terms) == ["kd", "ce", "variants_ce", "cam", "gradcam"]
    for name in ("kd", "cam", "gradcam"):
        assert terms[name].item() == pytest.approx(0, abs=1e-5)
    assert terms["ce"].item() > terms["kd"].item()


def test_targets_carry_no_graph(teacher, batch):
    targets = teacher_targets(teacher, batch.x, EVERY, ["stage1", "stage2"])
    assert not targets.logits.requires_grad
    assert targets.cam is not None
    assert targets.cam.shape == (4, 10, 4, 4)
    assert [tuple(g.shape) for g in targets.gradcams] == [(4, 8, 8), (4, 4, 4)]
    assert not any(g.requires_grad for g in (targets.cam, *targets.gradcams))


def test_labels_alone_do_not_ask_the_teacher(teacher, batch, monkeypatch):
    monkeypatch.setattr(teacher, "logits", lambda x: pytest.fail("asked"))
    only = LossSettings(kd=0, ce=1, variants_ce=1)
    targets = teacher_targets(teacher, batch.x, only, [])
    student = nets.build("resnet8", 10, 1)
    terms = student_terms(student, teacher.input(batch.x), batch, targets, only, [])
    weighted(terms, only).backward()
    assert student.conv1.weight.grad.abs().sum() > 0
    with pytest.raises(pytest.fail.Exception, match="asked"):
        teacher_targets(teacher, batch.x, LossSettings(kd=1), [])


def test_dkd_and_dist_compare_with_the_teacher(teacher, batch):
    only = LossSettings(kd=0, tckd=1, nckd=8, dist_inter=1, dist_intra=2)
    targets = teacher_targets(teacher, batch.x, only, [])
    student = nets.build("resnet8", 10, 1)
    mixed = replace(batch, partner_labels=(batch.labels + 1) % 10, lam=torch.full((4,), 0.25))
    terms = student_terms(student.eval(), teacher.input(batch.x), mixed, targets, only, [])
    assert list(terms) == ["tckd", "nckd", "dist_inter", "dist_intra"]
    weighted(terms, only).backward()
    assert student.conv1.weight.grad.isfinite().all() and student.conv1.weight.grad.abs().sum() > 0
    logits = student(teacher.input(batch.x)).detach()
    own, other = (dkd(logits, targets.logits, t, 4.0)[1].mean() for t in (batch.labels, mixed.partner_labels))
    assert terms["nckd"].item() == pytest.approx((0.25 * own + 0.75 * other).item(), rel=1e-5)


def test_region_terms_reach_the_student_across_sizes(teacher, batch):
    student = nets.build("resnet8", 10, 1)
    teacher_layers, layers = paired_layers(EVERY, teacher.net, student)
    only = LossSettings(kd=0, cam=1, gradcam=2)
    targets = teacher_targets(teacher, batch.x, only, teacher_layers)
    terms = student_terms(student, InputSpec(teacher.input.settings)(batch.x), batch, targets, only, layers)
    assert weighted(terms, only).item() == pytest.approx(terms["cam"].item() + 2 * terms["gradcam"].item(), rel=1e-5)
    weighted(terms, only).backward()
    assert student.layer3[0].conv2.weight.grad.abs().sum() > 0
    assert student.linear.weight.grad is None  # a constant in both terms


def test_settings_that_cannot_work():
    with pytest.raises(ValueError, match="nothing to learn"):
        LossSettings(kd=0)
    with pytest.raises(ValueError, match="named twice: resnet8"):
        DistillSettings(students=("resnet8", "resnet20", "resnet8"))
    with pytest.raises(ValueError, match="needs val_fraction"):
        DistillSettings(select="best", val_fraction=0)
    with pytest.raises(ValueError, match="must not exceed 1"):
        DistillSettings.model_validate({"augment": {"cutmix": 0.6, "mixup": 0.6}})
