"""Randomness as a pure function of what is drawn, never of who draws it."""

import hashlib
import random

import torch


def derive(seed: int, *purpose: int | str) -> int:
    """A 63-bit seed for ``purpose``, e.g. ``derive(run_seed, "noise", trajectory)``."""
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def python_rng(seed: int, *purpose: int | str) -> random.Random:
    return random.Random(derive(seed, *purpose))


def torch_rng(seed: int, *purpose: int | str) -> torch.Generator:
    """A CPU generator: drawing on the CPU gives the same numbers on every device."""
    return torch.Generator().manual_seed(derive(seed, *purpose))
