"""JSON files that carry their own checksum, so that a flipped byte is an error instead of another value.

Plans, done records, run and model configurations are sealed. A file without a seal (written by hand, or by an earlier
version) is read as it is.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from manifests.schema import finite_json, load_tree

SEAL = "checksum"


def seal(values: Mapping[str, Any]) -> bytes:
    """``values`` as readable JSON, with the sha256 of their canonical JSON as last entry; NaN and infinity as null."""
    values = finite_json(values)
    return json.dumps({**values, SEAL: _digest(values)}, indent=1, ensure_ascii=False).encode() + b"\n"


def unseal(data: bytes) -> dict[str, Any]:
    """The values of a sealed object. Raises ``ValueError`` for anything else, or where the checksum differs.

    >>> unseal(seal({"a": 1}))
    {'a': 1}
    """
    values = load_tree(data)
    if not isinstance(values, dict):
        raise ValueError("no JSON object")
    recorded = values.pop(SEAL, None)
    if recorded is not None and recorded != _digest(values):
        raise ValueError(f"it was altered: its {SEAL} differs (remove that entry if you changed it yourself)")
    return values


def _digest(values: Mapping[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
