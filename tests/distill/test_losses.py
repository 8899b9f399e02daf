"""Loss terms against values worked out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from manifests.errors import UsageError
from stages.distill import losses
from stages.distill.runtime import autocast

LOG3 = math.log(3)


def test_kd_by_hand():
    # teacher (3/4, 1/4), student (1/2, 1/2): KL = 3/4 ln(3/2) + 1/4 ln(1/2)
    teacher, student = torch.tensor([[LOG3, 0.0]]), torch.zeros(1, 2)
    assert losses.kd(student, teacher, 1.0).item() == pytest.approx(
        0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-5
    )


def test_kd_is_a_mean_over_samples_not_classes():
    # the same two samples twice: equal; a temperature of 2 with doubled logits: four times
    teacher, student = torch.tensor([[LOG3, 0.0]]), torch.zeros(1, 2)
    one = losses.kd(student, teacher, 1.0)
    assert torch.allclose(losses.kd(student.repeat(5, 1), teacher.repeat(5, 1), 1.0), one)
    assert torch.allclose(losses.kd(2 * student, 2 * teacher, 2.0), 4 * one)


@given(st.lists(st.floats(-5, 5), min_size=3, max_size=3), st.floats(0.5, 20))
def test_kd_is_never_negative_and_zero_for_equals(logits, tau):
    teacher = torch.tensor([logits, [0.0, 1.0, 2.0]])
    assert losses.kd(teacher, teacher, tau).item() == pytest.approx(0, abs=1e-4)
    assert losses.kd(teacher.flip(1), teacher, tau).item() >= -1e-4


TEACHER = torch.tensor([[1 / 2, 1 / 4, 1 / 4], [1 / 8, 3 / 8, 1 / 2]])
STUDENT = torch.tensor([[1 / 4, 1 / 4, 1 / 2], [1 / 6, 1 / 2, 1 / 3]])  # probabilities of two images


def divergence(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def test_dkd_by_hand():
    target = torch.tensor([0, 1])
    tckd, nckd = losses.dkd(STUDENT.log(), TEACHER.log(), target, 1.0)
    assert tckd.tolist() == pytest.approx(
        [divergence((1 / 2, 1 / 2), (1 / 4, 3 / 4)), divergence((3 / 8, 5 / 8), (1 / 2, 1 / 2))], rel=1e-5
    )
    assert nckd.tolist() == pytest.approx(
        [divergence((1 / 2, 1 / 2), (1 / 3, 2 / 3)), divergence((1 / 5, 4 / 5), (1 / 3, 2 / 3))], rel=1e-5
    )
    hot = losses.dkd(5 * STUDENT.log(), 5 * TEACHER.log(), target, 5.0)
    assert torch.allclose(torch.stack(hot), 25 * torch.stack([tckd, nckd]), rtol=1e-4)


@given(st.lists(st.floats(-9, 9), min_size=8, max_size=8), st.integers(0, 3), st.floats(0.5, 9))
def test_kd_is_both_parts_of_dkd(numbers, target, tau):
    student, teacher = torch.tensor(numbers, dtype=torch.float64).view(2, 1, 4)
    (tckd,), (nckd,) = losses.dkd(student, teacher, torch.tensor([target]), tau)
    others = 1 - (teacher / tau).softmax(1)[0, target]
    assert losses.kd(student, teacher, tau).item() == pytest.approx((tckd + others * nckd).item(), abs=1e-9)


def test_dist_by_hand():
    """Centered rows: (2, −1, −1)/12 and (−1, −1, 2)/12; (−5, 1, 4)/24 and (−1, 1, 0)/6. Of two images a class's numbers
    move together (classes 0 and 1) or against each other (class 2)."""
    second = 6 / math.sqrt(42 * 2)
    inter, intra = (losses.dist(STUDENT.log(), TEACHER.log(), 1.0, dim).item() for dim in (1, 0))
    assert inter == pytest.approx((1.5 + 1 - second) / 2, rel=1e-5)
    assert intra == pytest.approx((0 + 0 + 2) / 3, rel=1e-5)
    assert losses.dist(3 * STUDENT.log(), 3 * TEACHER.log(), 3.0, 1).item() == pytest.approx(9 * inter, rel=1e-5)


def test_dist_of_what_does_not_vary():
    flat = torch.zeros(2, 3, requires_grad=True)
    found = losses.dist(flat, TEACHER.log(), 1.0, 1)
    found.backward()
    assert found.item() == 1
    assert flat.grad.isfinite().all()


def test_mixed_ce_by_hand():
    logits = torch.tensor([[LOG3, 0.0], [LOG3, 0.0]])
    found = losses.mixed_ce(logits, torch.tensor([0, 0]), torch.tensor([1, 1]), torch.tensor([1.0, 0.25]))
    own, other = -math.log(0.75), -math.log(0.25)
    assert found.tolist() == pytest.approx([own, 0.25 * own + 0.75 * other])


def test_derived_mean_counts_derived_samples_only():
    per_sample = torch.tensor([1.0, 2.0, 6.0])
    assert losses.derived_mean(per_sample, torch.tensor([0.0, 1.0, 1.0]), 2).item() == 4
    assert losses.derived_mean(per_sample, torch.zeros(3), 0).item() == 0


def test_feature_mse_by_hand():
    """Doubled by the head, then averaged to the teacher's one pixel: ((2·2.5 − 1)² + (2·0 − 3)²) / 2."""

    class Doubled(losses.AlignHead):
        def forward(self, maps):
            return 2 * maps

    student = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[0.0, 0.0], [0.0, 0.0]]]])
    teacher = torch.tensor([[[[1.0]], [[3.0]]]])
    assert losses.feature_mse(student, teacher, Doubled(2, 2)).item() == pytest.approx((4**2 + 3**2) / 2)
    with pytest.raises(UsageError, match="2 channels, the last linear layer takes 5: set loss.feature to 0"):
        losses.feature_mse(student, teacher, Doubled(5, 2))


