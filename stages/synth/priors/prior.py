"""The diffusion prior as synthesis sees it: predict, move, mix, step, decode. One network evaluation per step.

``State`` and ``Prediction`` are the group at one denoising step; each family of priors implements ``Prior``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True)
class State:
    """``n`` latents ``z [n, c, h, w]`` at the noise level of denoising step ``step``."""

    z: Tensor
    step: int
    before: Tensor | None = field(default=None, kw_only=True)  # a multistep solver's memory: ẑ0 of the step before

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "State":
        """Every tensor of the state, the solver's memory too, through the same linear ``change`` of latents."""
        return State(change(self.z), self.step, before=None if self.before is None else change(self.before))


@dataclass(frozen=True)
class Prediction(State):
    """A state that the network has seen."""

    output: Tensor  # of the network after CFG, in the prior's own prediction type
    z0: Tensor  # predicted clean latents

    def detached(self) -> "Prediction":
        """The same numbers without a graph."""
        before = None if self.before is None else self.before.detach()
        return Prediction(self.z.detach(), self.step, self.output.detach(), self.z0.detach(), before=before)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Prediction":
        """Latents, output, prediction and memory together.

        Changing z alone and stepping with the old eps would shift what came from elsewhere by (σ/α)(eps' − eps).
        """
        new = super().mapped(change)
        return Prediction(new.z, self.step, change(self.output), change(self.z0), before=new.before)


class Prior(Protocol):
    """A pre-trained diffusion model and the schedule it is sampled with."""

    image_size: int
    latent_shape: tuple[int, int, int]
    conditioning: str  # "text" | "class" | "none"
    timesteps: list[int]  # the schedule, noisiest first
    device: str

    stochastic: bool  # whether ``step`` draws noise
    batch_limit: int | None  # most trajectories that ``predict`` and ``decode`` show their networks at once

    def encode(self, conditions: Sequence[str]) -> Any:
        """Network conditioning for ``n`` conditions: prompts, or class names of the teacher where ``conditioning`` is
        "class" (the unconditional half included where CFG needs it)."""

    def start(self, noise: Tensor) -> State:
        """Unit noise ``[n, *latent_shape]`` as the state before step 0."""

    def encode_images(self, images: Tensor) -> Tensor:
        """Images ``[n, 3, h, w]`` in [−1, 1], resized to ``image_size``, to clean latents: :meth:`decode`'s inverse, as
        near as the VAE gets. Without a graph."""

    def noised(self, z0: Tensor, noise: Tensor, step: int) -> State:
        """The state before denoising step ``step`` of clean latents ``z0``: α·z0 + σ·noise; the noise alone at step 0,
        ``z0`` itself after the last one."""

    def predict(self, state: State, condition: Any) -> Prediction:
        """One evaluation of the network. Differentiable in ``state.z`` where gradients are enabled."""

    def levels(self, step: int) -> tuple[float, float]:
        """(α, σ) of the step: z = α·z0 + σ·eps."""

    def move(self, state: Prediction, delta: Tensor) -> Prediction:
        """Shift ẑ0 by ``delta`` and keep eps."""

    def step(self, state: Prediction, rngs: Sequence[torch.Generator] | None = None) -> State:
        """One step of the scheduler, from what ``predict`` (and ``move``) left; a stochastic one draws from ``rngs``,
        one generator per trajectory."""

    def decode(self, z0: Tensor) -> Tensor:
        """Clean latents to images ``[n, 3, image_size, image_size]`` in [−1, 1] (unclamped). Differentiable."""


@runtime_checkable
class VariationPrior(Prior, Protocol):
    """A prior that can also be conditioned on an encoder's features of an image, to make variants of it."""

    def embed_images(self, images: Tensor) -> Tensor:
        """Features ``[n, d]`` of images ``[n, 3, side, side]`` in [−1, 1]. Without a graph."""

    def encode_with(self, conditions: Sequence[str], embedded: Tensor, noise: Tensor, level: int) -> Any:
        """:meth:`encode`, with features ``embedded [n, d]`` of images to vary, to which unit ``noise [n, d]`` is added:
        0 is the least ``level``. Raises UsageError where the level is above the encoder's schedule."""
