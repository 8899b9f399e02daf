"""An autoencoder for 32×32 images that begins as a PCA of 4×4 patches, exactly, and is trained on from there."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC
from torch import Tensor

PATCH, CHANNELS = 4, 12
CONSTANT, OFFSET = 30.0, 4.0  # what keeps the decoder's last RMSNorm and ReLU linear at the start


@dataclass(frozen=True)
class PatchPCA:
    """The linear yardstick: 4×4 patches on their first 12 principal components."""

    basis: Tensor  # [12, 48], rows orthonormal
    scale: Tensor  # [12]: codes are divided by √std, a compromise between pixel space and whitening; mean variance 1
    bias: Tensor  # [48], the mean patch, ordered (channel, row, column)
    unexplained: float  # share of the pixel variance outside the basis

    @classmethod
    def fit(cls, x: Tensor) -> "PatchPCA":
        """From images ``[n, 3, h, w]`` in [-1, 1]."""
        patches = F.unfold(x, PATCH, stride=PATCH).transpose(1, 2).reshape(-1, 3 * PATCH**2).double()
        bias = patches.mean(0)
        values, vectors = torch.linalg.eigh(torch.cov((patches - bias).T))
        values, vectors = values.flip(0), vectors.flip(1)
        deviations = values[:CHANNELS] ** 0.5
        scale = (deviations * deviations.mean()) ** 0.5
        rest = values[CHANNELS:].sum() / (3 * PATCH**2 * x.double().var())
        return cls(vectors[:, :CHANNELS].T.float(), scale.float(), bias.float(), rest.item())

    def codes(self, x: Tensor) -> Tensor:
        """``[n, 12, h/4, w/4]``."""
        kernel = (self.basis / self.scale[:, None]).to(x.device)
        return F.conv2d(x, kernel.view(CHANNELS, 3, PATCH, PATCH), -kernel @ self.bias.to(x.device), stride=PATCH)


def build_codec(pca: PatchPCA, encoder: int, decoder: int) -> AutoencoderDC:
    """Deep-compression autoencoder (Chen et al. 2024): no work at full resolution, lossless pixel-shuffle shortcuts.

    ``encoder`` and ``decoder`` are the widths at half resolution (four times that at the latents').
    """
    codec = AutoencoderDC(
        latent_channels=CHANNELS,
        encoder_block_out_channels=(encoder, encoder, 4 * encoder),
        decoder_block_out_channels=(decoder, decoder, 4 * decoder),
        encoder_layers_per_block=(0, 1, 1),
        decoder_layers_per_block=(0, 2, 2),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        encoder_out_shortcut=False,
        decoder_in_shortcut=False,
    )
    codec.register_to_config(block_out_channels=[decoder, decoder, 4 * decoder])  # Stable Diffusion's name for it
    for name, parameter in codec.named_parameters():
        if name.endswith(("norm.weight", "norm.bias")):
            torch.nn.init.zeros_(parameter)  # residual branches begin at zero
    set_to_pca(codec, pca)
    return codec


def shuffled_order() -> Tensor:
    """``[48]``: where pixel ``(channel, row, column)`` of a patch stands after two rounds of pixel-unshuffle."""
    index = torch.arange(3 * PATCH**2).view(1, 3, PATCH, PATCH).float()
    return F.pixel_unshuffle(F.pixel_unshuffle(index, 2), 2).flatten().long()


@torch.no_grad()
def set_to_pca(codec: AutoencoderDC, pca: PatchPCA) -> None:
    """First channels carry the pixels, the shortcuts move them, the convolutions at the latents are the PCA."""
    encoder, decoder, order = codec.encoder, codec.decoder, shuffled_order()
    pixels = len(order)

    first = encoder.conv_in.conv
    first.weight[:3], first.bias[:3] = 0, 0
    first.weight[range(3), range(3), 1, 1] = 1
    for block in (encoder.down_blocks[1][-1], decoder.up_blocks[1][0]):  # all but their lossless shortcuts
        block.conv.weight.zero_()
        block.conv.bias.zero_()
    project = (pca.basis / pca.scale[:, None])[:, order]
    encoder.conv_out.weight.zero_()
    encoder.conv_out.weight[:, :pixels, 1, 1] = project
    encoder.conv_out.bias.copy_(-project @ pca.bias[order])

    decoder.conv_in.weight[:pixels], decoder.conv_in.weight[-4:] = 0, 0
    decoder.conv_in.weight[:pixels, :, 1, 1] = (pca.basis * pca.scale[:, None]).T[order]
    decoder.conv_in.bias[:pixels], decoder.conv_in.bias[-4:] = pca.bias[order], CONSTANT
    width = len(decoder.norm_out.weight)
    decoder.norm_out.weight.fill_(CONSTANT / width**0.5)
    decoder.norm_out.bias[: 3 * 4] = OFFSET
    last = decoder.conv_out.conv
    last.weight.zero_()
    last.weight[range(12), range(12), 1, 1] = 1
    last.bias.fill_(-OFFSET)


@torch.no_grad()
def unexplained(codec: AutoencoderDC, images: Tensor) -> float:
    """Share of the pixel variance of images ``[n, 3, h, w]`` in [-1, 1] that encoding and decoding loses."""
    lost = sum(F.mse_loss(codec.decode(codec.encode(x).latent).sample, x, reduction="sum") for x in images.split(250))
    return (lost / images.numel() / images.var()).item()
