"""Text-conditional latent prior: Stable Diffusion's components, from a local diffusers folder or a hub id."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from stages.synth.priors.diffusion import DiffusionPrior
from stages.synth.priors.parts import VAES, frozen, load_encoder, load_part, load_tokenizer
from stages.synth.settings import PriorSettings

PROMPTS = 1024
"""Distinct prompts whose embeddings are kept; one of Stable Diffusion's takes 0.2 MB."""


class TextPrior(DiffusionPrior):
    """A ``StableDiffusionPipeline`` (VAE, UNet, text encoder, tokenizer); conditions are prompts."""

    def __init__(self, folder: str | Path, settings: PriorSettings, device: str) -> None:
        self.row = lru_cache(PROMPTS)(self.embed)  # a run has few distinct prompts: each is encoded once
        super().__init__(folder, settings, device)

    def load(self) -> tuple[Any, Any]:
        self.tokenizer = load_tokenizer(self, "tokenizer", CLIPTokenizer)
        self.encoders = [frozen(load_encoder(self, "text_encoder", CLIPTextModel), self.device)]
        return self.load_unet(), load_part(self, "vae", VAES)

    def load_unet(self) -> Any:
        return load_part(self, "unet", {"UNet2DConditionModel": UNet2DConditionModel})

    def embed(self, prompt: str) -> Tensor:
        """``[1, tokens, d]``. One at a time: an embedding must not depend on which others it was batched with."""
        return self.encoders[0](token_ids(self.tokenizer, prompt).to(self.device))[0]

    def negative(self) -> Tensor:
        """The condition of the unconditional half, one row."""
        return self.row(self.settings.negative_prompt)

    @torch.no_grad()
    def encode(self, conditions: Sequence[str]) -> Tensor:
        """``[n, …]``, or ``[2n, …]`` with the negative prompt's half first where CFG is on."""
        embedded = torch.cat([self.row(prompt) for prompt in conditions])
        return embedded if self.settings.cfg == 1 else torch.cat([self.negative().expand_as(embedded), embedded])

    def evaluate(self, latents: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        return self.network(latents, time, condition).sample


def token_ids(tokenizer: Any, prompt: str) -> Tensor:
    """``[1, tokens]``, padded to what the text encoder takes; longer prompts are cut."""
    length = tokenizer.model_max_length
    padded = tokenizer([prompt], padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return padded.input_ids
