"""The loss terms of distillation: pure functions of logits and feature maps, each a scalar."""

import torch
import torch.nn.functional as F
from torch import Tensor

from manifests.errors import UsageError
from stages.distill.precision import full_precision


def kd(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """τ²·KL(softmax(teacher/τ) ‖ softmax(student/τ)), mean over the batch (Hinton et al. 2015). Logits ``[n, C]``."""
    log_s, log_t = (student / tau).log_softmax(1), (teacher / tau).log_softmax(1)
    return tau**2 * F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)


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
