"""A group: the trajectories guided together. It is the unit of determinism (BN statistics and LCA never cross it)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from stages.synth.labels import group_labels
from stages.synth.prompts import prompt_for
from stages.synth.seeds import torch_rng
from stages.synth.settings import SynthSettings


@dataclass(frozen=True)
class Group:
    """Group ``index`` of the run: ``n`` trajectories with their target classes and prompts."""

    index: int
    trajectories: tuple[int, ...]
    labels: tuple[int, ...]
    prompts: tuple[str, ...]
    class_names: tuple[str, ...] = ()  # of the labels, for class-conditional priors

    def conditions(self, conditioning: str) -> tuple[str, ...]:
        """What the prior is asked for: class names where it is class-conditional, else prompts."""
        return self.class_names if conditioning == "class" else self.prompts

    def noise(self, seed: int, shape: Sequence[int]) -> torch.Tensor:
        """Initial latents ``[n, *shape]``, one generator per trajectory."""
        draws = (torch_rng(seed, "noise", trajectory) for trajectory in self.trajectories)
        return torch.stack([torch.randn(tuple(shape), generator=rng) for rng in draws])


def make_group(settings: SynthSettings, index: int, class_names: Sequence[str]) -> Group:
    """Group ``index``, a pure function of the settings: shard counts and workers play no part."""
    size = settings.group_size
    labels = group_labels(index, size, len(class_names))
    trajectories = tuple(range(index * size, (index + 1) * size))
    prompts = tuple(
        prompt_for(settings.prompts, class_names[label], settings.seed, t)
        for label, t in zip(labels, trajectories, strict=True)
    )
    return Group(index, trajectories, labels, prompts, tuple(class_names[label] for label in labels))
