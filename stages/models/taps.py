"""Look inside a network during one forward pass: inputs or outputs of modules named by path."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from manifests.errors import UsageError


def submodule(net: nn.Module, path: str) -> nn.Module:
    """The module at ``path``. Raises UsageError listing the paths that exist."""
    modules: dict[str, nn.Module] = dict(net.named_modules())
    if not path or path not in modules:
        raise UsageError(f"no module '{path}' in {type(net).__name__}: it has {', '.join(p for p in modules if p)}")
    return modules[path]


def stage_paths(net: nn.Module) -> list[str]:
    """Module paths of the network's stage outputs, first to last; the last one is what the head pools."""
    return [str(path) for path in net.stages]  # type: ignore[union-attr]


def head_of(net: nn.Module) -> nn.Module:
    """The last linear layer."""
    return submodule(net, str(net.head))


@contextmanager
def outputs_of(net: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Within the block, each forward pass fills the yielded dict with the outputs of the modules at ``paths``."""
    seen: dict[str, Tensor] = {}
    handles = [
        submodule(net, path).register_forward_hook(lambda _m, _i, out, path=path: seen.__setitem__(path, out))
        for path in paths
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def inputs_of(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Within the block, the inputs of ``modules`` are appended to the yielded list in the order of their calls."""
    seen: list[Tensor] = []
    handles = [m.register_forward_pre_hook(lambda _m, args: seen.append(args[0])) for m in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
