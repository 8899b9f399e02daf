"""Text-conditional latent prior: Stable Diffusion's components, from a local diffusers folder or a hub id."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from transformers.utils import logging as transformers_logging

from manifests.errors import DataError
from stages.synth.attention import use_attention
from stages.synth.prior import Prediction, State
from stages.synth.schedule import Schedule
from stages.synth.settings import PriorSettings

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TextPrior:
    """:class:`~stages.synth.prior.Prior` over a ``StableDiffusionPipeline`` (VAE, UNet, text encoder, tokenizer).

    Raises :class:`DataError` where a component is missing, damaged or of a kind that cannot be guided.
    """

    conditioning = "text"

    def __init__(self, source: str | Path, settings: PriorSettings, device: str) -> None:
        for library in (diffusers_logging, transformers_logging):
            library.disable_progress_bar()  # progress is shown in images
        try:
            pipeline = StableDiffusionPipeline.from_pretrained(
                str(source),
                dtype=DTYPES[settings.dtype],
                variant=settings.variant,
                use_safetensors=True,
                safety_checker=None,
                requires_safety_checker=False,
            )
        except Exception as error:  # diffusers raises a dozen kinds for a damaged folder
            detail = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(f"prior {source} cannot be loaded: {detail}") from error
        self.settings, self.device = settings, device
        self.vae, self.unet = pipeline.vae.to(device).eval(), pipeline.unet.to(device).eval()
        self.text_encoder, self.tokenizer = pipeline.text_encoder.to(device).eval(), pipeline.tokenizer
        for network in (self.vae, self.unet, self.text_encoder):
            network.requires_grad_(False)
        if settings.vae_slicing:
            self.vae.enable_slicing()
        self.attention = use_attention((self.unet, self.vae), settings.attention, device)

        config = json.loads((Path(source) / "scheduler" / "scheduler_config.json").read_text())
        self.schedule = Schedule(config, settings.scheduler, settings.steps, str(source))
        self.timesteps, self.stochastic = self.schedule.timesteps, self.schedule.stochastic
        side = self.unet.config.sample_size
        self.latent_shape = (self.unet.config.in_channels, side, side)
        self.image_size = side * 2 ** (len(self.vae.config.block_out_channels) - 1)
        self._embeddings: dict[str, Tensor] = {}

    def _embed(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings ``[n, tokens, d]``; each distinct prompt is encoded once."""
        new = list(dict.fromkeys(p for p in prompts if p not in self._embeddings))
        if new:
            tokens = self.tokenizer(
                new,
                padding="max_length",
                max_length=self.tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            # One at a time: a prompt's embedding must not depend on which others it was batched with.
            for prompt, ids in zip(new, tokens, strict=True):
                self._embeddings[prompt] = self.text_encoder(ids[None].to(self.device))[0]
        return torch.cat([self._embeddings[p] for p in prompts])

    @torch.no_grad()
    def encode(self, conditions: Sequence[str]) -> Tensor:
        """``[n, tokens, d]``, or ``[2n, tokens, d]`` with the negative prompt's half first where CFG is on."""
        embedded = self._embed(conditions)
        if self.settings.cfg == 1:
            return embedded
        return torch.cat([self._embed([self.settings.negative_prompt]).expand_as(embedded), embedded])

    def start(self, noise: Tensor) -> State:
        return self.schedule.start(noise)

    def levels(self, step: int) -> tuple[float, float]:
        return self.schedule.levels[step]

    def predict(self, state: State, condition: Tensor) -> Prediction:
        z, scale = self.schedule.network_input(state), self.settings.cfg
        batch = z if scale == 1 else torch.cat([z, z])
        output = self.unet(batch.to(self.unet.dtype), self.schedule.times[state.step], condition).sample.float()
        if scale != 1:  # equation 3, with the scale counted from the unconditional prediction
            negative, positive = output.chunk(2)
            output = negative + scale * (positive - negative)
        return self.schedule.prediction(state, output)

    def move(self, state: Prediction, delta: Tensor) -> Prediction:
        return self.schedule.move(state, delta)

    def step(self, state: Prediction, rngs: Sequence[torch.Generator] | None = None) -> State:
        return self.schedule.step(state, rngs)

    def decode(self, z0: Tensor) -> Tensor:
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        latents = z0 / self.vae.config.scaling_factor + shift
        return self.vae.decode(latents.to(self.vae.dtype)).sample.float()
