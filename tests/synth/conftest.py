import pytest
import torch

from stages.settings import PriorSettings
from stages.synth import decoders
from stages.synth.priors.kinds import load_prior
from tests.synth.tiny import save_stable_diffusion


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def quick_fit(monkeypatch, tmp_path):
    """Decoders are fitted badly but soon, in a cache of the test's own."""
    monkeypatch.setenv("FACTORY_CACHE", str(tmp_path / "cache"))
    for name, value in {"STEPS": 20, "VISITS": 2, "BATCH": 16, "ROWS": 1}.items():
        monkeypatch.setattr(decoders, name, value)


@pytest.fixture(scope="session", params=["epsilon", "v_prediction", "sample"])
def any_prior(request, tmp_path_factory):
    """A tiny prior of each prediction type, five steps, CFG 2."""
    folder = save_stable_diffusion(tmp_path_factory.mktemp(request.param) / "prior", request.param)
    return load_prior(PriorSettings(path=str(folder), steps=5, cfg_scale=2.0), "cpu")


@pytest.fixture(scope="session")
def prior_folder(tmp_path_factory):
    return save_stable_diffusion(tmp_path_factory.mktemp("sd") / "prior")


@pytest.fixture(scope="session")
def prior(prior_folder):
    return load_prior(PriorSettings(path=str(prior_folder), steps=6, cfg_scale=1.0), "cpu")
