"""Devices by name, and work in micro-batches: how a group that does not fit the memory is computed all the same.

Rows do not see each other in an eval-mode network, so parts give what the whole gives, up to the rounding of other
kernels. What does need the whole group, the mean and variance of BatchNorm's inputs, is additive over parts.
"""

import gc
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from manifests.errors import FactoryError, UsageError, first_line

log = logging.getLogger(__name__)


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


T = TypeVar("T")


class Repeatable:
    """Calls work on ``device`` so that a GPU gives the same bits on every run: deterministic kernels, the same choice
    of them, and no TF32. On a CPU, which does all this by itself, nothing changes.

    Where a network needs an operation that has no deterministic kernel, a warning names it, and the work is done again,
    as all later work is, without asking for such.
    """

    def __init__(self, device: str | torch.device) -> None:
        self.gpu, self.strict = torch.device(device).type == "cuda", True
        if self.gpu:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, when cuBLAS starts

    def __call__(self, work: Callable[[], T]) -> T:
        if not self.gpu:
            return work()
        try:
            with self.kernels():
                return work()
        except RuntimeError as error:
            if not self.strict or "determinis" not in str(error):
                raise
            log.warning("two runs on this GPU may differ in the last bits: %s", first_line(error))
        self.strict = False
        with self.kernels():
            return work()

    @contextmanager
    def kernels(self) -> Iterator[None]:
        """The switches of PyTorch around work, put back afterwards."""
        memory: Any = torch.utils.deterministic  # whose type says nothing of its switch
        mode, filled = torch.get_deterministic_debug_mode(), memory.fill_uninitialized_memory
        precision = torch.get_float32_matmul_precision()
        try:
            torch.set_deterministic_debug_mode("error" if self.strict else "default")
            memory.fill_uninitialized_memory = False  # nothing reads it, and filling takes time
            torch.set_float32_matmul_precision("highest")
            with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
                yield
        finally:
            torch.set_float32_matmul_precision(precision)
            memory.fill_uninitialized_memory = filled
            torch.set_deterministic_debug_mode(mode)


def in_micro_batches(call: Callable[..., Any], limit: int | None, *inputs: Tensor | None) -> Any:
    """``call(*inputs)`` on at most ``limit`` rows at a time (None: all), its outputs joined along the first axis.

    ``inputs`` are ``[n, …]`` or None; ``call`` returns a tensor or a tuple of tensors. With gradients every part is
    evaluated again on the way back (Chen et al. 2016, arXiv 1604.06174), so that no two parts' activations are held
    at once; the gradient is exact, also through what is summed over the parts.
    """
    n = max(len(x) for x in inputs if x is not None)
    if limit is None or n <= limit:
        return call(*inputs)
    outputs = []
    for start in range(0, n, limit):
        part = [None if x is None else x[start : start + limit] for x in inputs]
        if torch.is_grad_enabled():
            outputs.append(checkpoint(call, *part, use_reentrant=False, preserve_rng_state=False))
        else:
            outputs.append(call(*part))
    if isinstance(outputs[0], Tensor):
        return torch.cat(outputs)
    return tuple(torch.cat(joined) for joined in zip(*outputs, strict=True))


def moment_sums(x: Tensor, origin: Tensor) -> Tensor:
    """``[1, 2, c]``: Σ over rows and channel-wise mean over places of (x − o) and (x − o)², for ``x [n, c, …]``.

    Counted from ``origin [c]`` (the running mean), so that the variance does not cancel.
    """
    centered = x.unsqueeze(-1).flatten(2).to(origin.dtype) - origin.view(1, -1, 1)
    return torch.stack([centered.mean(2).sum(0), centered.square().mean(2).sum(0)]).unsqueeze(0)


def moments(sums: Tensor, origin: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance ``[c]`` of ``n`` rows from the :func:`moment_sums` ``[parts, 2, c]`` of their parts."""
    first, second = sums.sum(0) / n
    return origin + first, (second - first.square()).clamp_min(0)


OUT_OF_MEMORY = (  # in RuntimeErrors of PyTorch's allocator on the CPU, oneDNN, cuBLAS, cuDNN before and since 9
    "DefaultCPUAllocator",
    "could not create a primitive",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
)


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` reports a failed allocation, by PyTorch's own class or in its text."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in OUT_OF_MEMORY)


@contextmanager
def memory_error_in_a_line(what: str, way_out: str) -> Iterator[None]:
    """Around work that needs memory: a lack of it becomes a FactoryError, ``what`` does not fit and the ``way_out``."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise FactoryError(f"{what} ({reason}): {way_out}") from error


def retry_with_smaller_batches(
    call: Callable[[], T], size: int, limit: Callable[[int], None], what: str, way_out: str
) -> T:
    """``call()``; where it runs out of memory, again after ``limit`` (rows at once) is called with half of ``size`` …

    Raises what ``call`` raises; FactoryError, ``what`` does not fit and the ``way_out``, where one row is too many.
    """
    while size > 1:
        try:
            return call()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        size = -(-size // 2)
        limit(size)
        free_memory()  # after the except block, which held the failed attempt's tensors
    with memory_error_in_a_line(what, way_out):
        return call()


def free_memory() -> None:
    """Give back what a failed attempt left cached. Call it where the error, with its frames' tensors, is forgotten."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
