"""Through what guidance sees ẑ0: the prior's own decoder, a tiny autoencoder, or a map that the factory fits itself.

Images that are stored never pass here.
"""

import logging
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import Tensor

from manifests.errors import DataError, UsageError
from manifests.storage import Storage
from stages.micro_batches import in_micro_batches
from stages.models.inputs import resized
from stages.models.teacher import Teacher
from stages.synth.fitted_decoder import conditions, draw_latents, fitted_decoder, pull_back
from stages.synth.priors.diffusion import DiffusionPrior
from stages.synth.priors.families import tiny_decoder
from stages.synth.priors.parts import DTYPES, frozen, load_network
from stages.synth.priors.prior import Prior
from stages.synth.sampler import Decode, Guide
from stages.synth.settings import GuidanceSettings, SynthSettings

log = logging.getLogger(__name__)
POOR = 0.5
"""Below this cosine a decoder's gradient is hardly the full decoder's: worth a warning."""


def load_decoder(
    prior: DiffusionPrior, settings: SynthSettings, teacher: Teacher, run: Storage | None = None
) -> Decode | None:
    """The decoder that ``settings`` ask for, None for the prior's own. A fitted one is shared by way of ``run``.

    Raises UsageError where a tiny one is asked for and the prior works on pixels.
    """
    kind = settings.guidance.decoder
    if kind == "tiny":
        if prior.vae is None:
            raise UsageError(f"prior {prior.folder} works on pixels: there is no decoder to replace")
        return TinyDecoder(prior, settings.guidance)
    if kind == "full" or prior.vae is None:  # a prior of pixels is guided on its pixels
        return None
    size = min(teacher.input.size, prior.image_size)
    return fitted_decoder(prior, settings, teacher.class_names, size, teacher.input.settings.resize, run)


def fidelity(decode: Decode, prior: Prior, settings: SynthSettings, teacher: Teacher) -> dict[str, float]:
    """How well ``decode`` stands in for the prior's own decoder, on latents that neither was fitted to.

    ``pixel_error``: share of the pixels' variance at the teacher's size that is lost; ``gradient_cosine``: of the
    guidance gradients of both, through this teacher, mean over latents.
    """
    wanted = conditions(prior, settings, teacher.class_names, 8)
    latents = draw_latents(prior, wanted, 4, seed=1)
    labels = torch.arange(len(latents), device=prior.device) % teacher.num_classes
    guide = Guide(settings.guidance, teacher, labels)
    size, rule = min(teacher.input.size, prior.image_size), teacher.input.settings.resize
    (made, slope), (wished, slope_wished) = (guidance_gradient(d, latents, guide) for d in (decode, prior.decode))
    error = (resized(made, size, rule) - (full := resized(wished, size, rule))).square().mean() / full.var()
    cosine = F.cosine_similarity(slope.flatten(1), slope_wished.flatten(1)).mean()
    if not cosine >= POOR:  # NaN neither
        kind = settings.guidance.decoder
        log.warning("guidance.decoder=%s: its gradients have a cosine of %.2f with the full decoder's", kind, cosine)
    return {"pixel_error": round(error.item(), 4), "gradient_cosine": round(cosine.item(), 4)}


def guidance_gradient(decode: Decode, latents: Tensor, guide: Guide) -> tuple[Tensor, Tensor]:
    """Images of ``latents`` and the gradient of the guidance loss in them, decoded a few at a time."""
    with torch.no_grad():
        images = torch.cat([decode(latent) for latent in latents.split(1)])
    with torch.enable_grad():
        losses = guide.losses(images.requires_grad_(), torch.Generator())
        (cotangents,) = torch.autograd.grad(losses.total(guide.settings), images)
    return pull_back(decode, latents, cotangents)


class TinyDecoder:
    """An ``AutoencoderTiny`` (TAESD) in the prior's dtype: a few convolutions that imitate the prior's VAE.

    It takes latents as the denoiser knows them (scaled). Raises DataError where it is damaged or of another prior.
    """

    def __init__(self, prior: DiffusionPrior, settings: GuidanceSettings) -> None:
        folder = tiny_decoder(prior.settings, settings.tiny_decoder)
        self.prior, self.dtype = prior, DTYPES[prior.settings.dtype]
        try:
            loaded: Any = load_network(AutoencoderTiny, folder, self.dtype, prior.device)
        except DataError:
            raise
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
