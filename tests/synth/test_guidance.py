"""Loss terms and the update, against values worked out by hand."""

import math

import pytest
import torch

from stages.models.teacher import mean_and_variance, moments_gap
from stages.settings import GuidanceSettings
from stages.synth.guidance import (
    Losses,
    Population,
    class_prior,
    cropped,
    disagreement,
    energy,
    entropy,
    inconsistency,
    shifted,
    teacher_losses,
    two_views,
    union,
    update,
)
from tests.synth.tiny import TinyTeacher, feature_statistics


def test_class_prior_is_cross_entropy_per_sample():
    got = class_prior(torch.tensor([[0.0, 0.0], [math.log(3), 0.0]]), torch.tensor([0, 1]))
    assert got.tolist() == pytest.approx([math.log(2), math.log(4)])


def test_feature_statistics_hand_computed():
    x = torch.tensor([[[[1.0, 3.0]], [[0.0, 0.0]]], [[[1.0, 3.0]], [[0.0, 0.0]]]])  # [2, 2, 1, 2]
    # channel 0: mean 2, biased variance 1; channel 1: mean 0, variance 0.
    running = (torch.tensor([0.0, 1.0]), torch.tensor([4.0, 1.0]))
    shift = math.sqrt(((2 / 2) ** 2 + (-1 / 1) ** 2) / 2)
    spread = math.sqrt((((1 - 4) / 4) ** 2 + ((0 - 1) / 1) ** 2) / 2)
    assert feature_statistics([x], [running]).item() == pytest.approx(shift + spread, rel=1e-5)
    assert feature_statistics([x, x], [running, running]).item() == pytest.approx(shift + spread, rel=1e-5)


def test_feature_statistics_does_not_care_about_the_layers_scale():
    x, mean, variance = torch.randn(8, 3, 4, 4), torch.randn(3), torch.rand(3) + 0.5
    one = feature_statistics([x], [(mean, variance)])
    hundred = feature_statistics([100 * x], [(100 * mean, 100**2 * variance)])
    assert hundred.item() == pytest.approx(one.item(), rel=1e-4)


def test_disagreement_counts_only_where_teacher_and_student_agree():
    teacher = torch.tensor([[2.0, 0.0], [2.0, 0.0]])
    student = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    p = torch.tensor([2.0, 0.0]).softmax(0)
    q = torch.tensor([1.0, 0.0]).softmax(0)
    kl = (p * (p.log() - q.log())).sum().item()
    assert disagreement(teacher, student).tolist() == pytest.approx([-kl, 0.0])


def test_inconsistency_hand_computed():
    """Rows: the same answer; certain of different classes (ln 2, the most there is); (3/4, 1/4) against (1/2, 1/2)."""
    first = torch.tensor([[1.0, 2.0], [90.0, 0.0], [math.log(3), 0.0]])
    second = torch.tensor([[3.0, 4.0], [0.0, 90.0], [1.0, 1.0]])
    of_first = 0.75 * math.log(0.75 / 0.625) + 0.25 * math.log(0.25 / 0.375)  # KL to the mean (5/8, 3/8)
    of_second = 0.5 * math.log(0.5 / 0.625) + 0.5 * math.log(0.5 / 0.375)
    last = (of_first + of_second) / 2
    assert inconsistency(first, second).tolist() == pytest.approx([0.0, math.log(2), last], abs=1e-6)
    torch.testing.assert_close(inconsistency(second, first), inconsistency(first, second))


def test_energy_and_entropy_hand_computed():
    logits = torch.tensor([[math.log(3), 0.0], [5.0, 5.0], [90.0, 0.0]])
    assert energy(logits).tolist() == pytest.approx([-math.log(4), -5 - math.log(2), -90], rel=1e-6)
    first = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert entropy(logits).tolist() == pytest.approx([first, math.log(2), 0.0], abs=1e-6)


