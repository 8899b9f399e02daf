"""The prior of photographs that lies beside the packages, not in the wheel: it loads, and words change its pictures."""

from pathlib import Path

import pytest

from stages.settings import PriorSettings
from stages.synth.group import Group
from stages.synth.priors.kinds import load_prior
from stages.synth.sampler import denoise

FOLDER = Path(__file__).resolve().parents[3] / "priors" / "natural32"
pytestmark = pytest.mark.skipif(not (FOLDER / "model_index.json").exists(), reason=f"no prior at {FOLDER}")


@pytest.fixture(scope="module")
def prior():
    return load_prior(PriorSettings(path=str(FOLDER), steps=10, cfg_scale=2.0), "cpu")


def drawn(prior, prompt, n=12):
    group = Group(0, tuple(range(n)), (0,) * n, (prompt,) * n)
    *_, frame = denoise(prior, group, 0)
    return frame.images.clamp(-1, 1)


def test_it_draws_32_pixel_photographs_from_12_latent_channels(prior):
    assert prior.latent_shape == (12, 8, 8) and prior.image_size == 32 and prior.conditioning == "text"
    images = drawn(prior, "a photo of a dog")
    assert images.shape == (12, 3, 32, 32) and 0.2 < images.std().item() < 0.8
    near = (images[..., 1:] * images[..., :-1]).mean() / images.square().mean()
    assert near.item() > 0.8  # neighbors agree as in photographs; noise has 0


def test_words_change_the_picture(prior):
    """The same noise: seas are bluer than lions."""
    blue = [(x[:, 2] - x[:, 0]).mean().item() for x in (drawn(prior, "seashore"), drawn(prior, "lion"))]
    assert blue[0] > blue[1] + 0.1


def test_the_weights_stay_small():
    assert sum(file.stat().st_size for file in FOLDER.rglob("*.safetensors")) <= 25e6
