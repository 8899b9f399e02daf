"""Prior conditioned on prompts and on a CLIP embedding of an image: Stable unCLIP, which makes variants of images."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from manifests.errors import DataError, UsageError
from stages.micro_batches import in_micro_batches
from stages.synth.priors.parts import frozen, load_encoder, load_part
from stages.synth.priors.text import TextPrior


class TextPriorUnclip(TextPrior):
    """A ``StableUnCLIPImg2ImgPipeline``. A condition is one row: all token embeddings, then the image's embedding and
    that of its noise level.

    :meth:`encode` leaves the image open: its part is zero, as in CFG's unconditional half. The network was trained with
    that in a quarter of its samples, so it is a text prior too.
    """

    def load(self) -> tuple[Any, Any]:
        unet, vae = super().load()
        encoder = frozen(load_encoder(self, "image_encoder", CLIPVisionModelWithProjection), self.device)
        self.encoders = [*self.encoders, encoder]
        normalizer = load_part(self, "image_normalizer", {"StableUnCLIPImageNormalizer": StableUnCLIPImageNormalizer})
        self.mean, self.std = (part.detach().float().to(self.device) for part in (normalizer.mean, normalizer.std))
        self.noising = DDPMScheduler.from_pretrained(str(self.folder), subfolder="image_noising_scheduler")
        self.processor = CLIPImageProcessor.from_pretrained(
            str(self.folder), subfolder="feature_extractor", local_files_only=True
        )
        seen = (self.processor.crop_size["height"], 2 * encoder.config.projection_dim)
        if seen != (encoder.config.image_size, unet.config.projection_class_embeddings_input_dim):
            raise DataError(
                f"prior {self.folder}: feature_extractor, image_encoder and unet do not belong together: "
                f"{seen[0]} pixels for {encoder.config.image_size}, an embedding of {seen[1]} (half of it the noise "
                f"level's) for {unet.config.projection_class_embeddings_input_dim}"
            )
        return unet, vae

    def pixels(self, images: Tensor) -> Tensor:
        """Images ``[n, 3, side, side]`` in [−1, 1] as the feature extractor hands them to the encoder."""
        side, crop = self.processor.size["shortest_edge"], self.processor.crop_size["height"]
        unit = (images.clamp(-1, 1) + 1) / 2
        unit = F.interpolate(unit, size=(side, side), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        edge = (side - crop) // 2
        unit = unit[..., edge : edge + crop, edge : edge + crop]
        mean, std = (
            torch.tensor(values, device=images.device).view(3, 1, 1)
            for values in (self.processor.image_mean, self.processor.image_std)
        )
        return (unit - mean) / std

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        encoder = self.encoders[1]

        def embed(pixels: Tensor) -> Tensor:
            embedded: Tensor = encoder(pixels).image_embeds
            return embedded

        embedded: Tensor = in_micro_batches(embed, self.batch_limit, self.pixels(images).to(encoder.dtype))
        return embedded.float()

    def encode(self, conditions: Sequence[str]) -> Tensor:
        width = self.network.config.projection_class_embeddings_input_dim
        return self.rows(conditions, torch.zeros(len(conditions), width, device=self.device))

    def encode_with(self, conditions: Sequence[str], embedded: Tensor, noise: Tensor, level: int) -> Tensor:
        """Noise is added to normalised embeddings, as to images, at the step ``level`` of a schedule of its own."""
        levels = self.noising.config.num_train_timesteps
        if level >= levels:
            raise UsageError(f"prior {self.folder}: the noise level {level} is not below {levels}")
        times = torch.full((len(embedded),), level, device=self.device)
        noised = self.noising.add_noise((embedded - self.mean) / self.std, noise, times) * self.std + self.mean
        told = get_timestep_embedding(times, noised.shape[1], flip_sin_to_cos=True, downscale_freq_shift=0)
        return self.rows(conditions, torch.cat([noised, told], dim=1))

    def rows(self, conditions: Sequence[str], images: Tensor) -> Tensor:
        """Prompts with the image part ``[n, 2·d]``, zero in the unconditional half."""
        tokens = super().encode(conditions).flatten(1)
        if len(tokens) > len(images):
            images = torch.cat([torch.zeros_like(images), images])
        return torch.cat([tokens, images.to(tokens.dtype)], dim=1)

    def evaluate(self, latents: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        config = self.network.config
        images = condition[:, -config.projection_class_embeddings_input_dim :]
        tokens = condition[:, : -config.projection_class_embeddings_input_dim]
        tokens = tokens.reshape(len(latents), -1, config.cross_attention_dim)
        return self.network(latents, time, tokens, class_labels=images).sample
