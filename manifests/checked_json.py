"""JSON that every reader takes: finite numbers only, bounded depth, and files that carry their own checksum.

Plans, done records, run and model configurations carry one. A file without one (written by hand) is read as it is.
Imports no pyarrow, so that the command line starts quickly.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")

DEEPEST = 32
"""Levels of the JSON that describes a dataset, a run or a model; our own has 7."""

SEAL = "checksum"


def _refuse(text: str) -> None:
    raise ValueError(f"{text} is not allowed")


_FINITE, _ANY = json.JSONDecoder(parse_constant=_refuse), json.JSONDecoder()


def load_json(data: bytes, finite: bool = True) -> Any:
    """Strict JSON: UTF-8, sane depth, ``finite`` numbers. Raises ``ValueError`` only."""

    try:
        return (_FINITE if finite else _ANY).decode(data.decode("utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def dump_json(values: Any, indent: int | None = None, ensure_ascii: bool = True) -> str:
    """JSON that every reader takes: numbers that are not finite become null, as in the rows of a manifest.

    >>> dump_json({"loss": float("nan"), "seconds": [1.5, float("inf")]})
    '{"loss": null, "seconds": [1.5, null]}'
    """
    return json.dumps(finite_json(values), indent=indent, ensure_ascii=ensure_ascii, allow_nan=False)


def finite_json(value: Any) -> Any:
    """``value`` with null in place of every number that is not finite."""
    if isinstance(value, Mapping):
        return {key: finite_json(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [finite_json(child) for child in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def load_tree(data: bytes, finite: bool = True) -> Any:
    """:func:`load_json` for files that are walked, stored and printed later: at most ``DEEPEST`` levels, every number
    ``finite`` (``1e999`` is not), all text encodable. Raises ``ValueError`` only."""
    values = load_json(data, finite)
    level = [values]
    for _ in range(DEEPEST):
        if not level:
            return values
        for value in level:
            if finite and isinstance(value, float) and not math.isfinite(value):
                raise ValueError("a number is not finite")
            if isinstance(value, str):
                value.encode()
        level = [child for value in level for child in _children(value)]
    raise ValueError(f"nested more than {DEEPEST} deep")


def is_text(value: str) -> bool:
    """Whether ``value`` can be stored: half of a surrogate pair cannot. Python has such halves for bytes of a file's
    name or an argument that are no UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value, *value.values()]
    return value if isinstance(value, list) else []


def dump_checked(values: Mapping[str, Any]) -> bytes:
    """``values`` as readable JSON, with the sha256 of their canonical JSON as last entry; NaN and infinity as null."""
    values = finite_json(values)
    return json.dumps({**values, SEAL: _digest(values)}, indent=1, ensure_ascii=False).encode() + b"\n"


def load_checked(data: bytes) -> dict[str, Any]:
    """The values of a sealed object. Raises ``ValueError`` for anything else, or where the checksum differs.

    >>> load_checked(dump_checked({"a": 1}))
    {'a': 1}
    """
    values = load_tree(data)
    if not isinstance(values, dict):
        raise ValueError("no JSON object")
    recorded = values.pop(SEAL, None)
    if recorded is not None and recorded != _digest(values):
        raise ValueError(f"it was altered: its {SEAL} differs (remove that entry if you changed it yourself)")
    return values


def load_as(kind: type[T], values: Any) -> T:
    """``values`` as the dataclass ``kind``, its annotations checked. Raises ``ValueError`` in one line."""
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        raise ValueError(first_fault(error)) from None


def first_fault(error: ValidationError) -> str:
    """The first fault that pydantic found and where, in one line whatever the keys of a file are called."""
    first = error.errors()[0]
    return " ".join(": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"]))).split())


def _digest(values: Mapping[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
