"""Randomness in both stages: a pure function of what is drawn, never of who draws it or what was drawn before."""

import hashlib
import random

import numpy as np
import numpy.typing as npt
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


Ids = npt.NDArray[np.uint64]


def mixed(words: Ids) -> Ids:
    """The finalizer of SplitMix64 (Steele et al. 2014): a bijection that scatters neighboring numbers."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def uniform(seed: int, purpose: str, ids: Ids) -> npt.NDArray[np.float64]:
    """One number in [0, 1) for every id, decided by ``(seed, purpose, id)`` alone."""
    words = mixed(ids ^ mixed(np.array([derive(seed, purpose)], dtype=np.uint64)))
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
