"""The diffusion prior as synthesis sees it: predict, move, mix, step, decode. One network evaluation per step.

``State`` is the group at one denoising step; families of priors (latent text-conditional, ...) implement ``Prior``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class State:
    """``n`` latents at denoising step ``step``; ``output`` and ``z0`` are set by :meth:`Prior.predict`."""

    z: Tensor  # [n, c, h, w] at the step's noise level
    step: int
    output: Tensor | None = None  # the network's output after classifier-free guidance, in the prior's own prediction type
    z0: Tensor | None = None  # predicted clean latent

    def detached(self) -> "State":
        """The same numbers without a graph."""
        assert self.output is not None and self.z0 is not None
        return State(self.z.detach(), self.step, self.output.detach(), self.z0.detach())

    def mixed(self, partner: Tensor, mask: Tensor) -> "State":
        """Latents, outputs and predictions of ``partner [n]`` pasted where ``mask [n, 1, h, w]`` is set.

        All three together: pasting z alone and stepping with the old eps would shift the box by (σ/α)(eps' − eps).
        """
        paste = {
            name: torch.where(mask, value[partner], value)
            for name, value in (("z", self.z), ("output", self.output), ("z0", self.z0))
            if value is not None
        }
        return replace(self, **paste)


class Prior(Protocol):
    """A pre-trained diffusion model and the schedule it is sampled with."""

    image_size: int
    latent_shape: tuple[int, int, int]
    conditioning: str  # "text" | "class" | "none"
    timesteps: Sequence[int]  # the schedule, noisiest first

    def encode(self, conditions: Sequence[str]) -> Any:
        """Network conditioning for ``n`` prompts (negative prompt included where CFG needs it)."""

    def predict(self, state: State, condition: Any) -> State:
        """Fill ``output`` and ``z0`` by one evaluation. Differentiable in ``state.z`` where gradients are enabled."""

    def levels(self, step: int) -> tuple[float, float]:
        """(α, σ) of the step: z = α·z0 + σ·eps."""

    def move(self, state: State, delta: Tensor) -> State:
        """Shift ẑ0 by ``delta`` and keep eps."""

    def step(self, state: State) -> State:
        """One step of the scheduler, from what ``predict`` (and ``move``) left."""

    def decode(self, z0: Tensor) -> Tensor:
        """Clean latents to images ``[n, 3, image_size, image_size]`` in [−1, 1] (unclamped). Differentiable."""
