"""The seed of anything random, in both stages: a pure function of what is drawn, never of who draws it."""

import hashlib


def derive(seed: int, *purpose: int | str) -> int:
    """A 63-bit seed for ``purpose``, e.g. ``derive(run_seed, "noise", trajectory)``."""
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
