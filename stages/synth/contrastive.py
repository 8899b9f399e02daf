"""The contrastive term of inversion (CMI; DDA equation 4): embeddings of the teacher, a head, InfoNCE."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manifests.errors import UsageError
from stages.micro_batches import in_micro_batches, moment_sums, moments
from stages.models.teacher import Teacher

WIDTH = 256  # of the head


def embedding(teacher: Teacher, images: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]], Tensor]:
    """Logits ``[n, C]``, BatchNorm moments of the batch (none without such layers; ``[c]`` each) and an embedding
    ``[n, D]`` from one pass.

    The embedding: each image's mean of every BatchNorm input, in units of its running statistics, so that all layers
    count alike; penultimate features where the teacher has no BatchNorm.
    """
    if not teacher.has_batchnorm:
        logits, features = teacher.with_features(images)
        if features is None:
            raise UsageError(f"{teacher.what} has neither BatchNorm nor features to contrast: set cmi.cr=0")
        return logits, [], features

    def look(x: Tensor) -> tuple[Tensor, ...]:
        logits, inputs = teacher.with_batchnorm_inputs(x)
        found = list(zip(inputs, teacher.batchnorms, strict=True))
        means = [
            (y.unsqueeze(-1).flatten(2).mean(2) - mean) / variance.clamp_min(1e-5).sqrt()
            for y, (mean, variance) in found
        ]
        return logits, torch.cat(means, 1), *(moment_sums(y, mean) for y, (mean, _) in found)

    logits, means, *sums = in_micro_batches(look, teacher.batch_limit, images)
    batch = [moments(total, mean, len(images)) for total, (mean, _) in zip(sums, teacher.batchnorms, strict=True)]
    return logits, batch, means


class Head(nn.Module):
    """``[n, D]`` to unit vectors ``[n, WIDTH]``: two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, WIDTH), nn.ReLU(inplace=True), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.layers(x), dim=1)


def info_nce(query: Tensor, key: Tensor, bank: Tensor, temperature: float) -> Tensor:
    """Mean over i of −log( exp(q_i·k_i/τ) / Σ_j exp(q_i·n_j/τ) ), where n runs over all keys and the bank; a scalar.

    ``query`` and ``key`` ``[n, d]``, ``bank [m, d]``, all of unit length. The positive is among the n_j (van den Oord
    et al. 2018); equation 4 as printed leaves it out, and is then unbounded below.
    """
    scores = query @ torch.cat([key, bank]).T / temperature
    return F.cross_entropy(scores, torch.arange(len(query), device=query.device))
