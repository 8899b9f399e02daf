"""How stage 2 runs: callbacks, threads, precision, and several processes that train as one."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn


class OnEvent(Protocol):
    """Receives events: ``note`` and ``warning`` with a ``message``, ``epoch_done`` and the like with their fields."""

    def __call__(self, kind: str, **fields: Any) -> object: ...


OnProgress = Callable[[float, float, str], object]  # (step, total, short note)


@dataclass(frozen=True)
class Callbacks:
    """Callbacks of a training run: events, progress, stop request. By default nobody listens and nothing stops it."""

    on_event: OnEvent = lambda kind, **fields: None
    on_progress: OnProgress = lambda done, total, note: None
    should_stop: Callable[[], bool] = lambda: False

    def note(self, message: str) -> None:
        self.on_event("note", message=message)

    def warn(self, message: str) -> None:
        self.on_event("warning", message=message)


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """Within the block PyTorch computes on ``number`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def autocast(dtype: str, device: torch.device) -> torch.autocast:
    """The context of every forward pass in training (students, and the teacher for them): bf16 where ``dtype`` is.

    Weights, losses and their sums stay fp32.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16")


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """The context of what stays fp32 inside :func:`autocast`; a device without autocast (meta) needs none."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def slow_precision(dtype: str, device: torch.device) -> str:
    """A warning that bf16 is slower than fp32, on a CPU without instructions for it; empty otherwise."""
    known: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # PyTorch ≥ 2.12
    units = [known[name] for name in ("amx_bf16", "avx512_bf16", "bf16") if name in known]
    if dtype == "fp32" or device.type != "cpu" or not units or any(units):
        return ""
    return "dtype bf16: this CPU has no instructions for it (AMX or AVX512-BF16), so fp32 is faster here"


STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class Ranks:
    """This process, number ``rank`` of ``size`` that train as one (data parallel).

    Each process holds every student and learns from its part of each batch. Sums and decisions belong to the whole
    batch and reach all processes with the same bits, so weights and averaged weights stay equal everywhere, and the
    first process's checkpoint is the state of all. Nothing is pickled. A process alone (the default) gets back what it
    gives. ``device``: where it computes and its messages lie; None: as the settings say.
    """

    rank: int = 0
    size: int = 1
    device: torch.device | None = None

    @classmethod
    def joined(cls, device: torch.device) -> "Ranks":
        """This process in the process group that it has joined."""
        return cls(dist.get_rank(), dist.get_world_size(), device)

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes files and sends events."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """This process's part of a sequence of ``count``: contiguous, and in all processes equal to within one.

        >>> [Ranks(rank, 3).part(8) for rank in range(3)]
        [slice(0, 2, None), slice(2, 5, None), slice(5, 8, None)]
        """
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def add(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            message = tensor.to(self.device)
            dist.all_reduce(message)
            tensor.copy_(message)
        return tensor

    @torch.no_grad()
    def add_up(self, net: nn.Module, values: Tensor, share: float) -> Tensor:
        """Sum the gradients of ``net`` and ``values`` in one message; the summed values.

        ``share``: this process's part of the batch, 0 … 1. BatchNorm normalizes with each part's own statistics; the
        running ones become the mean over the parts, by share. Weights without a gradient stay without one.
        """
        if self.size == 1:
            return values
        weights = [weight for weight in net.parameters() if weight.requires_grad]
        running = [value for name, value in net.named_buffers() if name.rpartition(".")[2] in STATISTICS]
        gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
        parts = [*gradients, *(value.mul_(share) for value in running), values]
        whole = self.add(torch.cat([part.flatten() for part in parts]))
        for part, total in zip(parts, whole.split([part.numel() for part in parts]), strict=True):
            part.copy_(total.view_as(part))
        return values

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """Each of ``flags`` (equally many everywhere), true where it is true in any process."""
        if self.size == 1:
            return list(flags)
        return [count > 0 for count in self.add(torch.tensor(flags, dtype=torch.int32)).tolist()]

    def share(self, data: bytes | None) -> bytes | None:
        """In all processes the ``data`` of the lowest one that has any; None where none has."""
        if self.size == 1:
            return data
        sizes = torch.zeros(self.size, dtype=torch.int64)
        sizes[self.rank] = 0 if data is None else len(data) + 1
        source = next((rank for rank, size in enumerate(self.add(sizes).tolist()) if size), None)
        if source is None:
            return None
        message = torch.zeros(int(sizes[source]) - 1, dtype=torch.uint8)
        if data is not None and source == self.rank:
            message = torch.from_numpy(np.frombuffer(data, np.uint8).copy())
        message = message.to(self.device)
        dist.broadcast(message, source)
        return message.cpu().numpy().tobytes()


ALONE = Ranks()
