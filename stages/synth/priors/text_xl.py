"""Text-conditional latent prior with SDXL's components: two text encoders, a pooled embedding and the image size."""

from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from stages.synth.priors.parts import frozen, load_encoder, load_part, load_tokenizer
from stages.synth.priors.text import TextPrior, token_ids


class TextPriorXL(TextPrior):
    """A ``StableDiffusionXLPipeline``. A condition is one row: all token embeddings, then the pooled embedding."""

    def load(self) -> tuple[Any, Any]:
        encoders = (
            load_encoder(self, "text_encoder", CLIPTextModel),
            load_encoder(self, "text_encoder_2", CLIPTextModelWithProjection),
        )
        self.encoders = [frozen(encoder, self.device) for encoder in encoders]
        self.tokenizers = [load_tokenizer(self, f"tokenizer{n}", CLIPTokenizer) for n in ("", "_2")]
        self.zeros_for_empty = bool(self.index.get("force_zeros_for_empty_prompt", True))
        self.pooled = encoders[1].config.projection_dim
        side = self.image_size
        self.sizes = torch.tensor([[side, side, 0, 0, side, side]], device=self.device)
        vae = load_part(self, "vae", {"AutoencoderKL": AutoencoderKL})
        if self.settings.dtype == "fp16" and vae.config.force_upcast:
            vae.float()  # SDXL's own VAE overflows in half precision
        return self.load_unet(), vae

    def embed(self, prompt: str) -> Tensor:
        """``[1, tokens·d + pooled]``: both encoders' last but one layer, and what the second makes of the whole."""
        outputs = [
            encoder(token_ids(tokenizer, prompt).to(self.device), output_hidden_states=True)
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
        return self.network(latents, time, tokens, added_cond_kwargs=added).sample
