"""The text prior: ẑ0 agrees with the scheduler for every prediction type, moves keep eps, bad folders are refused."""

import shutil

import pytest
import torch

from manifests.errors import DataError, UsageError
from stages.settings import PriorSettings
from stages.synth.priors.files import locate, locate_prior
from stages.synth.priors.kinds import load_prior
from stages.synth.priors.schedule import State


def predicted(prior, step=1, n=3):
    torch.manual_seed(step)
    condition = prior.encode(["a", "b", "a"][:n])
    return prior.predict(State(torch.randn(n, *prior.latent_shape), step), condition)


def test_z0_is_the_schedulers_own(any_prior):
    for step in range(5):
        with torch.no_grad():
            state = predicted(any_prior, step)
        theirs = any_prior.schedule.scheduler.step(
            state.output, any_prior.timesteps[step], state.z
        ).pred_original_sample
        torch.testing.assert_close(state.z0, theirs, rtol=1e-5, atol=1e-4)


def test_moving_z0_keeps_eps(any_prior):
    with torch.no_grad():
        state = predicted(any_prior)
    delta = torch.randn_like(state.z0)
    moved = any_prior.move(state, delta)
    alpha, sigma = any_prior.levels(state.step)
    eps = lambda s: (s.z - alpha * s.z0) / sigma  # noqa: E731
    torch.testing.assert_close(eps(moved), eps(state), rtol=1e-4, atol=1e-4)
    theirs = any_prior.schedule.scheduler.step(
        moved.output, any_prior.timesteps[state.step], moved.z
    ).pred_original_sample
    torch.testing.assert_close(theirs, state.z0 + delta, rtol=1e-4, atol=1e-4)


def test_mixing_before_the_step_equals_mixing_after_it(any_prior):
    """Equation 11 on (z, eps) together is the same as mixing the stepped latents, since DDIM is linear per cell."""
    with torch.no_grad():
        state = predicted(any_prior)
    share = torch.zeros(3, 1, 8, 8)
    share[0, :, 2:5, 1:6] = 1
    blend = lambda x: torch.lerp(x, x[[2, 1, 2]], share)  # noqa: E731
    before, after = any_prior.step(state.mapped(blend)).z, any_prior.step(state).mapped(blend).z
    torch.testing.assert_close(before, after)


def test_cfg_mixes_the_two_predictions(any_prior):
    z = torch.randn(2, *any_prior.latent_shape)
    with torch.no_grad():
        guided = any_prior.predict(State(z, 0), any_prior.encode(["a", "b"])).output
        embedded = lambda texts: torch.cat([any_prior.embed(text) for text in texts])  # noqa: E731
        one = lambda texts: any_prior.network(z, any_prior.timesteps[0], embedded(texts)).sample  # noqa: E731
        expected = one(["", ""]) + 2.0 * (one(["a", "b"]) - one(["", ""]))
    torch.testing.assert_close(guided, expected, rtol=1e-4, atol=1e-5)


def test_decode_is_the_vaes(prior):
    z0 = torch.randn(2, *prior.latent_shape)
    assert torch.equal(prior.decode(z0), prior.vae.decode(z0 / 0.7).sample)
    assert prior.decode(z0).shape == (2, 3, prior.image_size, prior.image_size) and prior.image_size == 16


def test_identity_is_of_the_files_not_of_the_place(prior_folder, tmp_path):
    copy = shutil.copytree(prior_folder, tmp_path / "elsewhere")
    identity = locate_prior(PriorSettings(path=str(copy))).identity
    assert identity["sha256"] == locate_prior(PriorSettings(path=str(prior_folder))).sha256
    assert identity["image_size"] == 16
    (copy / "scheduler" / "scheduler_config.json").write_text("{}")
    assert locate_prior(PriorSettings(path=str(copy))).sha256 != identity["sha256"]


def test_folders_that_are_no_prior_are_named(prior_folder, tmp_path):
    with pytest.raises(DataError, match="no model_index.json"):
        locate_prior(PriorSettings(path=str(tmp_path)))
    with pytest.raises(DataError, match="no such folder"):
        locate("./nowhere")
    with pytest.raises(UsageError, match="embedded:strokes32"):
        locate("embedded:nothing")
    copy = shutil.copytree(prior_folder, tmp_path / "broken")
    (copy / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(DataError, match="'FluxPipeline' is not supported"):
        locate_prior(PriorSettings(path=str(copy)))


def test_truncated_weights_are_a_data_error(prior_folder, tmp_path):
    copy = shutil.copytree(prior_folder, tmp_path / "cut")
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(DataError, match="cannot be loaded"):
        load_prior(PriorSettings(path=str(copy)), "cpu")
