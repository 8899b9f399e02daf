"""Randomness as a pure function of what is drawn: nothing to save, nothing that depends on who drew before."""

import numpy as np
import numpy.typing as npt

from stages.seeds import derive

Ids = npt.NDArray[np.uint64]


def mixed(words: Ids) -> Ids:
    """The finaliser of SplitMix64 (Steele et al. 2014): a bijection that scatters neighbouring numbers."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def uniform(seed: int, purpose: str, ids: Ids) -> npt.NDArray[np.float64]:
    """One number in [0, 1) for every id, decided by ``(seed, purpose, id)`` alone."""
    words = mixed(ids ^ mixed(np.array([derive(seed, purpose)], dtype=np.uint64)))
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
