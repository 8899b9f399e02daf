"""What weights files hold: tables of named tensors, and what a training loop saved beside them. Nothing in them runs.

Files are safetensors, or of ``torch.save``: read by torch's restricted unpickler with stand-ins for every class that it
does not know, so that a table is found beside options, metrics and other objects without importing what made them.
"""

import io
import pickletools
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING  # of Python 2, as pickle itself renames them
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from manifests.errors import DataError


@dataclass(frozen=True)
class Checkpoint:
    """What a weights file holds. ``tables``: named tensors by the path of keys to them (``model``, ``ckpt/ema``; "" is
    the top level). ``contents``: every top-level entry that is no tensor, in words."""

    where: str
    tables: dict[str, dict[str, Tensor]]
    contents: dict[str, str] = field(default_factory=dict)

    def named_tables(self, key: str | None = None) -> dict[str, dict[str, Tensor]]:
        """All tables, or the one that ``key`` is or begins with. Raises DataError saying what is there instead."""
        if not self.tables:
            held = listed(f"{key}: {what}" for key, what in self.contents.items())
            raise DataError(f"{self.where} holds no table of named tensors ({held or 'nothing'}){self._remedy()}")
        if key is None:
            return self.tables
        paths = [path for path in self.tables if not path or path == key or key.startswith(f"{path}/")]
        return {path: self.tables[path] for path in sorted(paths, key=len)[-1:]}

    def _remedy(self) -> str:
        for key, what in self.contents.items():
            if what.startswith(MODEL):
                entry = "" if key == WHOLE else f"[{key!r}]"
                model = f"torch.load({self.where!r}, weights_only=False){entry}"
                return f"; if you trust it, run once: torch.save({model}.state_dict(), 'weights.pt')"
        return ""


WHOLE = "the file"
MODEL = "a whole pickled model of class"


