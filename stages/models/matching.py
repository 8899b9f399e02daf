"""Which of a checkpoint's tables a network takes: its names are looked for under every prefix, and in other spellings.

Training saves raw weights, averaged ones, several networks at once, each with prefixes of its own. The table and prefix
under which every parameter and statistic lies with its shape is the network's; no convention has to be known for that.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from manifests.errors import DataError, UsageError
from stages.models.checkpoints import WHOLE, Checkpoint, listed

WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""What DistributedDataParallel, torch.compile, FSDP and activation checkpointing put into the names of modules."""
TRAINING_ONLY = re.compile(
    r"(?:.*\.)?total_(?:ops|params)|n_averaged|num_updates|steps?|initted|decay|(?:aux|criterion|loss)\w*\..*",
    re.IGNORECASE,
)
"""Names that no logit depends on: counters of thop and of averaging, auxiliary classifiers, weights of the loss."""
AVERAGED = re.compile(r"(?:^|[/._])(?:ema|swa|avg|averaged?)(?:$|[/._])", re.IGNORECASE)
"""In the name of a table: moving averages of the weights."""


@dataclass(frozen=True)
class Weights:
    """Every tensor of a network, by its name there. ``line``: what was read, for people; "" where the file is just
    these tensors under these names."""

    state: dict[str, Tensor]
    line: str


@dataclass(frozen=True)
class _Fit:
    """The network's names found in a table below a prefix (``label``: both); ``problems`` by kind."""

    label: str
    table: str
    state: dict[str, Tensor]
    left_out: list[str]
    notes: list[str]
    problems: dict[str, list[str]]

    @property
    def fits(self) -> bool:
        return not any(self.problems.values())

    @property
    def problem(self) -> str:
        return next(f"{what}: {listed(keys)}" for what, keys in self.problems.items() if keys)


class Misfit(DataError):
    """No table holds all that the network needs; ``state`` is what the closest one holds of it."""

    def __init__(self, text: str, state: dict[str, Tensor]):
        super().__init__(text)
        self.state = state


def find_weights(
    checkpoint: Checkpoint,
    net: nn.Module,
    key: str | None = None,
    biases: Mapping[str, str] | None = None,
) -> Weights:
    """The tensors of ``checkpoint`` that ``net`` needs: all of them, from one table, below one prefix.

    Where several tables hold them, that named ``key`` is read; else averaged weights (``ema``, ``swa``) before others,
    as timm does, but mmengine's own order, which keeps them under ``state_dict``.

    Args:
        net: compared by names and shapes; may be on the meta device.
        key: path of a table, or of a table and a prefix (``state_dict/ema_model``).
        biases: for a bias that the file may have and ``net`` has not, the running mean of the BatchNorm behind it, from
            which it is subtracted: BN(y + b) with mean m is BN(y) with mean m − b.

    Raises:
        DataError: none fits (naming keys and shapes of the one that comes closest), or several do.
        UsageError: there is no ``key``.
    """
    expected = {name: value for name, value in net.state_dict().items() if isinstance(value, Tensor)}
    drop = WRAPPERS - {part for name in expected for part in name.split(".")}
    aliases = list(_aliases(net, [*expected, *(biases or {})]))
    key = "" if key == "." else key
    tables = checkpoint.named_tables(key)
    tried = [
        fit
        for path, table in tables.items()
        for names in aliases
        for fit in _fits(path, _without(drop, table), names, expected, biases or {})
        if key in (None, fit.table, fit.label)
    ]
    if not tried:
        largest = sorted(checkpoint.tables, key=lambda path: -len(checkpoint.tables[path]))
        has = listed(map(_label, largest))
        raise UsageError(f"{checkpoint.where} holds no '{key}' that checkpoint_key names: it has {has}")
    fits = [fit for fit in tried if fit.fits]
    if not fits:
        raise _misfit(checkpoint, max(tried, key=lambda fit: len(fit.state)), net)
    chosen = _choose(fits, checkpoint, type(net).__name__)
    if wrappers := drop.intersection(part for name in tables[chosen.table] for part in name.split(".")):
        chosen.notes.insert(0, f"{', '.join(f'{part}.' for part in sorted(wrappers))} removed")
    for fit in tried if key is None and not _averaged(chosen, checkpoint) else ():
        if _averaged(fit, checkpoint) and not fit.fits and 2 * len(fit.state) > len(expected):
            chosen.notes.append(f"averaged weights {fit.label} do not fit ({fit.problem})")
    return Weights(chosen.state, _line(chosen, checkpoint))


