"""Few-step priors from disk: images equal those of diffusers' own pipelines, LoRA files are merged whole or refused."""

import json

import pytest
import torch
from diffusers import (
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    TCDScheduler,
)
from safetensors.torch import save_file

from manifests.errors import DataError, UsageError
from stages.seeds import torch_rng
from stages.settings import PriorSettings
from stages.synth.priors.files import locate_prior
from stages.synth.priors.kinds import load_prior
from stages.synth.priors.lora import merge_lora
from stages.synth.sampler import sample
from tests.synth.tiny import save_stable_diffusion, tiny_text_unet, tiny_vae

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PROMPTS = ["a", "b"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_stable_diffusion(tmp_path_factory.mktemp("few") / "base")


@pytest.fixture(scope="module")
def lcm_folder(tmp_path_factory):
    """A latent consistency model that takes the CFG scale as an input, as the published full ones do."""
    path = tmp_path_factory.mktemp("few") / "lcm"
    base = StableDiffusionPipeline.from_pretrained(save_stable_diffusion(path), safety_checker=None)
    torch.manual_seed(1)
    parts = {"tokenizer": base.tokenizer, "text_encoder": base.text_encoder, "vae": tiny_vae()}
    LatentConsistencyModelPipeline(
        **parts, unet=tiny_text_unet(time_cond_proj_dim=12), scheduler=LCMScheduler(**BETAS),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(path)  # fmt: skip
    index = json.loads((path / "model_index.json").read_text()) | {"_class_name": "LatentConsistencyModelPipeline"}
    (path / "model_index.json").write_text(json.dumps(index))
    return path


def noise_of(prior):
    return torch.randn(len(PROMPTS), *prior.latent_shape, generator=torch.Generator().manual_seed(3))


def rngs():
    """One generator per trajectory, that goes on from step to step as diffusers' pipelines use it."""
    kept = [torch_rng(0, "step", number) for number in range(len(PROMPTS))]
    return lambda step: kept


def images(prior):
    start, condition = prior.start(noise_of(prior)), prior.encode(PROMPTS)
    *_, (_, z) = sample(prior, start, condition, rngs=rngs() if prior.stochastic else None)
    return prior.decode(z)


@pytest.mark.parametrize(
    ("distilled", "scheduler", "call"),
    [
        ("lcm", LCMScheduler(**BETAS), {}),
        ("tcd", TCDScheduler(**BETAS), {"eta": 0.3}),
        ("turbo", EulerAncestralDiscreteScheduler(**BETAS, timestep_spacing="trailing"), {}),
        ("lightning", EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing"), {}),
    ],
)
@pytest.mark.parametrize("steps", [1, 4])
def test_images_equal_the_librarys_own(folder, distilled, scheduler, call, steps):
    if distilled == "lightning" and steps == 1:
        scheduler = EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing", prediction_type="sample")
    prior = load_prior(PriorSettings(path=str(folder), distilled=distilled, steps=steps), "cpu")
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        PROMPTS, latents=noise_of(prior), num_inference_steps=steps, guidance_scale=1.0, output_type="pt",
        generator=rngs()(0), **call,
    ).images  # fmt: skip
    ours = (images(prior) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_a_network_that_takes_the_cfg_scale_is_evaluated_once(lcm_folder, scale):
    prior = load_prior(PriorSettings(path=str(lcm_folder), distilled="lcm", cfg_scale=scale), "cpu")
    assert len(prior.encode(PROMPTS)) == len(PROMPTS)
    pipeline = LatentConsistencyModelPipeline.from_pretrained(lcm_folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        PROMPTS, latents=noise_of(prior), num_inference_steps=4, guidance_scale=scale, output_type="pt",
        generator=rngs()(0),
    ).images  # fmt: skip
    torch.testing.assert_close((images(prior) / 2 + 0.5).clamp(0, 1), theirs, rtol=1e-4, atol=1e-4)


def test_a_few_step_prior_says_what_it_is(lcm_folder):
    with pytest.raises(UsageError, match="set prior.distilled=lcm"):
        load_prior(PriorSettings(path=str(lcm_folder)), "cpu")


LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
KOHYA = "lora_unet_" + LAYER.replace(".", "_")
CONV = "down_blocks.0.resnets.0.conv1"


def factors(*shapes):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize(
    ("down", "up", "alpha"),
    [
        (f"unet.{LAYER}.lora_A.weight", f"unet.{LAYER}.lora_B.weight", None),
        (f"base_model.model.{LAYER}.lora_A.weight", f"base_model.model.{LAYER}.lora_B.weight", None),
        (f"unet.{LAYER}.lora.down.weight", f"unet.{LAYER}.lora.up.weight", None),
        (f"{KOHYA}.lora_down.weight", f"{KOHYA}.lora_up.weight", f"{KOHYA}.alpha"),
        (
            f"unet.{LAYER.replace('to_q', 'processor.to_q_lora')}.down.weight",
            f"unet.{LAYER.replace('to_q', 'processor.to_q_lora')}.up.weight",
            None,
        ),
    ],
)
def test_lora_of_every_key_format_is_merged(tmp_path, down, up, alpha):
    torch.manual_seed(0)
    unet = tiny_text_unet()
    weight = unet.get_submodule(LAYER).weight
    before = weight.detach().clone()
    a, b = factors((2, before.shape[1]), (before.shape[0], 2))
    save_file({down: a, up: b} | ({alpha: torch.tensor(6.0)} if alpha else {}), tmp_path / "x.safetensors")
    assert merge_lora(tmp_path / "x.safetensors", 0.5, {"unet": unet}) == 1
    torch.testing.assert_close(weight.detach(), before + 0.5 * (3.0 if alpha else 1.0) * b @ a)


def test_lora_of_a_convolution_and_the_alpha_of_a_configuration(tmp_path):
    torch.manual_seed(0)
    unet = tiny_text_unet()
    conv = unet.get_submodule(CONV)
    before = conv.weight.detach().clone()
    a, b = factors((2, *before.shape[1:]), (before.shape[0], 2, 1, 1))
    metadata = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 4, "unet.r": 2})}
    state = {f"unet.{CONV}.lora_A.weight": a, f"unet.{CONV}.lora_B.weight": b}
    save_file(state, tmp_path / "x.safetensors", metadata=metadata)
    merge_lora(tmp_path / "x.safetensors", 1.0, {"unet": unet})
    x = torch.randn(1, before.shape[1], 6, 6)
    low = torch.nn.functional.conv2d(torch.nn.functional.conv2d(x, a, padding=1), b)
    expected = torch.nn.functional.conv2d(x, before, conv.bias, padding=1) + 2 * low
    torch.testing.assert_close(conv(x), expected, rtol=1e-3, atol=1e-3)


