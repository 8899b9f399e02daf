"""A prior distilled to few steps: what was learned is what ``prior.distilled=lcm`` samples with."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from manifests.errors import UsageError
from stages.settings import PriorSettings
from stages.synth.priors.kinds import load_prior
from stages.synth.priors.schedule import State
from stages.synth.sampler import sample
from tests.synth.tiny import save_stable_diffusion

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def distilled(request, tmp_path_factory):
    """The script, and what its calls left: CFG 1 in two parts, then a range of scales."""
    folder = tmp_path_factory.mktemp(request.param)
    base = save_stable_diffusion(folder / "base", request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        script = importlib.import_module("distill_prior")

        def run(name, *more):
            options = ["--out", str(folder / name), "--work", str(folder / f"{name}-work"), "--device", "cpu"]
            small = ["--pool", "6", "--levels", "4", "--between", "2", "--batch", "3"]
            patch.setattr(sys, "argv", ["distill_prior.py", str(base), *options, *small, *more])
            script.main()

        run("one", "--steps", "2")
        run("one", "--steps", "3")
        run("range", "--steps", "1", "--scales", "1", "3")
    return script, folder


@pytest.mark.parametrize(("name", "scale"), [("one", 1.0), ("range", 1.0), ("range", 2.5)])
def test_sampling_evaluates_the_function_that_was_learned(distilled, name, scale):
    script, folder = distilled
    settings = PriorSettings(path=str(folder / name), distilled="lcm", cfg_scale=scale)
    prior = load_prior(settings, "cpu")
    paths = script.Paths(prior, 4, 2, bf16=False)
    assert prior.timesteps == paths.learned.tolist() == [999, 749, 499, 249]
    condition, z = prior.encode(["a", "b"]), torch.randn(2, *prior.latent_shape)
    for step, time in enumerate(prior.timesteps):
        times, scales = torch.full((2,), time), torch.full((2,), scale)
        expected = paths.function(prior.network, z, times, scales, condition)
        torch.testing.assert_close(prior.predict(State(z, step), condition).z0, expected, atol=1e-5, rtol=1e-5)


def test_fewer_steps_visit_levels_that_were_learned_and_more_are_refused(distilled):
    _, folder = distilled
    for steps, times in ((1, [999]), (2, [999, 499]), (3, [999, 749, 499])):
        settings = PriorSettings(path=str(folder / "one"), distilled="lcm", steps=steps)
        assert load_prior(settings, "cpu").timesteps == times
    with pytest.raises(UsageError, match="distilled at 4 noise levels: set prior.steps to 4 or less"):
        load_prior(PriorSettings(path=str(folder / "one"), distilled="lcm", steps=5), "cpu")


def test_a_path_is_what_ddim_draws(distilled):
    script, folder = distilled
    settings = PriorSettings(path=str(folder / "base"), steps=8, cfg_scale=2.0)
    prior = load_prior(settings, "cpu")
    paths = script.Paths(prior, 4, 2, bf16=False)
    drawn = paths.draw(["a", "b"], torch.tensor([2.0, 2.0]), seed=0)
    assert drawn.shape == (2, 5, *prior.latent_shape)
    prior.schedule.scheduler.register_to_config(timestep_spacing="trailing")
    prior.schedule.scheduler.set_timesteps(8)
    assert prior.schedule.scheduler.timesteps.tolist() == paths.times
    prior.schedule.times = prior.schedule.timesteps = paths.times
    prior.schedule.levels = [prior.schedule._level(step) for step in range(8)]
    prior.times = torch.tensor(paths.times)
    start = prior.start(drawn[:, 0].float())
    *_, (_, z) = sample(prior, start, prior.encode(["a", "b"]))
    # the scheduler's last step ends at timestep 0, the path at the clean latent itself
    torch.testing.assert_close(drawn[:, -1].float(), z, atol=0.1, rtol=0.05)


def test_a_second_call_goes_on_and_the_card_says_how_it_was_made(distilled):
    _, folder = distilled
    step = torch.load(folder / "one-work" / "lcm.pt", weights_only=True)["step"]
    card = (folder / "one" / "README.md").read_text()
    assert step == 3 and "3 steps of 3 latents at timesteps 999, 749, 499, 249" in card and "with CFG 1" in card
    assert "CFG 1 to 3, which is an input of the network" in (folder / "range" / "README.md").read_text()
