"""Layers of settings, each value with its origin, so that an error names the key *and* the place it came from.

Used by every command that reads a recipe: packaged or user YAML < ``FACTORY_*`` environment < ``--set`` < flags.
"""

import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from manifests.checked_json import is_text
from manifests.errors import UsageError, suggest
from manifests.plain_files import load_yaml

Path = tuple[str, ...]
Model = TypeVar("Model", bound=BaseModel)
ENV_PREFIX = "FACTORY_"
ENV_NESTING = "__"


@dataclass(frozen=True)
class Layer:
    """Settings in the order in which they were set: key path, value, and the place that set it (``recipe.yaml:12``,
    ``--set seed=x``). Mappings are spelled out key by key and merge; every other value replaces."""

    entries: tuple[tuple[Path, Any, str], ...] = ()

    def over(self, lower: "Layer") -> "Layer":
        """This layer laid over ``lower``."""
        return Layer(lower.entries + self.entries)

    @property
    def values(self) -> dict[str, Any]:
        """All settings, nested."""
        root: dict[str, Any] = {}
        for path, value, _ in self.entries:
            at = root
            for part in path if value == {} else path[:-1]:
                if not isinstance(at.get(part), dict):
                    at[part] = {}
                at = at[part]
            if value != {}:
                at[path[-1]] = value
        return root

    def value(self, path: Path) -> Any:
        """What ``path`` is set to, None where it is not."""
        return next((value for key, value, _ in reversed(self.entries) if key == path), None)

    def without(self, path: Path) -> "Layer":
        """This layer without ``path`` and what lies below it."""
        return Layer(tuple(entry for entry in self.entries if entry[0][: len(path)] != path))

    def origin(self, path: Path) -> str:
        """The place that last set ``path`` or something below it, or else the nearest key above it."""
        places = [(tuple(map(str, key)), place) for key, _, place in self.entries]
        inside = [place for key, place in places if path and key[: len(path)] == path]
        above = sorted((len(key), at) for at, (key, _) in enumerate(places) if key == path[: len(key)])
        return inside[-1] if inside else places[above[-1][1]][1] if above else "defaults"


EMPTY = Layer()


def mapping_layer(values: Any, name: str, path: Path = (), lines: Mapping[Path, str] | None = None) -> Layer:
    """``values``, stored in a manifest, say, at ``path``: all set by ``name``, or by what ``lines`` says of a key."""
    where = (lines or {}).get(tuple(map(str, path)), name)
    if not isinstance(values, Mapping):
        return Layer(((path, values, where),))
    inner = (mapping_layer(values[key], name, (*path, key), lines).entries for key in values)
    return Layer(((path, {}, where), *chain.from_iterable(inner)))


def yaml_layer(text: str | bytes, name: str) -> Layer:
    """Settings of a YAML file called ``name``; errors as :func:`manifests.plain_files.load_yaml`, and for a top level
    that is no mapping."""
    values, lines = load_yaml(text, name)
    if values is None:
        return EMPTY
    if not isinstance(values, dict):
        kind = "a list" if isinstance(values, list) else "text" if isinstance(values, str) else type(values).__name__
        raise UsageError(f"{name}: a recipe is a mapping of keys, found {kind}")
    return mapping_layer(values, name, lines={path: f"{name}:{line}" for path, line in lines.items()})


def env_layer(environ: Mapping[str, str], model: type[BaseModel], sections: Sequence[str]) -> Layer:
    """``FACTORY_SYNTH__GUIDANCE__STEP_SIZE=0.2`` sets ``synth.guidance.step_size``.

    Variables without a double underscore are not settings (``FACTORY_WORKERS`` belongs to a flag). One whose first
    part is no section of the recipe is refused rather than ignored; one for a section that the command does not use
    is ignored.
    """
    layer = EMPTY
    for name in sorted(environ):
        if not name.startswith(ENV_PREFIX) or ENV_NESTING not in name:
            continue
        path = tuple(part.lower() for part in name.removeprefix(ENV_PREFIX).split(ENV_NESTING))
        if path[0] not in model.model_fields:
            sets = [f"{ENV_PREFIX}{s.upper()}{ENV_NESTING}…" for s in sections]
            raise UsageError(f"environment: {name} sets nothing; settings start with {' or '.join(sets)}")
        if path[0] in sections:
            layer = assignment(path, environ[name], model, f"environment {name}").over(layer)
    return layer


