"""Settings of both stages: bounded, since a recipe may come from somebody else's dataset."""

import importlib.util
import pkgutil
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from annotated_types import Ge, Gt, Le, Lt
from pydantic import ValidationError

import pipeline
import stages
from stages.settings import MAX_TRAJECTORIES, Settings, SynthSettings

MODULES = (
    *("stages.settings", "stages.models.source"),
    *("pipeline.recipe", "pipeline.executors.settings", "pipeline.rates"),
)


def all_settings(kind: type[Settings] = Settings) -> Iterator[type[Settings]]:
    for below in kind.__subclasses__():
        yield below
        yield from all_settings(below)


def numbers(kind: Any, constraints: tuple[Any, ...] = ()) -> Iterator[tuple[type, tuple[Any, ...]]]:
    """(int or float, its constraints) wherever they are in a type: in unions, tuples, dictionaries."""
    if typing.get_origin(kind) is typing.Annotated:
        inner, *found = typing.get_args(kind)
        more = [part for one in found for part in (getattr(one, "metadata", None) or [one])]
        yield from numbers(inner, (*constraints, *more))
    elif kind in (int, float):
        yield kind, constraints
    elif typing.get_origin(kind) is not typing.Literal:
        for inner in typing.get_args(kind):
            yield from numbers(inner, constraints)


def test_every_number_of_every_settings_class_is_bounded():
    for module in MODULES:
        importlib.import_module(module)
    found = [
        (f"{model.__name__}.{name}", constraints)
        for model in set(all_settings())
        if model.__module__ in MODULES  # other tests have settings of their own
        for name, field in model.model_fields.items()
        for _, constraints in numbers(field.annotation, tuple(field.metadata))
    ]
    assert len(found) > 80
    loose = {
        name
        for name, limits in found
        if not any(isinstance(limit, Le | Lt) for limit in limits)
        or not any(isinstance(limit, Ge | Gt) for limit in limits)
    }
    assert loose == set()


def test_no_settings_class_hides_in_another_module():
    for package in (stages, pipeline):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            source = importlib.util.find_spec(module.name)
            text = Path(source.origin).read_text(encoding="utf-8") if source and source.origin else ""
            assert module.name in MODULES or "(Settings)" not in text, module.name


def test_a_dataset_numbers_its_trajectories_with_32_bits():
    half = {"shards": 2**24, "groups_per_shard": 2, "group_size": 2**6}
    assert SynthSettings.model_validate(half).shards * 2 * 2**6 == MAX_TRAJECTORIES
    with pytest.raises(ValidationError, match=f"trajectories: a dataset holds at most {MAX_TRAJECTORIES}"):
        SynthSettings.model_validate(half | {"groups_per_shard": 3})
