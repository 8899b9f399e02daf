"""The diffusion prior as synthesis sees it: predict, move, mix, step, decode. One network evaluation per step.

``State`` and ``Prediction`` are the group at one denoising step; each family of priors implements ``Prior``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class State:
    """``n`` latents ``z [n, c, h, w]`` at the noise level of denoising step ``step``."""

    z: Tensor
    step: int

    def mixed(self, partner: Tensor, mask: Tensor) -> "State":
        """Latents of ``partner [n]`` pasted where ``mask [n, 1, h, w]`` is set."""
        return State(torch.where(mask, self.z[partner], self.z), self.step)


@dataclass(frozen=True)
class Prediction(State):
    """A state that the network has seen."""

    output: Tensor  # of the network after CFG, in the prior's own prediction type
    z0: Tensor  # predicted clean latents

    def detached(self) -> "Prediction":
        """The same numbers without a graph."""
        return Prediction(self.z.detach(), self.step, self.output.detach(), self.z0.detach())

    def mixed(self, partner: Tensor, mask: Tensor) -> "Prediction":
        """Latents, outputs and predictions of the partner pasted together (equation 11).

        Pasting z alone and stepping with the old eps would shift the box by (σ/α)(eps' − eps).
        """
        z, output, z0 = (torch.where(mask, x[partner], x) for x in (self.z, self.output, self.z0))
        return Prediction(z, self.step, output, z0)


class Prior(Protocol):
    """A pre-trained diffusion model and the schedule it is sampled with."""

    image_size: int
    latent_shape: tuple[int, int, int]
    conditioning: str  # "text" | "class" | "none"
    timesteps: list[int]  # the schedule, noisiest first

    def encode(self, conditions: Sequence[str]) -> Any:
        """Network conditioning for ``n`` prompts (negative prompt included where CFG needs it)."""

    def predict(self, state: State, condition: Any) -> Prediction:
        """One evaluation of the network. Differentiable in ``state.z`` where gradients are enabled."""

    def levels(self, step: int) -> tuple[float, float]:
        """(α, σ) of the step: z = α·z0 + σ·eps."""

    def move(self, state: Prediction, delta: Tensor) -> Prediction:
        """Shift ẑ0 by ``delta`` and keep eps."""

    def step(self, state: Prediction) -> State:
        """One step of the scheduler, from what ``predict`` (and ``move``) left."""

    def decode(self, z0: Tensor) -> Tensor:
        """Clean latents to images ``[n, 3, image_size, image_size]`` in [−1, 1] (unclamped). Differentiable."""
