"""BatchNorm statistics of a dataset: by hand, and as guidance has them."""

import pytest
import torch

from stages.models.teacher import Moments, moments_gap, published_bn_unit
from tests.synth.tiny import feature_statistics


def test_gap_by_hand():
    moments = Moments()
    moments.add([torch.tensor([[[1.0, 3.0]]])])
    moments.add([torch.tensor([[[5.0, 7.0]]])])  # mean 4, variance 5
    assert moments.gap([(torch.tensor([2.0]), torch.tensor([4.0]))]) == pytest.approx(2 / 2 + 1 / 4)
    assert moments.gap([(torch.tensor([4.0]), torch.tensor([5.0]))]) == pytest.approx(0)
    assert Moments().gap([]) is None


def test_gap_of_batches_is_that_of_guidance_for_all_at_once():
    torch.manual_seed(0)
    inputs = [torch.randn(6, 3, 4, 4), torch.randn(6, 5)]
    running = [(torch.randn(3), torch.rand(3) + 0.5), (torch.randn(5), torch.rand(5) + 0.5)]
    moments = Moments()
    for part in (slice(0, 1), slice(1, 6)):
        moments.add([x[part] for x in inputs])
    assert moments.gap(running) == pytest.approx(float(feature_statistics(inputs, running)), rel=1e-5)


def test_the_papers_unit_by_hand():
    """Variances 9 and 16, then 4: Σ‖s‖₂ = √25 + √4 = 7, Σ‖s²‖₂ = √(81 + 256) + 4."""
    running = [(torch.zeros(2), torch.tensor([9.0, 16.0])), (torch.zeros(1), torch.tensor([4.0]))]
    means, variances = published_bn_unit(running)
    assert means == pytest.approx(7) and variances == pytest.approx(337**0.5 + 4)


def test_the_papers_unit_converts_their_loss():
    """Statistics that are off by the same share everywhere: the papers' loss is ours times the unit."""
    torch.manual_seed(0)
    running = [(torch.randn(c), torch.rand(c) + 0.1) for c in (3, 8, 5)]
    unit = published_bn_unit(running)

    def published(data):
        return sum((m - n).norm() + (v - w).norm() for (m, v), (n, w) in zip(data, running, strict=True)).item()

    for share, factor in (((0.3, 0.0), unit[0]), ((0.0, 0.2), unit[1])):
        data = [(m + share[0] * v.sqrt(), v * (1 + share[1])) for m, v in running]
        assert published(data) == pytest.approx(factor * moments_gap(data, running).item(), rel=1e-4)
