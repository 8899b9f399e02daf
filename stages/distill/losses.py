"""The loss terms of distillation, and what one batch asks of every student: the teacher's outputs, computed once."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manifests.errors import UsageError
from stages.distill.batches import Batch
from stages.distill.runtime import full_precision
from stages.models.hooks import head_of, outputs_of, stage_paths, submodule
from stages.models.teacher import Teacher
from stages.settings import LossSettings


def kd(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """τ²·KL(softmax(teacher/τ) ‖ softmax(student/τ)), mean over the batch (Hinton et al. 2015). Logits ``[n, C]``."""
    log_s, log_t = (student / tau).log_softmax(1), (teacher / tau).log_softmax(1)
    return tau**2 * F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)


def dkd(student: Tensor, teacher: Tensor, target: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """TCKD and NCKD per sample ``[n]`` of logits ``[n, C]``, the two parts of KD (Zhao et al. 2022, equation 7:
    DKD = α·TCKD + β·NCKD), at temperature τ and times τ² as :func:`kd`.

    TCKD is the divergence of (p_t, 1 − p_t), where t is the class ``target [n]``, NCKD that of the other classes'
    probabilities once they sum to 1. KD = TCKD + (1 − teacher's p_t)·NCKD (equation 6).
    """
    others = torch.arange(student.shape[1] - 1, device=student.device)
    others = others + (others >= target[:, None])  # [n, C − 1]: every class but the target

    def parts(logits: Tensor) -> tuple[Tensor, Tensor]:
        logs = (logits / tau).log_softmax(1)
        rest = logs.gather(1, others)
        return torch.cat([logs.gather(1, target[:, None]), rest.logsumexp(1, keepdim=True)], 1), rest.log_softmax(1)

    pairs = zip(parts(student), parts(teacher), strict=True)
    tckd, nckd = (tau**2 * F.kl_div(s, t, reduction="none", log_target=True).sum(1) for s, t in pairs)
    return tckd, nckd


def dist(student: Tensor, teacher: Tensor, tau: float, dim: int) -> Tensor:
    """τ²·(1 − Pearson's correlation of softmax(student/τ) and softmax(teacher/τ)), mean (DIST, Huang et al. 2022).

    Logits ``[n, C]``. ``dim`` 1: inter-class, over the classes of a sample; 0: intra-class, over the batch for each
    class. What does not vary has no correlation and costs τ².
    """
    s, t = ((each / tau).softmax(1) for each in (student, teacher))
    s, t = (each - each.mean(dim, keepdim=True) for each in (s, t))
    return tau**2 * (1 - F.cosine_similarity(s, t, dim=dim)).mean()


def mixed_ce(student: Tensor, labels: Tensor, partners: Tensor, lam: Tensor) -> Tensor:
    """λ·CE(label) + (1 − λ)·CE(partner's label) per sample ``[n]``; λ = 1 where a view mixes nothing."""
    own = F.cross_entropy(student, labels, reduction="none")
    other = F.cross_entropy(student, partners, reduction="none")
    return lam * own + (1 - lam) * other


def derived_mean(per_sample: Tensor, derived: Tensor, count: int) -> Tensor:
    """Mean over the ``count`` samples of a batch made from another image (DDA, equation 7); 0 where it holds none."""
    return (per_sample * derived).sum() / max(count, 1)


def class_activation_maps(features: Tensor, weights: Tensor) -> Tensor:
    """CAM_c = Σ_k W_ck·A_k for every class (Zhou et al. 2016): ``[n, K, h, w]``, ``[C, K]`` to ``[n, C, h, w]``.

    No bias; the classifier is a constant, so that the term moves features only.
    """
    if features.shape[1] != weights.shape[1]:
        raise UsageError(
            f"the last feature map has {features.shape[1]} channels, the last linear layer takes {weights.shape[1]}: "
            "class activation maps need a head right after pooling; set loss.cam to 0"
        )
    with full_precision(features.device):  # autocast would round what einsum is given
        return torch.einsum("nkhw,ck->nchw", features.float(), weights.detach().float())


def gradcam(logits: Tensor, classes: Tensor, features: list[Tensor]) -> list[Tensor]:
    """Grad-CAM of one class per sample, without ReLU: Σ_k α_k·A_k with α_k = spatial mean of ∂y_c/∂A_k (mSARC).

    ``features``: ``[n, K, h, w]`` each, part of the graph of ``logits``; result ``[n, h, w]`` each. α is a constant:
    the gradient is taken with respect to activations only.
    """
    score = logits.gather(1, classes[:, None]).sum()
    gradients = torch.autograd.grad(score, features, retain_graph=True)
    return [
        (g.mean((2, 3), keepdim=True).detach().float() * a.float()).sum(1)
        for g, a in zip(gradients, features, strict=True)
    ]


def map_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of maps ``[..., h, w]``; where sizes differ, both are averaged to the smaller."""
    size = (min(student.shape[-2], teacher.shape[-2]), min(student.shape[-1], teacher.shape[-1]))
    return F.mse_loss(_pooled(student, size), _pooled(teacher, size))


def _pooled(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return maps if maps.shape[-2:] == size else F.adaptive_avg_pool2d(maps, size)


class AlignHead(nn.Module):
    """A student's last map ``[n, takes, h, w]`` in the teacher's channels ``[n, gives, h, w]``: 1×1, 3×3 and 1×1
    convolutions, the first two twice as wide as the teacher's map and with BatchNorm and ReLU (as CSD's public code,
    which is DDA's). It learns with the student and is no part of it."""

    def __init__(self, takes: int, gives: int) -> None:
        super().__init__()
        self.takes, self.gives, wide = takes, gives, 2 * gives

        def block(channels: int, size: int) -> list[nn.Module]:
            convolution = nn.Conv2d(channels, wide, size, padding=size // 2, bias=False)
            return [convolution, nn.BatchNorm2d(wide), nn.ReLU(inplace=True)]

        self.layers = nn.Sequential(*block(takes, 1), *block(wide, 3), nn.Conv2d(wide, gives, 1, bias=False))

    def forward(self, maps: Tensor) -> Tensor:
        out: Tensor = self.layers(maps)
        return out


def align_head(teacher: Teacher, student: nn.Module) -> AlignHead:
    """The head between the last maps of ``student`` and ``teacher``, which their last linear layers pool."""
    if teacher.class_weights is None:
        raise UsageError(f"{teacher.what} ends in no linear layer on pooled features: set loss.feature to 0")
    weight = head_of(student).weight
    assert isinstance(weight, Tensor)
    return AlignHead(weight.shape[1], teacher.class_weights.shape[1])


def feature_mse(student: Tensor, teacher: Tensor, align: AlignHead) -> Tensor:
    """Mean squared difference of the teacher's last map and the student's through ``align``; where sizes differ, both
    are averaged to the smaller before."""
    for maps, channels in ((student, align.takes), (teacher, align.gives)):
        if maps.shape[1] != channels:
            raise UsageError(
                f"the last feature map has {maps.shape[1]} channels, the last linear layer takes {channels}: "
                "set loss.feature to 0"
            )
    size = (min(student.shape[-2], teacher.shape[-2]), min(student.shape[-1], teacher.shape[-1]))
    return F.mse_loss(align(_pooled(student, size)).float(), _pooled(teacher, size))


@dataclass(frozen=True)
class Targets:
    """Teacher logits ``[n, C]``, class activation maps ``[n, C, h, w]``, one Grad-CAM ``[n, h, w]`` per layer, and the
    last map ``[n, K, h, w]``."""

    logits: Tensor
    cam: Tensor | None
    gradcams: list[Tensor]
    feature: Tensor | None = None


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
    looks_inside = settings.cam or settings.gradcam or settings.feature
    if not (settings.compares_logits or looks_inside):
        return Targets(x.new_zeros(len(x), 0), None, [])
    if not looks_inside:
        with torch.no_grad():
            return Targets(teacher.logits(x), None, [])
    last = stage_paths(teacher.net)[-1]
    with torch.set_grad_enabled(settings.gradcam > 0):
        paths = list(dict.fromkeys([*layers, last]))
        logits, outputs = teacher.with_stages(x.detach().requires_grad_(settings.gradcam > 0), paths)
        maps = dict(zip(paths, outputs, strict=True))
        cams: list[Tensor] = []
        if settings.gradcam:
            cams = gradcam(logits, logits.argmax(1), [maps[path] for path in layers])
    cam = None
    if settings.cam:
        if teacher.class_weights is None:
            raise UsageError(f"{teacher.what} ends in no linear layer on pooled features: set loss.cam to 0")
        cam = class_activation_maps(maps[last], teacher.class_weights).detach()
    feature = maps[last].detach().float() if settings.feature else None
    return Targets(logits.detach(), cam, [g.detach() for g in cams], feature)


def student_terms(
    net: nn.Module,
    x: Tensor,
    batch: Batch,
    targets: Targets,
    settings: LossSettings,
    layers: list[str],
    align: AlignHead | None = None,
) -> dict[str, Tensor]:
    """Every active term, unweighted. ``x``: the batch as the student's input; ``layers``: for Grad-CAM; ``align``: for
    ``loss.feature``.

    Of a part of a batch: what it adds to each term of the whole one (``dist_intra``: the mean of the parts').
    """
    last = stage_paths(net)[-1] if settings.cam or settings.feature else ""  # not every network has feature maps
    with outputs_of(net, [*layers, *([last] if last else [])]) as maps:
        logits = net(x).float()
    terms = {}
    if settings.kd:
        terms["kd"] = batch.share * kd(logits, targets.logits, settings.temperature)
    if settings.tckd or settings.nckd:  # a mixed image has two targets, as in mixed_ce
        both = (batch.labels, batch.partner_labels)
        own, other = (dkd(logits, targets.logits, labels, settings.temperature) for labels in both)
        for name, a, b in zip(("tckd", "nckd"), own, other, strict=True):
            if getattr(settings, name):
                terms[name] = batch.share * (batch.lam * a + (1 - batch.lam) * b).mean()
    for name, dim in (("dist_inter", 1), ("dist_intra", 0)):
        if getattr(settings, name):
            terms[name] = batch.share * dist(logits, targets.logits, settings.temperature, dim)
    if settings.ce or settings.variants_ce:
        per_sample = mixed_ce(logits, batch.labels, batch.partner_labels, batch.lam)
        if settings.ce:
            terms["ce"] = batch.share * per_sample.mean()
        if settings.variants_ce:
            terms["variants_ce"] = derived_mean(per_sample, batch.derived, batch.derived_count)
    if settings.cam:
        assert targets.cam is not None
        weight = head_of(net).weight
        assert isinstance(weight, Tensor)
        terms["cam"] = batch.share * map_mse(class_activation_maps(maps[last], weight), targets.cam)
    if settings.gradcam:
        maps_s = gradcam(logits, targets.logits.argmax(1), [maps[path] for path in layers])
        pairs = zip(maps_s, targets.gradcams[-len(maps_s) :], strict=True)
        terms["gradcam"] = batch.share * torch.stack([map_mse(s, t) for s, t in pairs]).sum()
    if settings.feature:
        assert targets.feature is not None and align is not None
        terms["feature"] = batch.share * feature_mse(maps[last], targets.feature, align)
    return terms


def weighted(terms: dict[str, Tensor], settings: LossSettings) -> Tensor:
    """Σ weight·term."""
    return torch.stack([getattr(settings, name) * value for name, value in terms.items()]).sum()
