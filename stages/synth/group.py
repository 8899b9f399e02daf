"""A group: the trajectories guided together. It is the unit of determinism (BN statistics and LCA never cross it)."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import torch

from stages.seeds import python_rng, torch_rng
from stages.settings import PromptSettings, SynthSettings


def group_labels(index: int, size: int, classes: int) -> tuple[int, ...]:
    """Classes of a group: as many as fit with at least two trajectories each, rotating so that the run is balanced.

    Every ``classes`` groups each class has had ``size`` trajectories.

    >>> group_labels(0, 5, 2), group_labels(1, 5, 2), group_labels(1, 4, 10)
    ((0, 1, 0, 1, 0), (1, 0, 1, 0, 1), (2, 3, 2, 3))
    """
    distinct = min(classes, size // 2)
    start = index * (size if distinct == classes else distinct)
    common = gcd(distinct, classes)
    if size % 2 and distinct < classes and common > 1:
        # an odd group's first class gets one trajectory more; without this shift the same classes would always be first
        start += index // (classes // common)
    return tuple((start + i % distinct) % classes for i in range(size))


def prompt_for(settings: PromptSettings, class_name: str, seed: int, trajectory: int) -> str:
    """The prompt of one trajectory (DiffDFKD, section IV-A): a template with a random subject and style, a pure
    function of ``(settings, class, seed, trajectory)``.

    The subject is one of those that ``classes`` has for the class; with ``class_names`` the teacher's class name (the
    named track); else a random entry of ``subjects``.
    """
    rng = python_rng(seed, "prompt", trajectory)
    subject = rng.choice(settings.subjects)  # drawn on every track, so that they share their styles
    style = rng.choice(settings.styles)
    if class_name in settings.classes or settings.class_names:
        subject = rng.choice(settings.subjects_of(class_name))
    return rng.choice(settings.all_templates).format(subject=subject, style=style)


@dataclass(frozen=True)
class Group:
    """Group ``index`` of the run: ``n`` trajectories with their target classes and prompts."""

    index: int
    trajectories: tuple[int, ...]
    labels: tuple[int, ...]
    prompts: tuple[str, ...]
    class_names: tuple[str, ...] = ()  # of the labels, for class-conditional priors

    def conditions(self, conditioning: str) -> tuple[str, ...]:
        """Class names for a class-conditional prior, else prompts."""
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
