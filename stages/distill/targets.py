"""What one batch asks of every student: the teacher's answers, computed once and shared; and the terms they give."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from manifests.errors import UsageError
from stages.distill import losses
from stages.distill.batches import Batch
from stages.distill.settings import LossSettings
from stages.models.taps import head_of, outputs_of, stage_paths, submodule
from stages.models.teacher import Teacher


@dataclass(frozen=True)
class Targets:
    """Teacher logits ``[n, C]``, class activation maps ``[n, C, h, w]`` and one Grad-CAM ``[n, h, w]`` per layer."""

    logits: Tensor
    cam: Tensor | None
    gradcams: list[Tensor]


def paired_layers(settings: LossSettings, teacher: nn.Module, student: nn.Module) -> tuple[list[str], list[str]]:
    """Module paths whose Grad-CAMs are compared. Stages are paired from the last one back; named layers as named."""
    given_t, given_s = settings.teacher_layers, settings.student_layers
    pair = list(given_t or stage_paths(teacher)), list(given_s or stage_paths(student))
    if given_t is None and given_s is None:
        depth = min(map(len, pair))
        pair = pair[0][-depth:], pair[1][-depth:]
    if len(pair[0]) != len(pair[1]):
        raise UsageError(
            f"gradcam pairs layers one to one: teacher has {', '.join(pair[0])}, student {', '.join(pair[1])}"
        )
    for net, paths in zip((teacher, student), pair, strict=True):
        for path in paths:
            submodule(net, path)
    return pair


def teacher_targets(teacher: Teacher, x: Tensor, settings: LossSettings, layers: list[str]) -> Targets:
    """The teacher's answers to images ``[n, 3, h, w]`` in [−1, 1]; gradients only where Grad-CAM needs them.

    It is not asked where no term compares with it (labels alone): logits are then ``[n, 0]``.
    """
    if not (settings.kd or settings.cam or settings.gradcam):
        return Targets(x.new_zeros(len(x), 0), None, [])
    if not settings.cam and not settings.gradcam:
        with torch.no_grad():
            return Targets(teacher.logits(x), None, [])
    last = stage_paths(teacher.net)[-1]
    with torch.set_grad_enabled(settings.gradcam > 0):
        paths = list(dict.fromkeys([*layers, last]))
        logits, found = teacher.with_stages(x.detach().requires_grad_(settings.gradcam > 0), paths)
        maps = dict(zip(paths, found, strict=True))
        cams: list[Tensor] = []
        if settings.gradcam:
            cams = losses.gradcam(logits, logits.argmax(1), [maps[path] for path in layers])
    cam = losses.class_activation_maps(maps[last], class_weights(teacher)).detach() if settings.cam else None
    return Targets(logits.detach(), cam, [g.detach() for g in cams])


def class_weights(teacher: Teacher) -> Tensor:
    """The teacher's ``[C, D]``; raises UsageError where it has none."""
    if teacher.class_weights is None:
        raise UsageError(f"{teacher.what} ends in no linear layer on pooled features: set loss.cam to 0")
    return teacher.class_weights


def student_terms(
    net: nn.Module, x: Tensor, batch: Batch, targets: Targets, settings: LossSettings, layers: list[str]
) -> dict[str, Tensor]:
    """Every active term, unweighted. ``x``: the batch as the student's input; ``layers``: for Grad-CAM.

    Of a part of a batch: what it adds to each term of the whole one.
    """
    last = stage_paths(net)[-1] if settings.cam else ""  # not every network has feature maps
    with outputs_of(net, [*layers, *([last] if settings.cam else [])]) as maps:
        logits = net(x).float()
    terms = {}
    if settings.kd:
        terms["kd"] = batch.share * losses.kd(logits, targets.logits, settings.tau)
    if settings.ce or settings.derived:
        per_sample = losses.mixed_ce(logits, batch.labels, batch.partner_labels, batch.lam)
        if settings.ce:
            terms["ce"] = batch.share * per_sample.mean()
        if settings.derived:
            terms["derived"] = losses.derived_mean(per_sample, batch.derived, batch.derived_count)
    if settings.cam:
        assert targets.cam is not None
        weight = head_of(net).weight
        assert isinstance(weight, Tensor)
        terms["cam"] = batch.share * losses.map_mse(losses.class_activation_maps(maps[last], weight), targets.cam)
    if settings.gradcam:
        own = losses.gradcam(logits, targets.logits.argmax(1), [maps[path] for path in layers])
        pairs = zip(own, targets.gradcams[-len(own) :], strict=True)
        terms["gradcam"] = batch.share * torch.stack([losses.map_mse(s, t) for s, t in pairs]).sum()
    return terms


def weighted(terms: dict[str, Tensor], settings: LossSettings) -> Tensor:
    """Σ weight·term."""
    return torch.stack([getattr(settings, name) * value for name, value in terms.items()]).sum()