class _Items:
    """Stands for a class in a file, which is not imported: its objects become dicts of what they hold."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        items: Any = OrderedDict()  # exactly this type: torch puts items and attributes into no other
        items.pickled_class = cls.__name__
        return items


class _Opaque:
    """The same for objects that are keys or members of sets, or have a state of another form."""

    @property
    def pickled_class(self) -> str:
        return type(self).__name__

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def read_checkpoint(files: Mapping[str, bytes], where: str) -> Checkpoint:
    """The tables in the weights ``files``: one of safetensors or ``torch.save``, told apart by content, or the shards
    of one table. Raises DataError where they are damaged, or cannot be read without running what they hold."""
    if len(files) == 1:
        return _checkpoint(_parse(next(iter(files.values())), where), where)
    table: dict[str, Tensor] = {}
    for name, data in files.items():
        shard = max(_checkpoint(_parse(data, name), name).named_tables().values(), key=len)
        if twice := shard.keys() & table.keys():
            raise DataError(f"{where}: {min(twice)} is in {name} and in a shard before it")
        table |= shard
    return Checkpoint(where, {"": table})


def _parse(data: bytes, where: str) -> Any:
    try:
        if data[8:9] == b"{" or where.endswith(".safetensors"):  # a JSON object after its length, as no pickle or zip
            return safetensors.torch.load(data)
    except SafetensorError as error:
        raise DataError(f"{where} is truncated or no safetensors file: {error}") from None
    if not data:
        raise DataError(f"{where} is empty")
    if data[:64].lstrip()[:1] == b"<":
        raise DataError(f"{where} is a web page: download the file itself")
    _require_torch_save(data, where)
    names: list[str] = []
    try:
        names = _unknown_classes(data)
        return _unpickled(data, names)
    except Exception as error:  # torch.load raises pickle, zip, runtime and value errors alike
        if "Unsupported operand" in str(error):
            raise DataError(f"{where} has another pickle_protocol than torch.save's own: save it again") from None
        if names:
            foreign = [name for name in names if name.split(".")[0] not in ("torch", "collections", "builtins")]
            what = f"running what it holds: {listed(foreign or names)}"
            remedy = f"the state_dict() of the network in torch.load({where!r}, weights_only=False)"
            remedy = "" if _HOSTILE.intersection(name.split(".")[0] for name in names) else f"; save {remedy}"
            raise DataError(f"{where} cannot be read without {what}{remedy}") from None
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise DataError(f"{where} is damaged, or no file of torch.save or safetensors ({reason})") from None


def _require_torch_save(data: bytes, where: str) -> None:
    """Raises DataError where ``data`` is something else, or expands to more than its own size."""
    if data.startswith(b"\x80") and _MAGIC not in data[:32]:
        remedy = f"torch.save(pickle.load(open({where!r}, 'rb')), 'weights.pt')"
        raise DataError(f"{where} is a plain pickle, which may run anything; if you trust it: {remedy}")
    if not zipfile.is_zipfile(io.BytesIO(data)):
        return
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {member.filename.rpartition("/")[2]: member.file_size for member in archive.infolist()}
            size = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise DataError(f"{where} is damaged: {error}") from None
    if "constants.pkl" in members:
        remedy = f"torch.save(torch.jit.load({where!r}).state_dict(), 'weights.pt')"
        raise DataError(f"{where} is a TorchScript program, not weights; if you trust it: {remedy}")
    if "data.pkl" not in members:
        raise DataError(f"{where} is a zip archive, but none of torch.save: it holds {listed(members)}")
    if size > len(data):
        raise DataError(f"{where} is compressed, which torch.save never does: save it again")


_DEEPEST = 8
_HOSTILE = {"os", "posix", "nt", "sys", "subprocess"}  # no training loop saves these
_MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")  # of torch.save before 1.6


def _unknown_classes(data: bytes) -> list[str]:
    """The classes and functions that a ``torch.save`` file names and torch does not know as harmless."""
    if data.startswith(b"PK"):
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data)))
    stream, names = io.BytesIO(data), set()
    for _ in range(4):  # the format before 1.6: magic number, protocol, machine, content, each a pickle
        for op, argument, _position in pickletools.genops(stream):
            if op.name == "GLOBAL":
                module, name = str(argument).split(" ", 1)
                module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
                names.add(f"{module}.{name}")
    return sorted(names)  # torch's own among them: it prefers them to any stand-in


def _unpickled(data: bytes, names: Sequence[str]) -> Any:
    """The content by torch's restricted unpickler, with stand-ins for the classes ``names``: none of them is imported
    or called. Raises what torch raises."""
    for last, kind in enumerate((_Items, _Opaque)):
        stand_ins: list[Any] = [(_stand_in(name, kind), name) for name in names]
        try:
            with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception:
            if last or not names:
                raise
    raise AssertionError


def _stand_in(name: str, kind: type) -> Callable[..., Any]:
    if name == "collections.defaultdict":
        return lambda *_: {}
    if name == "collections.deque":
        return lambda *_: []
    return type(name, (_Opaque if name.startswith(("numpy.", "functools.")) else kind,), {})


def _checkpoint(root: Any, where: str) -> Checkpoint:
    tables: dict[str, dict[str, Tensor]] = {}
    waiting, seen = [("", root)], set()
    for path, node in waiting:  # breadth first; a hostile file may contain itself
        if not isinstance(node, Mapping | list | tuple) or id(node) in seen or path.count("/") > _DEEPEST:
            continue
        seen.add(id(node))
        if not isinstance(node, Mapping):
            node = dict(enumerate(node))
        tensors = {name: value for name, value in node.items() if isinstance(name, str) and isinstance(value, Tensor)}
        if tensors:
            tables[path] = tensors
        deeper = [(key, value) for key, value in node.items() if isinstance(value, Mapping | list | tuple)]
        waiting += [(f"{path}/{_key(key)[:160]}".removeprefix("/"), value) for key, value in deeper]
    if not isinstance(root, Mapping) or _is_model(root):
        return Checkpoint(where, tables, {WHOLE: _kind(root)})
    contents = {_key(key)[:60]: _kind(value) for key, value in root.items() if not isinstance(value, Tensor)}
    return Checkpoint(where, tables, contents)


def _is_model(value: Any) -> bool:
    return "_modules" in getattr(value, "__dict__", {})


def _key(key: Any) -> str:
    return str(key) if isinstance(key, str | int | float | None) else _kind(key)


def _kind(value: Any) -> str:
    name = getattr(value, "pickled_class", None)
    if name is None:
        count = f" of {len(value)}" if isinstance(value, Mapping | list | tuple) else ""
        return f"{type(value).__name__}{count}"
    return f"{MODEL} {name}" if _is_model(value) else "numpy array" if name.endswith("._reconstruct") else str(name)


def listed(names: Iterable[object], most: int = 4) -> str:
    """The first ``most`` of ``names``, and how many more."""
    texts = [str(name)[:160] for name in names]
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")
