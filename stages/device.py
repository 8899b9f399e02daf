"""Devices by the names that ``--device`` takes: auto, cpu, cuda, cuda:1 …"""

import torch

from manifests.errors import UsageError


def find_device(name: str) -> torch.device:
    """The device ``name``; ``auto`` is a GPU where there is one. Raises UsageError where it cannot compute."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # meta holds no numbers
    except Exception as error:  # every backend that is missing raises a type of its own
        why = " ".join(str(error).split()).partition(". ")[0]
        raise UsageError(f"device {name!r} cannot be used: {why}; there are auto, cpu, cuda, cuda:1 …") from None
    return device
