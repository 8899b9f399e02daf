"""Counted cost: the meta run of single steps equals FLOPs counted while really sampling, for every kind of step."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stages.cost import Flops, FusedAttention, flops, saved_bytes, step_kinds, synth_cost, weight_bytes
from stages.models.build import build_net
from stages.models.loading import load_teacher, save_model
from stages.models.source import ModelConfig
from stages.settings import InputSettings, SynthSettings
from stages.synth.decoders import load_decoder
from stages.synth.group import make_group
from stages.synth.priors.kinds import load_prior
from stages.synth.sampler import Counters, Models, diffdfkd, dmkd
from stages.synth.worker import METHODS
from tests.synth.test_guidance_decoder import save_tiny
from tests.synth.tiny import (
    save_ddpm,
    save_dit,
    save_if,
    save_ldm,
    save_stable_diffusion,
    save_stable_diffusion_xl,
    save_unclip,
)

NAMES = ("a", "b")


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    values = InputSettings(size=16, mean=(0.5,) * 3, std=(0.5,) * 3)
    config = ModelConfig(architecture="resnet8", num_classes=2, channels=3, input=values, class_names=NAMES)
    torch.manual_seed(0)
    save_model(folder, build_net(config), config)
    return folder


def counted(settings: SynthSettings) -> int:
    """FLOPs of really sampling one group, a trajectory; prompts and scores are left out."""
    prior, teacher = load_prior(settings.prior, "cpu"), load_teacher(settings.teacher)
    decode = load_decoder(prior, settings, teacher) if settings.method == "diffdfkd" else None
    models = Models(prior, teacher, None, "cpu", decode)
    group = make_group(settings, 0, NAMES)
    conditions = group.conditions(models.prior.conditioning)
    models.prior.encode(conditions)  # prompts are cached, the negative one is not
    with Flops() as text:
        models.prior.encode(conditions)
    method = {"diffdfkd": diffdfkd, "dmkd": dmkd}[settings.method]
    with Flops() as total:
        list(method(models, group, settings, Counters()))
    return (total.total - text.total) // settings.group_size


@pytest.mark.parametrize(
    ("save", "prior", "other"),
    [
        (
            save_stable_diffusion,
            {"cfg_scale": 3.0, "cfg_interval": (0.25, 0.75)},
            {"guidance": {"every": 2, "updates_per_step": 2}},
        ),
        (save_stable_diffusion, {"cfg_scale": 3.0}, {"guidance": {"gradient_at": "xt", "interval": (0.5, 1.0)}}),
        (save_stable_diffusion, {"cfg_scale": 2.0}, {"method": "dmkd", "images": {"intermediates": 2}}),
        (save_stable_diffusion_xl, {"cfg_scale": 1.0}, {"lca": {"every": 2}, "images": {"intermediates": 1}}),
        (save_dit, {"cfg_scale": 2.0, "labels": {"a": 0, "b": 3}, "scheduler": "dpmsolver++"}, {}),
        (save_if, {"cfg_scale": 2.0}, {"guidance": {"every": 3}}),
        (save_ldm, {"cfg_scale": 1.0}, {"guidance": {"bn": 0.0}}),
        (save_ddpm, {"cfg_scale": 1.0, "scheduler": "ddpm"}, {"guidance": {"gradient_at": "xt"}}),
    ],
)
def test_the_counted_cost_is_that_of_sampling(tmp_path, teacher_folder, save, prior, other):
    folder = str(save(tmp_path / "prior"))
    common = {"teacher": {"name": str(teacher_folder)}, "group_size": 2}
    guidance = {"guidance": {"decoder": "full"} | other.get("guidance", {})}
    settings = SynthSettings.model_validate({"prior": {"path": folder, "steps": 4} | prior} | common | other | guidance)
    cost = synth_cost(settings)
    assert cost.flop_per_trajectory - cost.scores == counted(settings)
    assert (cost.guidance_decoder > 0) == (settings.method == "diffdfkd" and save not in (save_ddpm, save_if))


@pytest.mark.parametrize("kind", ["tiny", "fitted"])
def test_another_decoder_is_what_guidance_costs_and_saves(tmp_path, teacher_folder, prior_folder, quick_fit, kind):
    chosen = {"tiny_decoder": str(save_tiny(tmp_path / "tiny"))} if kind == "tiny" else {}
    settings = SynthSettings.model_validate(
        {
            "prior": {"path": str(prior_folder), "steps": 4, "dtype": "bf16"},
            "teacher": {"name": str(teacher_folder)},
            "guidance": {"decoder": kind, "every": 2} | chosen,
            "group_size": 2,
        }
    )
    cost = synth_cost(settings)
    assert cost.flop_per_trajectory - cost.scores == counted(settings)
    full = settings.model_copy(update={"guidance": settings.guidance.model_copy(update={"decoder": "full"})})
    ours = synth_cost(full)
    assert cost.weights_bytes > ours.weights_bytes and cost.stored_decodes == ours.stored_decodes
    assert cost.guidance_teacher == ours.guidance_teacher and cost.guidance_decoder != ours.guidance_decoder


def test_weights_and_saved_activations(tmp_path, teacher_folder, prior_folder):
    settings = SynthSettings.model_validate(
        {
            "prior": {"path": str(prior_folder), "steps": 4},
            "teacher": {"name": str(teacher_folder)},
            "guidance": {"decoder": "full"},
        }
    )
    cost, free = synth_cost(settings), synth_cost(settings.model_copy(update={"method": "dmkd"}))
    half = settings.model_copy(update={"prior": settings.prior.model_copy(update={"dtype": "bf16"})})
    teacher = load_teacher(settings.teacher)
    for one in (settings, half):
        prior = load_prior(one.prior, "cpu")
        assert synth_cost(one).weights_bytes == weight_bytes(prior.network, prior.vae, *prior.encoders, teacher.net)
    assert synth_cost(half).saved_bytes_per_trajectory < cost.saved_bytes_per_trajectory
    through = settings.guidance.model_copy(update={"gradient_at": "xt"})
    through = synth_cost(settings.model_copy(update={"guidance": through}))
    saved = [each.saved_bytes_per_trajectory for each in (free, cost, through)]
    assert 0 == saved[0] < saved[1] < saved[2]


@pytest.mark.parametrize("method", ["cmi", "deepinversion", "dda", "dda by variation"])
def test_inversion_is_counted_from_few_images_and_iterations(teacher_folder, prior_folder, tmp_path, method):
    """Equal but for the contrastive head's products among images, which grow with their number."""
    if method == "dda by variation":
        method, prior_folder = "dda", save_unclip(tmp_path / "prior")
    base = {
        "method": method,
        "teacher": {"name": str(teacher_folder)},
        "prior": {"path": str(prior_folder), "steps": 4, "cfg_scale": 0.5},
        "cmi": {"steps": 5, "batches": 2, "width": 8, "latent": 8},
        "deepinversion": {"steps": 5},
        "dda": {"variants": 2, "strength": 0.5},
        "group_size": 8,
    }
    settings = SynthSettings.model_validate(base)
    prior = load_prior(settings.prior, "cpu") if method == "dda" else None
    models = Models(prior, load_teacher(settings.teacher), None, "cpu")
    group, module = make_group(settings, 0, NAMES), METHODS[method]
    text = 0
    if prior:
        prior.encode(group.prompts)
        with Flops() as encoder:
            prior.encode(group.prompts)
        text = encoder.total
    with Flops() as real:
        list(module(models, group, settings, Counters()))
    cost = synth_cost(settings)
    assert cost.inversion > 0 and cost.saved_bytes_per_trajectory > 0
    assert cost.flop_per_trajectory - cost.scores == pytest.approx(
        (real.total - 2 * text) / 8, rel=0.01 if method != "deepinversion" else 0
    )
    assert (cost.denoiser > 0) == (method == "dda")


