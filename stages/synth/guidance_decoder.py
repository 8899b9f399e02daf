"""Through what guidance sees ẑ0: the prior's own VAE or a tiny autoencoder. Images that are stored never pass here."""

from typing import Any

import torch
from diffusers import AutoencoderTiny
from torch import Tensor

from manifests.errors import DataError
from stages.micro_batches import in_micro_batches
from stages.synth.diffusion import DTYPES, DiffusionPrior, frozen, load_network
from stages.synth.priors import tiny_decoder
from stages.synth.sampler import Decode
from stages.synth.settings import GuidanceSettings


def load_decoder(prior: DiffusionPrior, settings: GuidanceSettings) -> Decode | None:
    """The decoder that ``settings`` ask for; None is the prior's own."""
    return TinyDecoder(prior, settings) if settings.decoder == "tiny" else None


class TinyDecoder:
    """An ``AutoencoderTiny`` (TAESD) in the prior's dtype: a few convolutions that imitate the prior's VAE.

    It takes latents as the denoiser knows them (scaled). Raises DataError where it is damaged or of another prior.
    """

    def __init__(self, prior: DiffusionPrior, settings: GuidanceSettings) -> None:
        folder = tiny_decoder(prior.settings, settings.tiny_decoder)
        self.prior, self.dtype = prior, DTYPES[prior.settings.dtype]
        try:
            loaded: Any = load_network(AutoencoderTiny, folder, self.dtype, prior.device)
        except Exception as error:  # diffusers raises a dozen kinds for a damaged folder
            detail = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(f"tiny decoder {folder} cannot be loaded: {detail}") from error
        self.network = frozen(loaded, prior.device)
        channels, wanted = self.network.config.latent_channels, prior.latent_shape[0]
        if channels != wanted:
            raise DataError(f"tiny decoder {folder} takes {channels} channels, the prior's latents have {wanted}")
        with torch.no_grad():
            side = self(torch.zeros(1, *prior.latent_shape, device=prior.device)).shape[-1]
        if side != prior.image_size:
            raise DataError(
                f"tiny decoder {folder} makes {side} pixels, the prior {prior.image_size}: not of this prior"
            )

    def __call__(self, z0: Tensor) -> Tensor:
        images: Tensor = in_micro_batches(self._decode, self.prior.batch_limit, z0.to(self.dtype)).float()
        return images

    def _decode(self, latents: Tensor) -> Tensor:
        images: Tensor = self.network.decode(latents).sample
        return images