def test_the_align_head_has_the_published_layers():
    align = losses.AlignHead(3, 4)
    shapes = [tuple(module.weight.shape) for module in align.layers if isinstance(module, torch.nn.Conv2d)]
    assert shapes == [(8, 3, 1, 1), (8, 8, 3, 3), (4, 8, 1, 1)]
    assert align(torch.zeros(2, 3, 5, 5)).shape == (2, 4, 5, 5)


def test_class_activation_map_by_hand():
    features = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]])  # two channels of 1×2
    weights = torch.tensor([[1.0, 0.0], [1.0, -1.0]], requires_grad=True)
    cam = losses.class_activation_maps(features, weights)
    assert cam.tolist() == [[[[1.0, 2.0]], [[-2.0, -2.0]]]]
    assert not cam.requires_grad  # the classifier is a constant


def test_class_activation_maps_stay_fp32_under_autocast():
    features, weights = torch.rand(2, 5, 3, 3), torch.randn(4, 5)
    with autocast("bf16", features.device):
        found = losses.class_activation_maps(features, weights)
    assert torch.equal(found, losses.class_activation_maps(features, weights))


def test_mean_of_the_map_is_the_logit_without_bias():
    features, weights = torch.rand(2, 5, 3, 3), torch.randn(4, 5)
    assert torch.allclose(
        losses.class_activation_maps(features, weights).mean((2, 3)), features.mean((2, 3)) @ weights.T
    )


def test_gradcam_by_hand():
    # y_c = Σ_k w_ck mean(A_k): the gradient at every place is w_ck / 4, so α_k = w_ck / 4
    features = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[1.0, 1.0], [0.0, 0.0]]]], requires_grad=True)
    weights = torch.tensor([[0.0, 1.0], [4.0, -8.0]])
    logits = features.mean((2, 3)) @ weights.T
    (found,) = losses.gradcam(logits, torch.tensor([1]), [features])
    assert found.tolist() == [[[1.0 - 2.0, 2.0 - 2.0], [3.0, 4.0]]]  # not rectified
    found.sum().backward()
    assert features.grad[0, :, 0, 0].tolist() == [1.0, -2.0]  # α itself takes no part


def test_gradcam_follows_each_samples_own_class():
    features = torch.ones(2, 1, 1, 1, requires_grad=True)
    logits = features.flatten(1) * torch.tensor([[2.0, 5.0]])
    (found,) = losses.gradcam(logits, torch.tensor([0, 1]), [features])
    assert found.flatten().tolist() == [2.0, 5.0]


def test_map_mse_averages_to_the_smaller_size():
    large = torch.tensor([[[1.0, 3.0], [5.0, 7.0]]])
    assert losses.map_mse(large, torch.tensor([[[2.0]]])).item() == 4.0  # mean 4 against 2
    assert torch.allclose(losses.map_mse(large, large + 1), F.mse_loss(large, large + 1))


def test_class_activation_maps_need_a_head_right_after_pooling():
    with pytest.raises(UsageError, match="has 3 channels, the last linear layer takes 4"):
        losses.class_activation_maps(torch.zeros(1, 3, 2, 2), torch.zeros(5, 4))
