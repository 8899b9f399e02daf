import pytest
import torch

from tests.distill.drawn import write_dataset


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> str:
    """Path of the manifest of 48 drawn images of three classes, with their teacher."""
    return write_dataset(tmp_path_factory.mktemp("data") / "d")
