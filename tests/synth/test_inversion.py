"""Inverting the teacher: terms by hand, falling losses, reproducible groups that never see each other."""

import math

import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from manifests.errors import DataError, UsageError
from manifests.shard import done_records
from manifests.storage import Storage
from stages.models import nets
from stages.models.teacher import Teacher
from stages.settings import InputSettings, SynthSettings
from stages.synth import cmi, inversion
from stages.synth.cmi import Generator, draw_crops, draw_shifts, embedding, info_nce, views
from stages.synth.group import make_group
from stages.synth.guidance import Losses, moments_gap
from stages.synth.inputs import inspect_inputs
from stages.synth.inversion import Best
from stages.synth.sampler import Counters, Models
from stages.synth.worker import METHODS, ShardWorker, load_models


def settings(method, **kw):
    given = {
        "method": method,
        "cmi": {"steps": 6, "width": 8, "latent": 16},
        "deepinversion": {"steps": 6, "jitter": 0.125},
        "groups_per_shard": 2,
        "group_size": 12,
        "device": "cpu",
    }
    return SynthSettings.model_validate(given | kw)


@pytest.fixture(scope="module")
def models():
    return load_models(settings("cmi"))


def final(module, parsed, models, index=0):
    work = Counters()
    (frame,) = METHODS[parsed.method](models, make_group(parsed, index, models.teacher.class_names), parsed, work)
    return frame, work


def test_total_variation_by_hand():
    """[[0, 1], [2, 5]]: right (1, 3), down (2, 4), diagonals 5 and 2 − 1; √10 + √20 + 5 + 1, and 0 for a flat image."""
    x = torch.tensor([[[[0.0, 1.0], [2.0, 5.0]]], [[[1.0, 1.0], [1.0, 1.0]]]])
    expected = (math.sqrt(10) + math.sqrt(20) + 5 + 1) / 2
    assert inversion.total_variation(x).item() == pytest.approx(expected, abs=1e-4)


def test_competition_by_hand():
    """JS of (3/4, 1/4) and (1/4, 3/4) with their mean (1/2, 1/2): 3/4·ln(3/2) + 1/4·ln(1/2), both halves alike."""
    t = torch.tensor([[math.log(3.0), 0.0], [1.0, 1.0]])
    s = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])
    js = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert inversion.competition(t, s).tolist() == pytest.approx([1 - js, 1.0], abs=1e-6)


def test_the_first_layer_weighs_more(models):
    x = torch.rand(4, 3, 8, 8) * 2 - 1
    _, batch = models.teacher.with_moments(x)
    norms = models.teacher.batchnorms
    each = [moments_gap([b], [r]).item() for b, r in zip(batch, norms, strict=True)]
    expected = (10 * each[0] + sum(each[1:])) / len(each)
    assert inversion.weighted_statistics(batch, norms, 10).item() == pytest.approx(expected, rel=1e-5)


def test_info_nce_by_hand():
    """One query that fits its key (1) and half-fits the bank (0.5), τ = 0.5: −log(e² / (e² + e⁰ + e¹))."""
    query = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    bank = torch.tensor([[0.5, math.sqrt(0.75)]])
    first = math.exp(2) / (math.exp(2) + 1 + math.exp(1))
    second = math.exp(2) / (math.exp(2) + 1 + math.exp(2 * math.sqrt(0.75)))
    expected = -(math.log(first) + math.log(second)) / 2
    assert info_nce(query, query, bank, 0.5).item() == pytest.approx(expected, abs=1e-6)
    alone = -math.log(math.exp(2) / (math.exp(2) + 1))
    assert info_nce(query, query, bank[:0], 0.5).item() == pytest.approx(alone, abs=1e-6)


def test_the_embedding_is_channel_means_in_units_of_the_running_statistics():
    net = nn.Sequential(nn.Identity(), nn.BatchNorm2d(1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2))
    net.__dict__["stages"], net.__dict__["head"] = (), "4"
    net[1].running_mean.fill_(0.5)
    net[1].running_var.fill_(4.0)
    teacher = Teacher(net, InputSettings(size=4, channels=1, mean=(0.0,), std=(1.0,)), ("a", "b"), {})
    gray = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 4, 4)  # luminance 0 and 1
    assert embedding(teacher, gray)[2].flatten().tolist() == pytest.approx([-0.25, 0.25], abs=1e-6)


