"""The patch codec begins as the PCA of 4×4 patches, exactly."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from patch_codec import CHANNELS, PatchPCA, build_codec, unexplained


@pytest.fixture(scope="module")
def images():
    """Smooth random pictures in [-1, 1]: a few frequencies dominate, so a PCA has something to find."""
    coarse = torch.rand(64, 3, 9, 9, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bicubic").clamp(-1, 1)


def test_the_yardstick_is_what_twelve_components_leave(images):
    pca = PatchPCA.fit(images)
    codes = pca.codes(images)
    assert codes.shape == (64, CHANNELS, 8, 8)
    patches = torch.nn.functional.unfold(images, 4, stride=4)  # [n, 48, 64]
    back = torch.einsum("kp,nkl->npl", pca.basis * pca.scale[:, None], codes.flatten(2)) + pca.bias[:, None]
    assert ((back - patches).pow(2).mean() / images.var()).item() == pytest.approx(pca.unexplained, rel=1e-3)
    assert codes.var(dim=(0, 2, 3)).mean().item() == pytest.approx(1, rel=0.01)


def test_before_training_the_codec_is_that_pca(images):
    pca = PatchPCA.fit(images)
    codec = build_codec(pca, encoder=16, decoder=24)
    torch.testing.assert_close(codec.encode(images).latent, pca.codes(images), atol=1e-4, rtol=1e-4)
    # the decoder ends in RMSNorm and ReLU: linear to within half a per cent of the variance
    assert unexplained(codec, images) == pytest.approx(pca.unexplained, abs=0.005)