def test_energy_and_entropy_weigh_in_where_they_are_on():
    teacher, labels, images = TinyTeacher(), torch.tensor([0, 1, 1]), torch.randn(3, 3, 8, 8)
    off = teacher_losses(images, labels, teacher, None, True)
    assert off.energy is None and off.entropy is None
    for names in (["energy"], ["entropy"], ["energy", "entropy"]):
        settings = GuidanceSettings(**dict.fromkeys(names, 0.5))
        on = teacher_losses(images, labels, teacher, None, True, None, settings)
        terms = {"energy": energy(teacher.logits(images)), "entropy": entropy(teacher.logits(images))}
        assert [name for name in terms if getattr(on, name) is not None] == names
        expected = off.total(GuidanceSettings()) + sum(0.5 * terms[name].sum() for name in names)
        torch.testing.assert_close(on.total(settings), expected)
        assert on.detached().total(settings).requires_grad is False
    GuidanceSettings(entropy=-1.0)  # asks for unsure answers
    with pytest.raises(ValueError, match="energy"):
        GuidanceSettings(energy=-1.0)


def test_a_union_has_the_moments_of_both_data():
    """One part in four of the second: (0, 2) three times and (8, 10, 8, 10, …): mean 3, variance 13."""
    new, old = torch.tensor([[0.0, 2.0] * 3]).T, torch.tensor([[8.0, 10.0]]).T
    mean, variance = union(mean_and_variance(new), mean_and_variance(old), 0.25)
    assert (mean.item(), variance.item()) == pytest.approx((3.0, 13.0))
    whole = mean_and_variance(torch.cat([new, old]))
    assert (mean.item(), variance.item()) == pytest.approx(tuple(x.item() for x in whole))


def test_a_population_remembers_groups_once_they_are_made():
    def group(mean, variance):
        return [(torch.tensor([mean]), torch.tensor([variance]))]

    population = Population(0.5)
    assert population.joined(3, group(0.0, 1.0)) == group(0.0, 1.0)  # the first group of a shard is alone
    assert population.joined(3, group(2.0, 1.0)) == group(2.0, 1.0)  # made again, for lack of memory
    population.advance()
    assert population.joined(3, group(4.0, 3.0)) == group(3.0, 2.0 + 1.0)  # means 2 and 4: variance 1 between them
    assert population.joined(4, group(4.0, 3.0)) == group(4.0, 3.0)  # other steps see other images
    population.advance()
    assert population.joined(3, group(3.0, 3.0)) == group(3.0, 3.0)
    population.joined(3, group(math.inf, 1.0))
    population.advance()
    assert population.joined(3, group(3.0, 3.0)) == group(3.0, 3.0)  # what overflowed is not remembered
    population.restart()
    assert population.joined(3, group(7.0, 1.0)) == group(7.0, 1.0)


def test_the_statistics_term_is_that_of_the_joined_moments():
    teacher, labels, images = TinyTeacher(), torch.tensor([0, 1]), torch.randn(2, 3, 8, 8, requires_grad=True)
    ((mean, variance),) = moments = teacher.with_moments(images)[1]
    population = Population(0.9)
    population.earlier[0] = [(m.detach() + 1, v.detach() * 2) for m, v in moments]
    losses = teacher_losses(images, labels, teacher, None, True, joined=lambda group: population.joined(0, group))
    joint = 0.1 * variance + 0.9 * 2 * variance.detach() + 0.09 * (mean - mean.detach() - 1).square()
    expected = moments_gap([(0.1 * mean + 0.9 * (mean.detach() + 1), joint)], teacher.batchnorms)
    torch.testing.assert_close(losses.bn, expected)
    (got,) = torch.autograd.grad(losses.bn, images, retain_graph=True)
    torch.testing.assert_close(got, torch.autograd.grad(expected, images)[0])


def test_two_views_share_the_class_prior_and_weigh_in_with_their_disagreement():
    teacher, labels = TinyTeacher(), torch.tensor([0, 1, 1])
    images, other = torch.randn(2, 3, 3, 8, 8)
    losses = teacher_losses(images, labels, teacher, None, True, other)
    both = [class_prior(teacher.logits(view), labels) for view in (images, other)]
    torch.testing.assert_close(losses.ce, (both[0] + both[1]) / 2)
    apart = inconsistency(teacher.logits(images), teacher.logits(other))
    torch.testing.assert_close(losses.inconsistency, apart)
    alone = Losses(losses.ce, losses.adversarial, losses.bn)
    for given, weight in ((None, 1.0), (0.5, 0.5), (0.0, 0.0)):
        settings = GuidanceSettings(consistency=given)
        expected = alone.total(settings) + weight * apart.sum()
        torch.testing.assert_close(losses.total(settings), expected)
    assert losses.detached().inconsistency.requires_grad is False
    assert teacher_losses(images, labels, teacher, None, True).inconsistency is None


