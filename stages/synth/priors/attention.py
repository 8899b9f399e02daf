"""Which attention kernel the prior runs: xformers where it works, else PyTorch's own SDPA."""

import logging
from collections.abc import Iterable
from typing import Any

import torch

log = logging.getLogger(__name__)


def xformers_works(device: str) -> str | None:
    """None if xformers runs a tiny attention on ``device``, else the reason. Importing it proves nothing:
    wheels built for another torch import, but hold no kernel that loads."""
    try:
        import xformers.ops

        q = torch.zeros(1, 16, 1, 16, device=device, dtype=torch.float16)
        xformers.ops.memory_efficient_attention(q, q, q)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def use_attention(networks: Iterable[Any], choice: str, device: str) -> str:
    """Switch ``networks`` to ``choice`` (``auto | sdpa | xformers``); returns the one in use, ``sdpa`` or ``xformers``.

    ``auto`` takes xformers on a GPU where it works; asking for it where it does not costs one line, not the run.
    """
    if choice == "sdpa" or (choice == "auto" and not device.startswith("cuda")):
        return "sdpa"  # diffusers' default processors call SDPA already
    reason = xformers_works(device)
    if reason is None:
        for network in networks:
            network.enable_xformers_memory_efficient_attention()
        return "xformers"
    if choice == "xformers":
        log.warning("xformers does not work here (%s); using PyTorch's attention instead", reason)
    return "sdpa"
