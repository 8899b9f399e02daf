"""Counted cost of stage 2: linear in networks, and equal to what a real step counts."""

import torch

from stages.cost import Flops, distill_cost
from stages.models.loading import untrained_teacher
from stages.models.nets import build
from stages.models.source import resolve
from stages.settings import DistillSettings, ModelSettings


def test_a_step_costs_what_a_real_one_does():
    teacher = untrained_teacher(resolve(ModelSettings()))
    settings = DistillSettings(students=("resnet8", "digits-cnn-small"))
    cost = distill_cost(settings, teacher, 32)
    channels, side = teacher.input.channels, teacher.input.size
    for name, counted in cost.students.items():
        net = build(name, 10, channels).train()
        with Flops() as real:
            net(torch.rand(2, channels, side, side)).sum().backward()
        assert counted == real.total // 2
    with torch.no_grad(), Flops() as real:
        build("digits-cnn", 10, channels).eval()(torch.rand(1, channels, side, side))
    assert cost.teacher == real.total


def test_region_losses_cost_more():
    teacher = untrained_teacher(resolve(ModelSettings()))
    plain = distill_cost(DistillSettings(students=("resnet8",)), teacher, 16)
    regions = DistillSettings.model_validate({"students": ("resnet8",), "loss": {"cam": 1.0, "gradcam": 1.0}})
    cost = distill_cost(regions, teacher, 16)
    assert cost.students["resnet8"] > plain.students["resnet8"] and cost.teacher > plain.teacher
    assert cost.saved_bytes_per_batch > 0 and cost.weights_bytes == plain.weights_bytes