def largest_table(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """That of ``checkpoint`` without wrappers, for networks that rename parameters themselves. Raises DataError where
    there is none, or not of plain numbers."""
    table = max(checkpoint.named_tables().values(), key=len)
    while table and (first := {name.partition(".")[0] for name in table}) <= WRAPPERS and len(first) == 1:
        table = {name.partition(".")[2]: value for name, value in table.items()}  # LeViT has a layer called module
    if special := [f"{name} ({what})" for name, value in table.items() if (what := _special(value))]:
        raise DataError(f"{checkpoint.where} holds no plain numbers: {listed(special)}")
    return table


def _without(wrappers: set[str], table: dict[str, Tensor]) -> dict[str, Tensor]:
    clean = {".".join(part for part in name.split(".") if part not in wrappers): v for name, v in table.items()}
    return clean if len(clean) == len(table) else table  # both of two names are needed to tell them apart


def _fits(
    path: str,
    table: dict[str, Tensor],
    names: Mapping[str, str],
    expected: Mapping[str, Tensor],
    biases: Mapping[str, str],
) -> Iterator[_Fit]:
    """The network's names below every prefix that has half of them, or below none. ``names``: in the file, to those of
    the network."""
    hits: Counter[str] = Counter()
    for name in table:
        parts = name.split(".")
        hits.update(name[: len(name) - len(rest)] for i in range(len(parts)) if (rest := ".".join(parts[i:])) in names)
    many = [prefix for prefix, count in hits.most_common(16) if 2 * count >= len(expected) - len(biases)]
    for prefix in many or [""]:
        yield _fit(path, table, prefix, names, expected, biases)


def _fit(
    path: str,
    table: dict[str, Tensor],
    prefix: str,
    names: Mapping[str, str],
    expected: Mapping[str, Tensor],
    biases: Mapping[str, str],
) -> _Fit:
    source = {name: prefix + alias for alias, name in names.items() if prefix + alias in table}
    missing = {name: alias for alias, name in names.items() if name not in source and not _optional(name, biases)}
    other = _other_prefix(table, missing, names)
    if other:
        source |= {name: other + alias for name, alias in missing.items()}
        missing = {}
    state = {
        name: table[origin]
        for name, origin in source.items()
        if not (_is_counter(name) and table[origin].shape != expected[name].shape)
    }
    left = sorted(table.keys() - set(source.values()))
    inside = [name for name in left if name.startswith(prefix) and not TRAINING_ONLY.fullmatch(name[len(prefix) :])]
    problems = {
        "missing": list(missing),
        "unexpected": inside,
        "of another shape": [
            f"{name} {tuple(value.shape)} for {tuple(expected[name].shape)}"
            for name, value in state.items()
            if name in expected and value.shape != expected[name].shape
        ],
        "not plain numbers": [
            f"{name} ({what})"
            for name, value in state.items()
            if (what := _special(value, None if _is_counter(name) else expected.get(name)))
        ],
    }
    removed = " and ".join(filter(None, (prefix, other)))
    notes = [f"prefix {removed} removed"] if removed else []
    notes += [f"left out: {_grouped(left)}"] if left else []
    if not any(problems.values()):
        folded = [name for name in biases if name in state]
        for name in folded:
            mean = state[biases[name]]
            state[biases[name]] = mean - state.pop(name).to(mean.dtype)
        if folded:
            notes.append(f"biases of {len(folded)} convolutions subtracted from the BatchNorm means behind them")
        if renamed := sum(alias != name for alias, name in names.items() if name in state):
            notes.append(f"{renamed} names translated")
    label = "/".join(filter(None, (path, prefix.rstrip("."))))
    return _Fit(label, path, state, left, notes, problems)


def _other_prefix(table: Mapping[str, Tensor], missing: Mapping[str, str], names: Mapping[str, str]) -> str:
    """Where the head is, if it lies beside the rest (``backbone.`` and ``head.`` of OpenMMLab): the one prefix that has
    all that is ``missing`` (names to those in the file) and nothing else of the network; else ""."""
    if not 0 < len(missing) <= 4:
        return ""
    having = [{n[: -len(alias)] for n in table if n.endswith(f".{alias}")} for alias in missing.values()]
    found = [
        prefix
        for prefix in set.intersection(*having)
        if not any(prefix + alias in table for alias in names if alias not in missing.values())
    ]
    return found[0] if len(found) == 1 else ""


def _is_counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")  # of no use here; averaging makes other types of it


def _optional(name: str, biases: Mapping[str, str]) -> bool:
    return name in biases or _is_counter(name)  # which old files lack


def _special(value: Tensor, wanted: Tensor | None = None) -> str:
    """What keeps ``value`` from being copied number by number."""
    if value.is_meta:
        return "on the meta device: without values"
    if value.is_quantized:
        return "quantized"
    if value.layout != torch.strided or value.is_nested:
        return "sparse"
    if wanted is not None and value.is_floating_point() != wanted.is_floating_point():
        return str(value.dtype).removeprefix("torch.")
    return ""


def _misfit(checkpoint: Checkpoint, best: _Fit, net: nn.Module) -> Misfit:
    unused = f"; the file has {listed(best.left_out)}" if best.problems["missing"] and best.left_out else ""
    place = f" ({best.label})" if best.label else ""
    text = f"{checkpoint.where}{place} does not fit {type(net).__name__}: {best.problem}{unused}"
    return Misfit(text, best.state)


def _choose(fits: list[_Fit], checkpoint: Checkpoint, net: str) -> _Fit:
    distinct: list[_Fit] = []
    for fit in fits:
        if not any(_equal(fit.state, other.state) for other in distinct):
            distinct.append(fit)
    if len(distinct) > 1:
        averaged = [fit for fit in distinct if _averaged(fit, checkpoint)]
        if len(averaged) != 1:
            labels = " and ".join(_label(fit.label) for fit in distinct)
            raise DataError(
                f"{checkpoint.where} holds several tables that fit {net}, {labels}: name one with checkpoint_key"
            )
        distinct = averaged
    return distinct[0]


def _averaged(fit: _Fit, checkpoint: Checkpoint) -> bool:
    """By its name, a moving average; mmengine's EMAHook swaps the names of raw and averaged weights."""
    return bool(AVERAGED.search(fit.label)) != ("message_hub" in checkpoint.contents)


def _equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def _line(fit: _Fit, checkpoint: Checkpoint) -> str:
    top = fit.table.split("/")[0]
    beside = [key for key in checkpoint.contents if key not in (top, WHOLE)]
    if not (top or beside or fit.notes):
        return ""
    name = checkpoint.where.rsplit("/", 1)[-1]
    place = f"{_label(fit.table)} of {name}" if fit.table else name
    return ", ".join([place + (f" (beside it: {listed(beside, 6)})" if beside else ""), *fit.notes])


def _grouped(names: Sequence[str]) -> str:
    """``names``, those of one counter or branch together: ``criterion.weight, 12 × total_ops, 10 × AuxLogits``."""
    groups: dict[str, list[str]] = {}
    for name in names:
        first, last = name.split(".")[0], name.rsplit(".", 1)[-1]
        groups.setdefault(last if last.startswith("total_") else first, []).append(name)
    return listed([each[0] if len(each) == 1 else f"{len(each)} × {group}" for group, each in groups.items()])


def _label(path: str) -> str:
    return path or ". (the top level)"


# The same layers under other names.

Rule = tuple[str, str | Callable[[re.Match[str]], str]]


def _aliases(net: nn.Module, names: Sequence[str]) -> Iterator[dict[str, str]]:
    """What files may call the parameters ``names`` of ``net``: to their names in ``net``, its own first."""
    seen: list[dict[str, str]] = []
    for rules in ((), *_namings(net)):
        aliases = {}
        for name in names:
            alias = name
            for pattern, replacement in rules:
                alias = re.sub(pattern, replacement, alias)
            aliases[alias] = name
        if aliases not in seen:
            seen.append(aliases)
            yield aliases


def _namings(net: nn.Module) -> list[list[Rule]]:
    """By class of network, what turns its names into those of code bases that have the same layers."""
    kind = type(net).__name__
    if kind == "ResNet":  # shortcut, linear: kuangliu/pytorch-cifar
        shortcut, head = (r"\.downsample\.", ".shortcut."), (r"^fc\.", "linear.")
        cifar100: list[Rule] = [  # weiaicunzai/pytorch-cifar100
            *((rf"^layer{stage}\.", f"conv{stage + 1}_x.") for stage in (1, 2, 3, 4)), shortcut,
            (r"^conv1\.", "conv1.0."), (r"^bn1\.", "conv1.1."),
            (r"\.conv1\.", ".residual_function.0."), (r"\.bn1\.", ".residual_function.1."),
            (r"\.conv2\.", ".residual_function.3."), (r"\.bn2\.", ".residual_function.4."),
        ]  # fmt: skip
        return [[shortcut, head], [shortcut], [head], cifar100]
    if kind == "ResNetCifar":  # RepDistiller, chenyaofo/pytorch-cifar-models
        return [[(r"^linear\.", "fc.")], [(r"\.downsample\.", ".shortcut.")]]
    if kind == "Vgg11":  # kuangliu/pytorch-cifar, pytorch-cifar-models: one list, whose numbers count poolings, too
        lengths = [sum(1 for _ in net.get_submodule(f"block{block}").children()) for block in range(5)]
        starts = [sum(lengths[:block]) for block in range(5)]
        return [[(r"^block(\d)\.(\d+)\.", lambda m: f"features.{starts[int(m[1])] + int(m[2])}.")]]
    if kind == "ShuffleNetV2":  # kuangliu/pytorch-cifar, RepDistiller
        return [[
            (r"^conv1\.0\.", "conv1."), (r"^conv1\.1\.", "bn1."),
            (r"^conv5\.0\.", "conv2."), (r"^conv5\.1\.", "bn2."), (r"^fc\.", "linear."),
            (r"^stage(\d)\.(\d+)\.branch(\d)\.(\d)\.", _shuffle_layer),
        ]]  # fmt: skip
    if kind == "DenseNet":  # torchvision's own weights, which its builder renames
        return [[(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.")]]
    if kind == "VisionTransformer":  # torchvision before 0.12
        return [[(r"\.mlp\.0\.", ".mlp.linear_1."), (r"\.mlp\.3\.", ".mlp.linear_2.")]]
    return []


def _shuffle_layer(found: re.Match[str]) -> str:
    """``convN`` or ``bnN``, counted over both branches of a block: torchvision's ReLUs are layers, too."""
    stage, block, branch, index = map(int, found.groups())
    if branch == 2:
        index = {0: 0, 1: 1, 3: 2, 4: 3, 5: 4, 6: 5}[index] + (4 if block == 0 else 0)
    return f"layer{stage - 1}.{block}.{('conv', 'bn')[index % 2]}{index // 2 + 1}."