def test_a_second_view_is_asked_for_only_without_batchnorm_unless_set():
    with_norms, without = TinyTeacher(), TinyTeacher()
    without.has_batchnorm = False
    seen = [two_views(GuidanceSettings(consistency=w), t) for w in (None, 0.0, 2.0) for t in (with_norms, without)]
    assert seen == [False, True, False, False, True, True]


def test_a_crop_is_a_square_of_the_image_enlarged():
    image = torch.arange(16.0).repeat(16, 1)[None, None]  # every column has its own value
    widths, lefts = set(), set()
    for seed in range(60):
        out = cropped(image, torch.Generator().manual_seed(seed))
        assert out.shape == image.shape and torch.equal(out[0, 0, 0], out[0, 0, 7])
        left, right = out[0, 0, 0, 0].item(), out[0, 0, 0, -1].item()
        widths.add(right - left + 1)
        lefts.add(left)
        assert left >= 0 and right <= 15
    assert widths == {12.0, 13.0, 14.0, 15.0} and lefts == {0.0, 1.0, 2.0, 3.0, 4.0}


def test_a_samples_gradient_does_not_shrink_with_the_group():
    def gradient(n):
        ce = torch.ones(n, requires_grad=True)
        Losses(ce, torch.zeros(n), torch.zeros(())).total(GuidanceSettings()).backward()
        return ce.grad[0].item()

    assert gradient(2) == gradient(50)


def test_update_is_a_share_of_unit_variance_and_shrinks_with_the_noise():
    gradient = torch.randn(3, 4, 8, 8) * torch.tensor([1e-6, 1.0, 1e6]).view(3, 1, 1, 1)
    settings = GuidanceSettings(step_size=0.1)
    early = update(gradient, alpha=0.1, sigma=0.99, settings=settings)
    late = update(gradient, alpha=0.99, sigma=0.099, settings=settings)
    rms = lambda x: x.flatten(1).square().mean(1).sqrt().tolist()  # noqa: E731
    assert rms(early) == pytest.approx([0.1] * 3, rel=1e-3)
    assert rms(late) == pytest.approx([0.01] * 3, rel=1e-3)
    assert (early * gradient).flatten(1).sum(1).max() < 0  # downhill
    raw = update(gradient, 0.99, 0.099, GuidanceSettings(step_size=0.1, normalize="none"))
    assert torch.equal(raw, -0.1 * gradient)


def test_guided_steps_follow_interval_and_stride():
    def steps(**kw):
        return [i for i in range(10) if GuidanceSettings(**kw).at(i, 10)]

    assert steps() == list(range(10))
    assert steps(interval=(0.5, 1.0)) == [5, 6, 7, 8, 9]
    assert steps(interval=(0.25, 1.0), every=3) == [3, 6, 9]
    assert steps(step_size=0) == []


def test_the_first_step_of_an_interval_is_guided_whatever_its_start_rounds_to():
    starts = [step / 25 for step in range(25)]
    assert [GuidanceSettings(interval=(start, 1.0), every=4).first(25) for start in starts] == [*range(25)]
    assert all(GuidanceSettings(interval=(step / 25, 1.0), every=4).at(step, 25) for step in range(25))


def test_shift_moves_by_at_most_its_limit_and_repeats_edges():
    image = torch.arange(64.0).view(1, 1, 8, 8)
    seen = set()
    for seed in range(40):
        out = shifted(image, 0.125, torch.Generator().manual_seed(seed))
        dy, dx = divmod(int(out[0, 0, 4, 4].item()), 8)
        seen.add((dy - 4, dx - 4))
        assert out.shape == image.shape
    assert seen == {(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)}
    assert shifted(image, 0.0, torch.Generator()) is image
