"""Text-conditional latent prior: Stable Diffusion's components, from a local diffusers folder or a hub id."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from stages.synth.diffusion import DTYPES, DiffusionPrior, frozen


class TextPrior(DiffusionPrior):
    """A ``StableDiffusionPipeline`` (VAE, UNet, text encoder, tokenizer); conditions are prompts."""

    def load(self) -> tuple[Any, Any]:
        pipeline = StableDiffusionPipeline.from_pretrained(
            str(self.folder),
            dtype=DTYPES[self.settings.dtype],
            variant=self.settings.variant,
            use_safetensors=True,
            safety_checker=None,
            requires_safety_checker=False,
        )
        self.text_encoder, self.tokenizer = frozen(pipeline.text_encoder, self.device), pipeline.tokenizer
        self._embeddings: dict[str, Tensor] = {}
        return pipeline.unet, pipeline.vae

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

    def evaluate(self, latents: Tensor, time: float, condition: Tensor) -> Tensor:
        return self.network(latents, time, condition).sample
