"""The counted goals on a prior of true shape (DiT-XL/2): guidance costs little more than sampling. Cannot flake."""

import importlib.util
from pathlib import Path

import pytest
from diffusers import AutoencoderTiny

from stages.cost import synth_cost

SCRIPT = Path(__file__).parents[2] / "benchmarks/counted_work.py"


@pytest.fixture(scope="module")
def script():
    found = importlib.util.spec_from_file_location("counted_work", SCRIPT)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_tiny_guidance_at_every_step_costs_a_fifth_and_eight_of_twenty_less_than_half(tmp_path, script):
    AutoencoderTiny().save_config(tmp_path / "taesd")
    folder = script.write_prior(tmp_path / "dit", "DiTPipeline", {"transformer": script.DIT, "vae": script.VAE})
    prior = {"path": str(folder), "labels": {f"class {i}": i for i in range(10)}}
    tiny = {"decoder": "tiny", "tiny_decoder": str(tmp_path / "taesd")}
    free = synth_cost(script.settings(prior, {}, method="dmkd"))
    every = synth_cost(script.settings(prior, tiny))
    few = synth_cost(script.settings(prior | script.FEW, tiny | script.LATE))
    assert free.denoiser == pytest.approx(50 * 2 * 0.237e12, rel=0.03)  # 118.6 G multiply-adds, as DiT's paper counts
    assert (
        every.flop_per_trajectory < 1.2 * free.flop_per_trajectory
        and few.flop_per_trajectory < 0.45 * free.flop_per_trajectory
    )
    assert every.saved_bytes_per_trajectory < 0.15 * 2**30


def test_the_default_settings_and_the_fast_recipe_stay_cheap(tmp_path, script):
    """TFLOP an image of what a user gets who sets nothing; a dearer default must fail here."""
    AutoencoderTiny().save_config(tmp_path / "taesd")
    text = script.write_prior(tmp_path / "sd15", "StableDiffusionPipeline", {"unet": script.SD15, "vae": script.VAE})
    classes = script.write_prior(tmp_path / "dit", "DiTPipeline", {"transformer": script.DIT, "vae": script.VAE})
    labels = {f"class {i}": i for i in range(10)}
    bounds = [
        (script.defaults({"path": str(text)}), 40),
        (script.defaults({"path": str(classes), "labels": labels}), 11),
        (script.recipe("diffdfkd-cifar10-fast", {"path": str(text)}, str(tmp_path / "taesd")), 30),
    ]
    for chosen, most in bounds:
        cost = synth_cost(chosen)
        assert chosen.guides and cost.guidance_teacher > 0 and cost.flop_per_trajectory < most * 1e12
