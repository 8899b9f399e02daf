"""Every kind of prior: Stable Diffusion, SDXL, DeepFloyd IF, unCLIP, DiT, LDM, DDPM; ``load_prior`` picks by folder."""

import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DDPMScheduler,
    DiTTransformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    T5EncoderModel,
    T5Tokenizer,
)

from manifests.errors import DataError, UsageError
from stages.memory import in_micro_batches
from stages.settings import PriorSettings
from stages.synth.priors.diffusion import DiffusionPrior
from stages.synth.priors.files import PriorSource, check_labels, locate_prior

log = logging.getLogger(__name__)


PROMPTS = 1024
"""Distinct prompts whose embeddings are kept; one of Stable Diffusion's takes 0.2 MB."""


class TextPrior(DiffusionPrior):
    """A ``StableDiffusionPipeline`` (VAE, UNet, text encoder, tokenizer); conditions are prompts."""

    def __init__(self, source: PriorSource, settings: PriorSettings, device: str) -> None:
        self.row = lru_cache(PROMPTS)(self.embed)  # a run has few distinct prompts: each is encoded once
        super().__init__(source, settings, device)

    def load(self) -> tuple[Any, Any]:
        self.tokenizer = self.tokens("tokenizer", CLIPTokenizer)
        self.encoders = [self.encoder("text_encoder", CLIPTextModel)]
        return self.load_unet(), self.part("vae", AutoencoderKL, AutoencoderDC)

    def load_unet(self) -> Any:
        """The UNet, once the encoders have encoded the negative prompt: tokenizer and encoder fit each other."""
        self.negative()
        unet = self.part("unet", UNet2DConditionModel)
        if unet.config.time_cond_proj_dim is not None and self.settings.distilled != "lcm":
            raise UsageError(f"prior {self.folder} takes the CFG scale as input, as LCMs do: set prior.distilled=lcm")
        return unet

    def embed(self, prompt: str) -> Tensor:
        """``[1, tokens, d]``. One at a time: an embedding must not depend on which others it was batched with."""
        return self.encoders[0](token_ids(self.tokenizer, prompt, self.encoders[0]).to(self.device))[0]

    def negative(self) -> Tensor:
        """The condition of the unconditional half, one row."""
        return self.row(self.settings.negative_prompt)

    @torch.no_grad()
    def encode(self, conditions: Sequence[str]) -> Tensor:
        """``[n, …]``, or ``[2n, …]`` with the negative prompt's half first where CFG is on."""
        embedded = torch.cat([self.row(prompt) for prompt in conditions])
        return torch.cat([self.negative().expand_as(embedded), embedded]) if self.two_halves else embedded

    def evaluate(self, latents: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        return self.network(latents, time, condition, timestep_cond=self.scale_embedding(latents)).sample

    def scale_embedding(self, latents: Tensor) -> Tensor | None:
        """Sinusoids ``[n, d]`` of w = cfg_scale − 1 for a network that was distilled with it as an input."""
        size = self.network.config.time_cond_proj_dim
        if size is None:
            return None
        w = torch.full((len(latents),), 1000 * (self.settings.cfg_scale - 1), device=latents.device)
        return get_timestep_embedding(w, size).to(latents.dtype)


def token_ids(tokenizer: Any, prompt: str, encoder: Any) -> Tensor:
    """``[1, tokens]``, padded to what tokenizer and text encoder take; longer prompts are cut."""
    length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)  # the former may be open: 1e30
    padded = tokenizer([prompt], padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return padded.input_ids


class TextPriorXL(TextPrior):
    """A ``StableDiffusionXLPipeline``: two text encoders, a pooled embedding, the image size.

    A condition is one row: all token embeddings, then the pooled embedding.
    """

    def load(self) -> tuple[Any, Any]:
        encoders = (
            self.encoder("text_encoder", CLIPTextModel),
            self.encoder("text_encoder_2", CLIPTextModelWithProjection),
        )
        self.encoders = encoders
        self.tokenizers = [self.tokens(f"tokenizer{n}", CLIPTokenizer) for n in ("", "_2")]
        self.zeros_for_empty = bool(self.index.get("force_zeros_for_empty_prompt", True))
        self.pooled = encoders[1].config.projection_dim
        side = self.image_size
        self.sizes = torch.tensor([[side, side, 0, 0, side, side]], device=self.device)
        vae = self.part("vae", AutoencoderKL)
        if self.settings.dtype == "fp16" and vae.config.force_upcast:
            vae.float()  # SDXL's own VAE overflows in half precision
        return self.load_unet(), vae

    def latent_statistics(self) -> tuple[Any, Any]:
        """Those of the VAE's configuration, if it has both."""
        values = [self.vae.config.get(name) for name in ("latents_mean", "latents_std")]
        if None in values:
            return super().latent_statistics()
        mean, std = (torch.tensor(value, dtype=torch.float32, device=self.device).view(1, -1, 1, 1) for value in values)
        channels = self.latent_shape[0]
        if not mean.shape[1] == std.shape[1] == channels or (
            self.device != "meta" and not (mean.isfinite().all() and std.isfinite().all() and std.min() > 0)
        ):
            raise DataError(
                f"prior {self.folder}: latents_mean {values[0]} and latents_std {values[1]} of its vae are not "
                f"{channels} finite numbers each, the latter above 0"
            )
        return mean, std

    def embed(self, prompt: str) -> Tensor:
        """``[1, tokens·d + pooled]``: both encoders' last but one layer, and what the second makes of the whole."""
        outputs = [
            encoder(token_ids(tokenizer, prompt, encoder).to(self.device), output_hidden_states=True)
            for encoder, tokenizer in zip(self.encoders, self.tokenizers, strict=True)
        ]
        tokens = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return torch.cat([tokens.flatten(1), outputs[1].text_embeds], dim=1)

    def negative(self) -> Tensor:
        embedded = super().negative()
        return torch.zeros_like(embedded) if self.zeros_for_empty and not self.settings.negative_prompt else embedded

    def evaluate(self, latents: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        n = len(latents)
        tokens, pooled = condition[:, : -self.pooled], condition[:, -self.pooled :]
        added = {"text_embeds": pooled, "time_ids": self.sizes.to(latents.dtype).expand(n, -1)}
        tokens = tokens.reshape(n, -1, self.network.config.cross_attention_dim)
        cfg = self.scale_embedding(latents)
        return self.network(latents, time, tokens, timestep_cond=cfg, added_cond_kwargs=added).sample


TOKENS = 77  # what the network was trained with; T5 itself has no limit


class TextPriorIF(TextPrior):
    """An ``IFPipeline``, the first stage of DeepFloyd IF (64 pixels; UNet, T5 encoder, no VAE).

    Its learned variance is dropped like any other.

    The pipeline also thresholds every predicted image, which keeps large guidance scales from saturating. Guidance by a
    teacher expects predictions to stay where it moves them, so nothing is thresholded: keep ``prior.cfg_scale`` small.
    """

    def load(self) -> tuple[Any, None]:
        self.tokenizer = self.tokens("tokenizer", T5Tokenizer)
        self.encoders = [self.encoder("text_encoder", T5EncoderModel)]
        return self.load_unet(), None

    def embed(self, prompt: str) -> Tensor:
        """``[1, tokens, d]``; padding is masked, prompts are lower case, as in training."""
        padded = self.tokenizer(
            [prompt.lower().strip()], padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
        ).to(self.device)
        mask = None if self.device == "meta" else padded.attention_mask  # T5 looks at its values, which meta has not
        embedded: Tensor = self.encoders[0](padded.input_ids, attention_mask=mask)[0]
        return embedded


class ImageEncoding(DiffusionPrior):
    """A pipeline with an image encoder: what a :class:`~stages.synth.priors.schedule.VariationPrior` embeds with."""

    processor: Any
    image_encoder: Any

    def load_image_encoder(self) -> None:
        """Raises DataError where the feature extractor makes pictures of another size than the encoder takes."""
        self.image_encoder = self.encoder("image_encoder", CLIPVisionModelWithProjection)
        self.encoders = [*self.encoders, self.image_encoder]
        self.source.config("feature_extractor", "preprocessor_config.json")
        self.processor = self.tokens("feature_extractor", CLIPImageProcessor)

    def check_widths(self, expected: int, what: str) -> None:
        """Raises DataError where the encoder's embedding is not as wide as the network expects it."""
        seen, width = self.processor.crop_size["height"], self.image_encoder.config.projection_dim
        if (seen, width) != (self.image_encoder.config.image_size, expected):
            raise DataError(
                f"prior {self.folder}: feature_extractor, image_encoder and unet do not belong together: "
                f"{seen} pixels for {self.image_encoder.config.image_size}, an embedding of {width} for "
                f"{expected}{what}"
            )

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
        def embed(pixels: Tensor) -> Tensor:
            embedded: Tensor = self.image_encoder(pixels).image_embeds
            return embedded

        pixels = self.pixels(images).to(self.image_encoder.dtype)
        embedded: Tensor = in_micro_batches(embed, self.batch_limit, pixels)
        return embedded.float()


class ImagePrior(ImageEncoding):
    """A ``StableDiffusionImageVariationPipeline`` (VAE, UNet, image encoder; no text), which draws variants of images
    alone. A condition is the image's embedding, the one token that the network attends to; zero in CFG's unconditional
    half."""

    def load(self) -> tuple[Any, Any]:
        self.load_image_encoder()
        unet, vae = self.part("unet", UNet2DConditionModel), self.part("vae", AutoencoderKL)
        self.check_widths(unet.config.cross_attention_dim, " in cross-attention")
        return unet, vae

    def encode(self, conditions: Sequence[str]) -> Tensor:
        """With the image left open."""
        return self.tokens_of(torch.zeros(len(conditions), self.network.config.cross_attention_dim, device=self.device))

    def encode_with(self, conditions: Sequence[str], embedded: Tensor, noise: Tensor, level: int) -> Tensor:
        """The network was trained on embeddings as they are, so there is no ``level`` but 0."""
        if level:
            raise UsageError(f"prior {self.folder} adds no noise to features: leave dda.noise_level at 0")
        return self.tokens_of(embedded)

    def tokens_of(self, embedded: Tensor) -> Tensor:
        """``[n, 1, d]``, or ``[2n, 1, d]`` with zeros first where CFG is on."""
        rows = embedded[:, None].to(self.network.dtype)
        return torch.cat([torch.zeros_like(rows), rows]) if self.two_halves else rows

    def evaluate(self, latents: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        return self.network(latents, time, condition).sample


class TextPriorUnclip(TextPrior, ImageEncoding):
    """A ``StableUnCLIPImg2ImgPipeline``. A condition is one row: all token embeddings, then the image's embedding and
    that of its noise level.

    :meth:`encode` leaves the image open: its part is zero, as in CFG's unconditional half. The network was trained with
    that in a quarter of its samples, so it is a text prior too.
    """

    def load(self) -> tuple[Any, Any]:
        unet, vae = super().load()
        self.load_image_encoder()
        normalizer = self.part("image_normalizer", StableUnCLIPImageNormalizer)
        self.mean, self.std = (part.detach().float().to(self.device) for part in (normalizer.mean, normalizer.std))
        noising = self.source.config("image_noising_scheduler", "scheduler_config.json")
        self.noising = DDPMScheduler.from_config(noising)
        both = unet.config.projection_class_embeddings_input_dim
        self.check_widths(both // 2, f", half of the network's {both}: the rest is the noise level's")
        return unet, vae

    def encode(self, conditions: Sequence[str]) -> Tensor:
        width = self.network.config.projection_class_embeddings_input_dim
        return self.rows(conditions, torch.zeros(len(conditions), width, device=self.device))

    def encode_with(self, conditions: Sequence[str], embedded: Tensor, noise: Tensor, level: int) -> Tensor:
        """Noise is added to normalized embeddings, as to images, at the step ``level`` of a schedule of its own."""
        levels = self.noising.config.num_train_timesteps
        if level >= levels:
            raise UsageError(f"prior {self.folder}: the noise level {level} is not below {levels}")
        times = torch.full((len(embedded),), level, device=self.device)
        noised = self.noising.add_noise((embedded - self.mean) / self.std, noise, times) * self.std + self.mean
        level_embedding = get_timestep_embedding(times, noised.shape[1], flip_sin_to_cos=True, downscale_freq_shift=0)
        return self.rows(conditions, torch.cat([noised, level_embedding], dim=1))

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


class ClassPrior(DiffusionPrior):
    """A ``DiTPipeline`` (VAE, transformer). Conditions are class names of the teacher, which ``prior.labels`` maps; the
    null class is the one after the last, as the config counts them.

    (The pipeline itself writes 1000 for it, whatever the network was trained on.)
    """

    def load(self) -> tuple[Any, Any]:
        transformer = self.part("transformer", DiTTransformer2DModel)
        return transformer, self.part("vae", AutoencoderKL, AutoencoderDC)

    def encode(self, conditions: Sequence[str]) -> Tensor:
        """Labels ``[n]``, or ``[2n]`` with the null classes first where CFG is on."""
        check_labels(self.settings, str(self.folder), self.classes, [*dict.fromkeys(conditions)])
        labels = torch.tensor([self.settings.labels[name] for name in conditions], device=self.device)
        return labels if self.settings.cfg_scale == 1 else torch.cat([torch.full_like(labels, self.classes), labels])

    def evaluate(self, latents: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        return self.network(latents, timestep=time.expand(len(latents)), class_labels=condition).sample


class FreePrior(DiffusionPrior):
    """An unconditional pipeline, latent (``LDMPipeline``) or in pixels (``DDPMPipeline``, ``DDIMPipeline``).

    No CFG: the teacher alone decides what becomes of the noise.
    """

    def __init__(self, source: PriorSource, settings: PriorSettings, device: str) -> None:
        super().__init__(source, settings.model_copy(update={"cfg_scale": 1.0}), device)

    def load(self) -> tuple[Any, Any]:
        vae = self.source.family.vae
        unet = self.part("unet", UNet2DModel)
        if unet.config.num_class_embeds or unet.config.class_embed_type:
            raise DataError(
                f"prior {self.folder}: its unet needs class labels, which {self.source.pipeline} does not give it"
            )
        return unet, vae and self.part(vae, VQModel, AutoencoderKL)

    def encode(self, conditions: Sequence[str]) -> None:
        return None

    def evaluate(self, latents: Tensor, time: Tensor, condition: None) -> Tensor:
        return self.network(latents, time).sample


KINDS: dict[str, type[DiffusionPrior]] = {
    "StableDiffusionPipeline": TextPrior,
    "LatentConsistencyModelPipeline": TextPrior,
    "StableDiffusionXLPipeline": TextPriorXL,
    "IFPipeline": TextPriorIF,
    "StableUnCLIPImg2ImgPipeline": TextPriorUnclip,
    "StableDiffusionImageVariationPipeline": ImagePrior,
    "DiTPipeline": ClassPrior,
    "LDMPipeline": FreePrior,
    "DDPMPipeline": FreePrior,
    "DDIMPipeline": FreePrior,
}


def load_prior(settings: PriorSettings, device: str, source: PriorSource | None = None) -> DiffusionPrior:
    """The prior on ``device``, frozen and in eval mode; ``source`` is where it is, if that is known already."""
    source = source or locate_prior(settings)
    if source.family.conditioning == "none" and settings.cfg_scale != 1:
        log.warning("prior %s is unconditional: prior.cfg_scale does not apply", settings.path)
    return KINDS[source.pipeline](source, settings, device)