def test_kinds_of_steps_cover_the_schedule():
    settings = SynthSettings.model_validate(
        {"prior": {"steps": 10, "cfg_interval": (0.0, 0.5)}, "guidance": {"interval": (0.2, 0.8), "every": 3}}
    )
    assert sorted(step_kinds(settings)) == [(0, 4, False), (2, 1, True), (5, 1, True), (6, 4, False)]


def test_saved_bytes_by_hand():
    layer = nn.Linear(8, 4).requires_grad_(False).to("meta")
    x = torch.empty(3, 8, device="meta", requires_grad=True)

    def twice():
        y = layer(x).relu()  # relu keeps its result: 3 × 4 floats; the layer only its weight
        return (y * y).sum()  # the product keeps y, the same storage

    assert saved_bytes(twice, [layer]) == 3 * 4 * 4
    assert flops(lambda: torch.autograd.grad(twice(), x)) == 2 * (2 * 3 * 8 * 4)


def test_attention_is_counted_without_its_maps():
    q = torch.empty(1, 2, 64, 8, device="meta", requires_grad=True)
    forward = 2 * 2 * (2 * 64 * 64 * 8)  # two products a head
    assert flops(lambda: F.scaled_dot_product_attention(q, q, q)) == forward
    with FusedAttention():
        assert F.scaled_dot_product_attention(q, q, q).shape == q.shape
    assert saved_bytes(lambda: F.scaled_dot_product_attention(q, q, q), []) < 64 * 64 * 4