A, B = f"unet.{LAYER}.lora_A.weight", f"unet.{LAYER}.lora_B.weight"


@pytest.mark.parametrize(
    ("state", "line"),
    [
        ({}, "holds no LoRA layers"),
        ({A: (2, 8)}, "does not fit"),
        ({A: (2, 9), B: (8, 2)}, "made for another network: .*to_q does not fit"),
        ({A.replace("to_q", "to_x"): (2, 8), B.replace("to_q", "to_x"): (8, 2)}, "unet has no layer .*to_x"),
        ({A: (2, 8), B: (8, 2), f"unet.{LAYER}.dora_scale": (8,)}, "dora_scale', which is no LoRA factor"),
        ({"text_encoder_2.q.lora_A.weight": (2, 8)}, "of text_encoder_2, which this prior does not have"),
        ({"lora_unet_input_blocks_4_1_to_q.lora_down.weight": (2, 8)}, "names layers as the original SDXL code does"),
        ({"adapter.q.lora_A.weight": (2, 8)}, "names no network"),
    ],
)
def test_lora_that_does_not_fit_changes_nothing(tmp_path, state, line):
    torch.manual_seed(0)
    unet = tiny_text_unet()
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    save_file({key: torch.ones(shape) for key, shape in state.items()}, tmp_path / "x.safetensors")
    with pytest.raises(DataError, match=line):
        merge_lora(tmp_path / "x.safetensors", 1.0, {"unet": unet})
    assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())


def test_a_damaged_or_absent_lora_is_one_line(tmp_path, folder):
    (tmp_path / "x.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match="cannot be read as safetensors"):
        merge_lora(tmp_path / "x.safetensors", 1.0, {})
    with pytest.raises(DataError, match="no such file"):
        locate_prior(PriorSettings(path=str(folder), lora=({"path": str(tmp_path / "absent.safetensors")},)))


def test_loras_are_part_of_the_identity(tmp_path, folder):
    a, b = factors((2, 8), (8, 2))
    file = tmp_path / "x.safetensors"
    save_file({A: a, B: b}, file)
    plain = PriorSettings(path=str(folder))
    settings = [plain, *(plain.model_copy(update={"lora": ({"path": str(file), "weight": w},)}) for w in (0.5, 1.0))]
    settings = [PriorSettings.model_validate(each.model_dump()) for each in settings]
    identities = [json.dumps(locate_prior(each).identity) for each in settings]
    save_file({A: a, B: 2 * b}, file)
    identities.append(json.dumps(locate_prior(settings[-1]).identity))
    assert len(set(identities)) == 4
    changed, same = (load_prior(each, "cpu").network.get_submodule(LAYER).weight for each in (settings[-1], plain))
    torch.testing.assert_close(changed, same + 2 * b @ a)