def set_layer(
    texts: Iterable[str],
    model: type[BaseModel],
    home: str | None = None,
    sections: Sequence[str] | None = None,
    label: str = "--set ",
) -> Layer:
    """``guidance.step_size=0.2`` or ``synth.guidance.step_size=0.2``; later ones win.

    A key without its section belongs to ``home`` (the command's own); without a home, to the only one of ``sections``
    (all, unless given) that has such a key. Raises UsageError for a section that is not among ``sections``.
    """
    layer, sections = EMPTY, sections or list(model.model_fields)
    for text in texts:
        key, equals, value = text.partition("=")
        path = tuple(key.strip().split("."))
        if not equals or not key.strip():
            raise UsageError(f"{label}{text}: write it as KEY=VALUE, for example {label}synth.seed=1")
        if path[0] not in model.model_fields:
            homes = [home] if home else [name for name in sections if _types_at(model, (name, *path))]
            path = (*homes, *path) if len(homes) == 1 else path
        elif len(path) > 1 and path[0] not in sections:
            raise UsageError(f"{label}{text}: nothing here reads {path[0]}; keys start with {' or '.join(sections)}")
        layer = assignment(path, value, model, f"{label}{text}").over(layer)
    return layer


def flag_layer(flags: Mapping[str, tuple[str, Any]]) -> Layer:
    """``{"synth.shards": ("--shards", 8)}``; flags that were not given (None) set nothing."""
    layer = EMPTY
    for key, (flag, value) in flags.items():
        if value is not None:
            layer = mapping_layer(value, flag, tuple(key.split("."))).over(layer)
    return layer


def assignment(path: Path, text: str, model: type[BaseModel], origin: str) -> Layer:
    """One value given as text. A field that holds text takes it as it is; every other is read as YAML."""
    value: Any = text
    types_ = _types_at(model, path)
    if text in ("null", "none", "") and type(None) in types_:
        value = None
    elif str not in types_:
        with suppress(UsageError):  # as it is, pydantic names the type that it wants
            value = load_yaml(text, origin)[0]
    return mapping_layer(value, origin, path)


def validate(model: type[Model], layer: Layer) -> Model:
    """The model of ``layer``; UsageError in one line naming key, place, and near matches."""
    for path, value, place in layer.entries:
        if not all(is_text(text) for text in (*path, value) if isinstance(text, str)):
            raise UsageError(f"{place}: {'.'.join(map(str, path))}: expected text in UTF-8")
    try:
        return model.model_validate(layer.values)
    except ValidationError as error:
        problems = [explain(model, layer, problem) for problem in error.errors(include_url=False)]
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UsageError(problems[0] + more) from None


def explain(model: type[BaseModel], layer: Layer, problem: Mapping[str, Any]) -> str:
    """One pydantic problem as a line: place, key, what is wrong, what would be right."""
    path = tuple(str(part) for part in problem["loc"])
    key = ".".join(path)
    where = layer.origin(path[:-1] if problem["type"] == "missing" else path)  # what is missing was set nowhere
    head = f"{where}: {key}" if key else where
    if problem["type"] == "extra_forbidden":
        keys = [tuple(known.split(".")) for known in dotted_keys(model)]
        elsewhere = [".".join(known) for known in keys if known[-1] == path[-1]]
        near = [known for known in elsewhere if known.startswith(f"{path[0]}.")] or elsewhere
        meant = f"did you mean {' or '.join(near[:4])}?" if near else ""
        beside = [known[-1] for known in keys if known[:-1] == path[:-1]]
        return f"{head}: unknown key; {meant or suggest(path[-1], beside)}"
    if problem["type"] == "missing":
        return f"{head}: this key is needed"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "literal_error" and (names := re.findall(r"'([^']*)'", problem["ctx"]["expected"])):
        return f"{head}: unknown value {problem.get('input')!r:.100}; {suggest(str(problem.get('input')), names)}"
    given = problem.get("input")
    shown = isinstance(given, str | int | float | bool) and problem["type"] != "value_error"
    return f"{head}: {message[:1].lower()}{message[1:]}" + (f", got {given!r:.100}" if shown else "")


def dotted_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """``synth.guidance.step_size`` and every other key of ``model``, sections included."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for kind in _members(field.annotation):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from dotted_keys(kind, f"{prefix}{name}.")


def _types_at(model: type[BaseModel], path: Path) -> list[Any]:
    """The types that the field at ``path`` accepts, unions taken apart, literals by the type of their values; empty
    where there is no such field."""
    found: list[Any] = [model]
    for part in path:
        owner = next((t for t in found if isinstance(t, type) and issubclass(t, BaseModel)), None)
        if owner is None or part not in owner.model_fields:
            return []
        found = _members(owner.model_fields[part].annotation)
    return found


def _members(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [inner for member in typing.get_args(annotation) for inner in _members(member)]
    if typing.get_origin(annotation) is typing.Annotated:
        return _members(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) is typing.Literal:
        return [type(value) for value in typing.get_args(annotation)]
    return [annotation]
