"""Stage 1's generators, each seeded by what it draws (:func:`stages.seeds.derive`)."""

import random

import torch

from stages.seeds import derive


def python_rng(seed: int, *purpose: int | str) -> random.Random:
    return random.Random(derive(seed, *purpose))


def torch_rng(seed: int, *purpose: int | str) -> torch.Generator:
    """A CPU generator: drawing on the CPU gives the same numbers on every device."""
    return torch.Generator().manual_seed(derive(seed, *purpose))
