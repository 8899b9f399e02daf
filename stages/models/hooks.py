"""Forward hooks: inputs or outputs of modules during one pass; and where a network has its head and its stages."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from manifests.errors import UsageError


def submodule(net: nn.Module, path: str) -> nn.Module:
    """The module at ``path``. Raises UsageError listing the paths that exist."""
    modules: dict[str, nn.Module] = dict(net.named_modules())
    if not path or path not in modules:
        raise UsageError(f"no module '{path}' in {type(net).__name__}: it has {', '.join(p for p in modules if p)}")
    return modules[path]


@dataclass
class Parts:
    """Paths of head and stages in a foreign network; built-in ones have them as attributes. ``stages`` is searched when
    first needed, with an image of ``shape``."""

    head: str | None
    shape: tuple[int, ...]
    stages: list[str] | None = None


def names_its_parts(net: nn.Module) -> bool:
    """Whether ``head`` and ``stages`` of ``net`` are paths of its modules, as built-in networks have them; others use
    these words for something else."""
    head, stages = getattr(net, "head", None), getattr(net, "stages", None)
    if not isinstance(head, str) or not isinstance(stages, list | tuple):
        return False
    modules = dict(net.named_modules())
    return isinstance(modules.get(head), nn.Linear) and all(isinstance(s, str) and s in modules for s in stages)


def mark(net: nn.Module, num_classes: int, shape: tuple[int, ...]) -> None:
    """Let :func:`head_path` and :func:`stage_paths` search the foreign network ``net``, which takes images of
    ``shape``. Its head is the last linear layer with one output a class."""
    linear = [name for name, m in net.named_modules() if isinstance(m, nn.Linear) and m.out_features == num_classes]
    net.__dict__["parts"] = Parts(linear[-1] if linear else None, shape)


def stage_paths(net: nn.Module) -> list[str]:
    """Module paths of the network's stage outputs, first to last; the last one is what the head pools.

    Raises UsageError for a network without feature maps.
    """
    parts = net.__dict__.get("parts")
    if not isinstance(parts, Parts):
        return [str(path) for path in net.stages]  # type: ignore[union-attr]
    if parts.stages is None:
        parts.stages = find_stages(net, parts.shape)
    if not parts.stages:
        raise UsageError(f"{type(net).__name__} has no feature maps [n, c, h, w]: cam and gradcam losses need them")
    return list(parts.stages)


def find_stages(net: nn.Module, shape: tuple[int, ...]) -> list[str]:
    """For each side above 1, the last module with an output map of that side, from one pass of a black image.

    What lies within a block that halves the side belongs to the next stage already.
    """
    outputs: list[tuple[str, int]] = []  # (module, side of its output), in the order of the calls
    halved: set[str] = set()
    modules = [(name, module) for name, module in net.named_modules() if name]

    def side(value: object) -> int:
        square = isinstance(value, Tensor) and value.ndim == 4 and value.shape[-1] == value.shape[-2]
        return int(value.shape[-1]) if square and isinstance(value, Tensor) else 0

    def note(name: str, args: tuple[object, ...], out: object) -> None:
        if side(out) > 1:
            outputs.append((name, side(out)))
        if args and side(out) and (side(args[0]) + 1) // 2 == side(out) < side(args[0]):
            halved.add(name)

    handles = [m.register_forward_hook(lambda _m, args, out, name=name: note(name, args, out)) for name, m in modules]
    modes = [(module, module.training) for module in net.modules()]
    parameter = next(net.parameters(), None)
    try:
        with torch.no_grad():
            net.eval()(torch.zeros(1, *shape, device=parameter.device if parameter is not None else None))
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    last = {side: name for name, side in outputs if not any(name.startswith(f"{block}.") for block in halved)}
    if len(last) == 1 and all(isinstance(submodule(net, name), nn.Conv2d) for name in last.values()):
        return []  # a transformer's patch embedding
    return [last[side] for side in sorted(last, reverse=True)]


def head_path(net: nn.Module) -> str | None:
    """Path of the last linear layer, None where a foreign network has none."""
    parts = net.__dict__.get("parts")
    return parts.head if isinstance(parts, Parts) else str(net.head)


def head_of(net: nn.Module) -> nn.Module:
    """The last linear layer. Raises UsageError where there is none."""
    path = head_path(net)
    if path is None:
        raise UsageError(f"{type(net).__name__} ends in no linear layer: the cam loss needs one")
    return submodule(net, path)


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
def inputs_of(modules: Sequence[nn.Module]) -> Iterator[list[list[Tensor]]]:
    """Within the block, each of ``modules`` (by position) collects its inputs, one for every call."""
    seen: list[list[Tensor]] = [[] for _ in modules]
    handles = [
        module.register_forward_pre_hook(lambda _m, args, mine=mine: mine.append(args[0]))
        for module, mine in zip(modules, seen, strict=True)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
