"""Class-conditional latent prior: a ``DiTPipeline`` folder (VAE, transformer). ``prior.labels`` maps the classes."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor

from stages.synth.priors.diffusion import DiffusionPrior
from stages.synth.priors.families import check_labels
from stages.synth.priors.parts import VAES, load_part


class ClassPrior(DiffusionPrior):
    """Conditions are class names of the teacher; the null class is the one after the last, as the config counts them.

    (The pipeline itself writes 1000 for it, whatever the network was trained on.)
    """

    def load(self) -> tuple[Any, Any]:
        transformer = load_part(self, "transformer", {"DiTTransformer2DModel": DiTTransformer2DModel})
        return transformer, load_part(self, "vae", VAES)

    def encode(self, conditions: Sequence[str]) -> Tensor:
        """Labels ``[n]``, or ``[2n]`` with the null classes first where CFG is on."""
        check_labels(self.settings, str(self.folder), self.classes, [*dict.fromkeys(conditions)])
        labels = torch.tensor([self.settings.labels[name] for name in conditions], device=self.device)
        return labels if self.settings.cfg == 1 else torch.cat([torch.full_like(labels, self.classes), labels])

    def evaluate(self, latents: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        return self.network(latents, timestep=time.expand(len(latents)), class_labels=condition).sample