def test_views_are_crops_flips_and_shifts():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert torch.equal(views(x, torch.tensor([[0.0, 0.0, 1.0, 1.0]])), x)
    assert torch.equal(views(x, torch.tensor([[0.0, 0.0, 1.0, -1.0]])), x.flip(-1))
    down = views(x, torch.tensor([[0.25, 0.0, 1.0, 1.0]]))[0, 0, :, 0].tolist()
    assert down == [4.0, 8.0, 12.0, 12.0]
    half = views(x, torch.tensor([[0.0, 0.5, 0.5, 0.5]]))[0, 0]
    assert half[0].tolist() == [1.75, 2.25, 2.75, 3.0] and half[:, 3].tolist() == [3.0, 4.0, 6.0, 8.0]


def test_drawn_windows_lie_inside_and_differ():
    rng = torch.Generator().manual_seed(0)
    y, x, h, w = draw_crops(200, (0.25, 1.0), True, rng).T
    assert ((h * w.abs()) > 0.18).all() and (y + h <= 1 + 1e-6).all() and (x + w.abs() <= 1 + 1e-6).all()
    assert 60 < (w < 0).sum() < 140 and y.unique().numel() > 150
    shifts = draw_shifts(200, 8, 0.125, False, rng)
    assert set((shifts[:, :2] * 8).flatten().tolist()) == {-1.0, 0.0, 1.0} and (shifts[:, 2:] == 1).all()


@pytest.mark.parametrize("side", [8, 10, 32, 96])
def test_the_generator_fills_any_side(side):
    images = Generator(4, 2, 1, side)(torch.randn(2, 4))
    assert images.shape == (2, 1, side, side) and images.abs().max() <= 1


def test_the_lowest_loss_is_kept_and_never_nan():
    group = make_group(settings("cmi"), 0, ("a", "b"))
    losses, best = Losses(*torch.zeros(3)), Best()
    with pytest.raises(DataError, match="never finite"):
        best.checked(group)
    for loss, value in ((2.0, 1.0), (1.0, 2.0), (float("nan"), 3.0), (1.5, 4.0)):
        best.offer(torch.tensor(loss), torch.tensor([value]), losses)
    assert best.checked(group).item() == 2.0


@pytest.mark.parametrize("module", [cmi, inversion])
def test_losses_fall_and_the_teacher_sees_its_classes(module, models):
    name = {cmi: "cmi", inversion: "deepinversion"}[module]
    small = {"width": 16, "lr": 3e-3}
    parsed = settings(name, cmi={"steps": 40} | small, deepinversion={"steps": 40}, group_size=20)
    short = settings(name, cmi={"steps": 1} | small, deepinversion={"steps": 1}, group_size=20)
    (before, _), (after, work) = final(module, short, models), final(module, parsed, models)
    assert after.losses.bn < 0.6 * before.losses.bn and after.losses.ce.mean() < 0.3 * before.losses.ce.mean()
    labels = torch.tensor(make_group(parsed, 0, models.teacher.class_names).labels)
    assert (models.teacher.logits(after.images).argmax(1) == labels).float().mean() > 0.8
    assert after.images.shape == (20, 3, 8, 8) and after.images.abs().max() <= 1
    assert work.teacher_calls == (40 if module is inversion else 2 * 2 * 40)


@pytest.mark.parametrize("module", [cmi, inversion])
def test_a_group_depends_on_itself_alone(module, models):
    """The same bytes again, whatever was made before; other groups and seeds differ."""
    name = {cmi: "cmi", inversion: "deepinversion"}[module]
    parsed = settings(name)
    torch.manual_seed(1)
    first, state = final(module, parsed, models, 1)[0].images, torch.get_rng_state()
    other = final(module, parsed, models, 0)[0].images
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is nobody's business
    torch.manual_seed(2)
    assert torch.equal(final(module, parsed, models, 1)[0].images, first)
    assert not torch.equal(first, other)
    assert not torch.equal(final(module, settings(name, seed=1), models, 1)[0].images, first)


def test_the_bank_holds_earlier_batches_of_its_own_group(models, monkeypatch):
    seen = []
    monkeypatch.setattr(cmi, "info_nce", lambda q, k, bank, t: seen.append(len(bank)) or info_nce(q, k, bank, t))
    parsed = settings("cmi", cmi={"steps": 2, "batches": 3, "width": 4}, group_size=10)
    for group in range(2):
        final(cmi, parsed, models, group)
    assert seen == 2 * [0, 0, 3, 3, 6, 6]


