"""Several processes that train as one (data parallel): each holds every student and learns from its part of each batch.

What they add up belongs to the whole batch, and all of them get the same bits: weights, averaged weights and every
decision stay alike everywhere, so that the first one's checkpoint is the state of all. Nothing is pickled.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class Ranks:
    """This process, number ``rank`` of ``size``; alone by default, and then every method hands back what it was given.

    ``device``: where it computes and its messages lie; None leaves that to the settings.
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
        """Whether this process is the one that writes files and tells events."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """Which of ``count`` things in a row are this process's: neighbours, and in all within one of each other.

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

        ``share``: this process's part of the batch, 0 … 1. BatchNorm normalises with each part's own statistics; the
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
