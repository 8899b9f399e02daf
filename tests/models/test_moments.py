"""BatchNorm statistics of a dataset: by hand, and as guidance has them."""

import pytest
import torch

from stages.models.teacher import Moments
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
