"""Unguided sampling gives the images of diffusers' own pipelines, from folders old and new.

(SDXL and IF: ``test_kinds``; Stable unCLIP: ``test_variation``.) On purpose other than diffusers: nothing is clipped or
thresholded, learned variances are dropped, and DiT's null class is that of its configuration, not always 1000.
"""

import json

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LDMPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

from stages.settings import PriorSettings
from stages.synth.priors.files import locate_prior
from stages.synth.priors.kinds import load_prior
from tests.synth.tiny import save_ddpm, save_dit, save_ldm, save_stable_diffusion, save_stable_diffusion_xl

SCHEDULERS = {
    "ddim": DDIMScheduler,
    "ddpm": DDPMScheduler,
    "dpmsolver++": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
}
PROMPTS = ["a cat", "dog"]


def edit(file, drop=(), **values):
    content = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in content.items() if key not in drop}))


def load(folder, scheduler="ddim", **settings):
    return load_prior(PriorSettings(path=str(folder), steps=4, scheduler=scheduler, **settings), "cpu")


def rngs():
    return [torch.Generator().manual_seed(seed) for seed in (3, 4)]


def sampled(prior, conditions):
    """Images ``[2, 3, h, w]`` in [0, 1]; initial latents, then each step's noise from one generator a trajectory."""
    generators = rngs()
    state = prior.start(torch.cat([torch.randn(1, *prior.latent_shape, generator=g) for g in generators]))
    with torch.no_grad():
        condition = prior.encode(conditions)
        for _ in prior.timesteps:
            state = prior.step(prior.predict(state, condition), generators)
        return (prior.decode(state.z) / 2 + 0.5).clamp(0, 1)


def piped(pipeline, scheduler, *arguments, **more):
    """The same of ``pipeline`` with another scheduler over its configuration."""
    options = {"clip_sample": False} if scheduler in ("ddim", "ddpm") else {}
    pipeline.scheduler = SCHEDULERS[scheduler].from_config(pipeline.scheduler.config, **options)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(*arguments, num_inference_steps=4, output_type="np", **{"generator": rngs()} | more).images
    return torch.from_numpy(np.asarray(images)).movedim(-1, 1)


def assert_same(ours, theirs):
    assert ours.std() > 0.01
    torch.testing.assert_close(ours, theirs.expand_as(ours), rtol=0, atol=1e-4)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_stable_diffusion(tmp_path, kind, scheduler):
    folder = save_stable_diffusion(tmp_path / "prior", kind)
    prior = load(folder, scheduler, cfg_scale=2.0, negative_prompt="b")
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    theirs = piped(pipeline, scheduler, PROMPTS, negative_prompt=["b", "b"], guidance_scale=2.0)
    assert_same(sampled(prior, PROMPTS), theirs)


@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
def test_stable_diffusion_with_a_scheduler_of_before_0_9(tmp_path, scheduler):
    """The pipeline corrects steps_offset and clip_sample; the file leaves out what later versions write."""
    folder = save_stable_diffusion(tmp_path / "prior")
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
    old = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "clip_sample": True, "steps_offset": 0} | betas
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(old))
    edit(folder / "model_index.json", scheduler=["diffusers", "PNDMScheduler"])
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    ours = sampled(load(folder, scheduler, cfg_scale=1.0), PROMPTS)
    assert_same(ours, piped(pipeline, scheduler, PROMPTS, guidance_scale=1.0))


def test_sample_size_of_before_0_9(tmp_path):
    folder = save_stable_diffusion(tmp_path / "prior")
    edit(folder / "unet" / "config.json", _diffusers_version="0.2.2", sample_size=32)
    geometry = locate_prior(PriorSettings(path=str(folder))).geometry
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    assert geometry.latent == (4, 64, 64) and pipeline.unet.config.sample_size == 64
    assert geometry.image_size == 128 and geometry.note.endswith("sample_size 32 diffusers corrects to 64")
    edit(folder / "unet" / "config.json", _diffusers_version="0.9.0")
    assert locate_prior(PriorSettings(path=str(folder))).geometry.latent == (4, 32, 32)


def test_a_vae_with_statistics_of_its_latents(tmp_path):
    folder = save_stable_diffusion_xl(tmp_path / "prior")
    mean, std = [-1.7, 1.9, -1.4, 2.5], [8.5, 5.9, 6.5, 5.2]
    plain = load(folder, "euler", cfg_scale=2.0)
    edit(folder / "vae" / "config.json", latents_mean=mean, latents_std=std)
    prior = load(folder, "euler", cfg_scale=2.0)
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    ours = sampled(prior, PROMPTS)
    assert_same(ours, piped(pipeline, "euler", PROMPTS, guidance_scale=2.0))
    assert not torch.allclose(ours, sampled(plain, PROMPTS), atol=0.01)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    means, stds = (torch.tensor(values).view(1, 4, 1, 1) for values in (mean, std))
    torch.testing.assert_close(prior.encode_images(images), (plain.encode_images(images) / 0.7 - means) / stds * 0.7)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_dit(tmp_path, scale):
    folder = save_dit(tmp_path / "prior", classes=1000)
    prior = load(folder, cfg_scale=scale, labels={"cat": 3, "dog": 999})
    theirs = piped(DiTPipeline.from_pretrained(folder), "ddim", [3, 999], guidance_scale=scale)
    assert_same(sampled(prior, ["cat", "dog"]), theirs)


def test_latent_unconditional(tmp_path):
    folder = save_ldm(tmp_path / "prior")
    prior = load(folder, cfg_scale=1.0)
    assert_same(sampled(prior, PROMPTS), piped(LDMPipeline.from_pretrained(folder), "ddim", 2))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_pixels_with_ddpm(tmp_path, channels, variance):
    folder = save_ddpm(tmp_path / "prior", channels)
    edit(folder / "scheduler" / "scheduler_config.json", variance_type=variance)
    pipeline = DDPMPipeline.from_pretrained(folder)
    assert_same(sampled(load(folder, "ddpm", cfg_scale=1.0), PROMPTS), piped(pipeline, "ddpm", 2))


def test_pixels_with_ddim(tmp_path):
    folder = save_ddpm(tmp_path / "prior")
    pipeline = DDIMPipeline.from_pretrained(folder)
    assert_same(sampled(load(folder, cfg_scale=1.0), PROMPTS), piped(pipeline, "ddim", 2))
