"""The state of a run on disk: written at once or not at all, and only ever resumed by the run that wrote it."""

import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from manifests.checked_json import dump_checked, load_checked
from manifests.errors import DataError, FactoryError
from manifests.storage import Storage
from stages.memory import out_of_memory

RUN, STATE = "run.json", "checkpoint.pt"
REMEDY = "delete it to start over"
ABSENT = object()
TRAILER = b"\nsha256:"
"""Begins the end of a checkpoint: torch does not compare the checksums inside its zip files."""


@contextmanager
def damage_reported(storage: Storage, name: str, remedy: str) -> Iterator[None]:
    """Within the block the file ``name`` is parsed; what fails becomes one DataError that ends with the ``remedy``."""
    try:
        yield
    except FactoryError:
        raise
    except Exception as error:  # JSON, zip, pickle, safetensors, torch and type errors alike
        if out_of_memory(error):  # says nothing about the file
            raise
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise DataError(f"{storage.path(name)} is damaged ({reason[:200]}): {remedy}") from None


def open_run(storage: Storage, spec: Mapping[str, Any]) -> None:
    """Claim the folder for ``spec`` (what decides the result), or check that it is this very run's.

    A run that never reached a checkpoint is replaced. Raises DataError listing what differs from one that did.
    """
    data = dump_checked(spec)
    if storage.create(RUN, data):
        return
    with damage_reported(storage, RUN, "use another folder"):
        recorded = load_checked(storage.read(RUN))
    changed = differences(recorded, load_checked(data))
    if changed and not storage.exists(STATE):
        storage.write(RUN, data)
    elif changed:
        more = f"; and {len(changed) - 6} more" if len(changed) > 6 else ""
        raise DataError(
            f"{storage.url} holds another run: {'; '.join(changed[:6])}{more}. Use the same settings, or another folder"
        )


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """What changed between two JSON values, one entry a leaf.

    >>> differences({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}, "d": None})
    ['b.c: 2 -> 3', 'd: absent -> null']
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        pairs = ((key, old.get(key, ABSENT), new.get(key, ABSENT)) for key in sorted({*old, *new}))
        return [line for key, a, b in pairs for line in differences(a, b, f"{where}.{key}".lstrip("."))]
    before, after = ("absent" if side is ABSENT else json.dumps(side) for side in (old, new))
    return [] if old == new else [f"{where}: {before} -> {after}"]


def save(storage: Storage, state: Mapping[str, Any]) -> None:
    """Replace the checkpoint: a kill leaves the old one or the new one."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    storage.write(STATE, with_digest(buffer.getvalue()))


def with_digest(data: bytes) -> bytes:
    """``data`` and its sha256; ``torch.load`` passes over the end."""
    return data + TRAILER + hashlib.sha256(data).hexdigest().encode()


def without_digest(data: bytes) -> bytes:
    """The inverse of :func:`with_digest`. Raises ValueError where ``data`` is torn or altered."""
    content, trailer, digest = data.rpartition(TRAILER)
    if not trailer:
        raise ValueError("it is torn: its checksum is missing")
    if hashlib.sha256(content).hexdigest().encode() != digest:
        raise ValueError("it was altered: its checksum differs")
    return content


def parse(data: bytes, storage: Storage, device: torch.device) -> dict[str, Any]:
    """What :func:`save` was given, from the bytes of :data:`STATE`. Raises DataError where that is damaged, before
    anything of it is used."""
    with damage_reported(storage, STATE, REMEDY):
        state: dict[str, Any] = torch.load(io.BytesIO(without_digest(data)), map_location=device, weights_only=True)
        for name, kind in {"step": int, "seconds": float, "waited": float, "students": dict}.items():
            if not isinstance(state[name], kind) or (kind is int and state[name] < 0):
                raise ValueError(f"its {name} cannot be {str(state[name])[:40]!r}")
    return state
