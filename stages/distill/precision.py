"""Mixed precision of stage 2: students, and the teacher's answers to them, under bf16 autocast on any device."""

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast(dtype: str, device: torch.device) -> torch.autocast:
    """The context of every forward pass that learning needs; weights, losses and their sums stay fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16")


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """The context of what stays fp32 inside :func:`autocast`; also where there is none (meta)."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def complaint(dtype: str, device: torch.device) -> str:
    """What to tell before bf16 is slower than fp32: on a CPU without instructions for it. Empty where it is not."""
    known: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # PyTorch ≥ 2.12
    units = [known[name] for name in ("amx_bf16", "avx512_bf16", "bf16") if name in known]
    if dtype == "fp32" or device.type != "cpu" or not units or any(units):
        return ""
    return "dtype bf16: this CPU has no instructions for it (AMX or AVX512-BF16), so fp32 is faster here"
