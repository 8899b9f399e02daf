"""What distillation costs: FLOPs and memory, counted by one step on meta tensors. Used by ``run distill --dry-run``."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from stages.counting import META, flops, saved_bytes, weight_bytes
from stages.distill.batches import Batch
from stages.distill.run import student_config
from stages.distill.settings import DistillSettings, LossSettings
from stages.distill.targets import paired_layers, student_terms, teacher_targets, weighted
from stages.models import registry
from stages.models.inputs import InputSpec
from stages.models.teacher import Teacher

TWO = 2  # images in the step that is counted: BatchNorm in training needs more than one


@dataclass(frozen=True)
class DistillCost:
    """FLOPs of one view of one image: the teacher's answer, and each student's step. Bytes of all weights (the averaged
    ones, gradients and the optimiser's memory not counted), and of what one image saves for the backward pass of the
    hungriest student, since they learn one after another."""

    teacher: int
    students: dict[str, int]
    weights: int
    saved: int


def distill_cost(settings: DistillSettings, teacher: Teacher, image_size: int) -> DistillCost:
    """The cost of ``settings`` with the blank ``teacher`` on images of ``image_size`` pixels."""
    loss, x = settings.loss, torch.empty(TWO, 3, image_size, image_size, device=META)
    whole, share = torch.zeros(TWO, dtype=torch.long, device=META), torch.ones(TWO, device=META)
    batch = Batch(x, whole, whole, share, share, np.zeros(TWO, np.int64), np.zeros(TWO, np.int64), TWO, TWO)
    costs, nets, answer, saved = {}, [], 0, 0
    for name in settings.students:
        config = student_config(name, settings, teacher)
        with torch.device("meta"):
            net = registry.build_net(config, named=True)
        layers = paired_layers(loss, teacher.net, net) if loss.gradcam else ([], [])
        look = partial(teacher_targets, teacher, x, loss, layers[0])
        targets, answer = look(), flops(look)
        inputs = InputSpec(config.input)(x)
        terms = partial(student_terms, net.train(), inputs, batch, targets, loss, layers[1])
        costs[name] = flops(partial(_learn, terms, loss)) // TWO
        saved = max(saved, saved_bytes(terms, [net, teacher.net]) // TWO)
        nets.append(net)
    return DistillCost(answer // TWO, costs, weight_bytes(teacher.net, *nets), saved)


def _learn(terms: Callable[[], dict[str, Tensor]], settings: LossSettings) -> None:
    weighted(terms(), settings).backward()
