"""Unconditional priors: latent (``LDMPipeline``) or in pixels (``DDPMPipeline``, ``DDIMPipeline``)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, UNet2DModel, VQModel
from torch import Tensor

from manifests.errors import DataError
from stages.synth.priors.diffusion import DiffusionPrior
from stages.synth.priors.families import FAMILIES
from stages.synth.priors.parts import load_part
from stages.synth.settings import PriorSettings


class FreePrior(DiffusionPrior):
    """No conditions at all, hence no CFG: the teacher alone decides what becomes of the noise."""

    def __init__(self, folder: str | Path, settings: PriorSettings, device: str) -> None:
        super().__init__(folder, settings.model_copy(update={"cfg": 1.0}), device)

    def load(self) -> tuple[Any, Any]:
        vae = FAMILIES[self.index["_class_name"]].vae
        unet = load_part(self, "unet", {"UNet2DModel": UNet2DModel})
        if unet.config.num_class_embeds or unet.config.class_embed_type:
            raise DataError(
                f"prior {self.folder}: its unet needs class labels, which {self.index['_class_name']} does not give it"
            )
        return unet, vae and load_part(self, vae, {"VQModel": VQModel, "AutoencoderKL": AutoencoderKL})

    def encode(self, conditions: Sequence[str]) -> None:
        return None

    def evaluate(self, latents: Tensor, time: Tensor, condition: None) -> Tensor:
        return self.network(latents, time).sample
