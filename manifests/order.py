"""In which order ``factory run distill`` visits samples: pure functions of (manifest, selection, seed, epoch).

Nothing needs to be stored to resume but the step: the order of its epoch is drawn again.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Order = npt.NDArray[np.int64]


def epoch_order(n: int, seed: int, epoch: int, digest: str) -> Order:
    """A permutation of ``0..n-1`` that only these four arguments decide.

    Sorts counter-based random words: their stream is fixed by definition, unlike that of ``Generator.permutation``,
    which may change between NumPy versions.
    """
    key = hashlib.sha256(f"{digest}|{seed}|{epoch}".encode()).digest()
    words = np.random.Philox(key=np.frombuffer(key[:16], dtype="<u8").astype(np.uint64)).random_raw(n)
    return np.argsort(np.asarray(words, dtype=np.uint64), kind="stable").astype(np.int64)


def combined_digest(digests: Sequence[str]) -> str:
    """The digest of several manifests together; of one manifest, its own."""
    return digests[0] if len(digests) == 1 else hashlib.sha256("|".join(digests).encode()).hexdigest()


def mixed_order(sizes: Sequence[int], weights: Sequence[float], seed: int, epoch: int, digests: Sequence[str]) -> Order:
    """One epoch over several selections laid end to end: positions in ``0..sum(sizes)-1``, shuffled together.

    A selection of ``n`` samples with weight ``w`` gives ``round(n w)`` of them to every epoch. Consecutive epochs walk
    through passes over the whole selection, so with w = 0.3 every sample is used as often as any other, give or take
    one. With all weights 1 this is :func:`epoch_order` of the total.
    """
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    parts = [
        start + np.sort(_window(size, round(size * weight), seed, epoch, digest))
        for start, size, weight, digest in zip(starts[:-1], sizes, weights, digests, strict=True)
    ]
    chosen = np.concatenate(parts) if parts else np.zeros(0, np.int64)
    return chosen[epoch_order(len(chosen), seed, epoch, combined_digest(digests))] if len(chosen) else chosen


def spread(rows: Order, most: int) -> Order:
    """At most ``most`` of ``rows``, evenly spread: which to look at where all would take too long.

    >>> spread(np.arange(10), 4).tolist()
    [0, 3, 6, 9]
    """
    return rows[np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(np.int64)]


def _window(n: int, count: int, seed: int, epoch: int, digest: str) -> Order:
    """Entries ``epoch * count`` up to ``(epoch + 1) * count`` of the endless sequence of passes over ``0..n-1``."""
    if n == 0 or count <= 0:
        return np.zeros(0, np.int64)
    first, stop = epoch * count, (epoch + 1) * count
    passes = range(first // n, -(-stop // n))
    if count % n == 0:
        return np.tile(np.arange(n, dtype=np.int64), count // n)
    joined = np.concatenate([epoch_order(n, seed, number, f"pass|{digest}") for number in passes])
    return joined[first - passes.start * n : stop - passes.start * n]