def test_later_batches_are_kept_apart_from_earlier_ones(models, monkeypatch):
    """Without its bank the second batch comes out differently, the first does not."""
    parsed = settings("cmi")
    whole = final(cmi, parsed, models)[0].images
    monkeypatch.setattr(cmi, "info_nce", lambda q, k, bank, t: info_nce(q, k, bank[:0], t))
    without = final(cmi, parsed, models)[0].images
    assert torch.equal(whole[:6], without[:6]) and not torch.equal(whole[6:], without[6:])


@pytest.mark.parametrize("method", ["cmi", "deepinversion"])
def test_an_adversary_steers(method, models, tmp_path):
    parsed = settings(method, adversary={"name": "embedded:digits"}, guidance={"adversarial": 1.0})
    module = {"cmi": cmi, "deepinversion": inversion}[method]
    torch.manual_seed(0)
    net = nets.build("digits-cnn-small", 10, 1)
    student = Teacher(net, models.teacher.input.settings, models.teacher.class_names, {})
    against = Models(None, models.teacher, student, "cpu")
    steered, plain = final(module, parsed, against)[0], final(module, settings(method), models)[0]
    assert not torch.equal(steered.images, plain.images)
    assert (plain.losses.adversarial == 0).all()


@pytest.mark.parametrize("method", ["cmi", "deepinversion"])
def test_shards_need_no_prior_and_tell_how_images_were_made(method, tmp_path):
    parsed = settings(method, prior={"path": "/nowhere"})
    inputs = inspect_inputs(parsed)
    assert (inputs.image_size, inputs.prior["name"], inputs.prior["sha256"]) == (8, "none", None)
    storage, again = Storage(str(tmp_path / "a")), Storage(str(tmp_path / "b"))
    report = ShardWorker(parsed.model_dump(mode="json"), storage.url, "f" * 64).run(1)
    rows = pq.read_table(storage.path(done_records(storage)[1].table)).to_pylist()
    assert (report["evaluations"], report["rows"], len(rows)) == (0, 24, 24)
    assert {(row["method"], row["step"], row["timestep"], row["prompt"]) for row in rows} == {(method, 6, 0, None)}
    assert [row["trajectory"] for row in rows] == list(range(24, 48))
    assert all(row["cosine_ref"] == f"class:{row['label']}" and row["source_key"] is None for row in rows)
    assert all(row["loss_ce"] > 0 and row["loss_bn"] > 0 for row in rows)
    worker = ShardWorker(parsed.model_dump(mode="json"), again.url, "f" * 64)
    worker.run(0)
    worker.run(1)
    assert done_records(again)[1] == done_records(storage)[1]


def test_an_asked_size_is_what_is_made(models):
    parsed = settings("cmi", images={"size": 12}, cmi={"steps": 2, "width": 4})
    assert inspect_inputs(parsed).image_size == 12
    assert final(cmi, parsed, models)[0].images.shape[-1] == 12


def test_a_teacher_without_batchnorm_is_contrasted_by_its_features(models):
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    net.__dict__["stages"], net.__dict__["head"] = (), "4"
    spec = models.teacher.input.settings
    plain = Models(None, Teacher(net, spec, models.teacher.class_names, {}), None, "cpu")
    for module, method in ((cmi, "cmi"), (inversion, "deepinversion")):
        frame, _ = final(module, settings(method), plain)
        assert frame.losses.bn == 0 and frame.images.isfinite().all()
    plain.teacher._head = None
    with pytest.raises(UsageError, match="cmi.cr=0"):
        final(cmi, settings("cmi"), plain)


def test_settings_that_make_no_sense_are_refused():
    for wrong, says in (
        ({"images": {"intermediates": 1}}, "no intermediate images"),
        ({"cmi": {"batches": 7}}, "less than two images"),
        ({"cmi": {"crop": [0.5, 0.2]}}, "0 < smallest <= largest"),
        ({"method": "dda", "cmi": {"cr": 0}, "dda": {"space": "contrastive"}}, "head that cmi.cr"),
    ):
        with pytest.raises(ValueError, match=says):
            settings(**({"method": "cmi"} | wrong))
