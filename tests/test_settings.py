"""Settings of both stages: bounded, since a recipe may come from somebody else's dataset."""

import types
import typing
from collections.abc import Iterator
from typing import Any

import pytest
from annotated_types import Le, Lt
from pydantic import BaseModel, ValidationError

from stages.settings import MAX_TRAJECTORIES, DistillSettings, SynthSettings


def fields(model: type[BaseModel], path: str) -> Iterator[tuple[str, Any, list[Any]]]:
    """(key, type, constraints) of every field below ``model``, unions taken apart."""
    for name, field in model.model_fields.items():
        union = typing.get_origin(field.annotation) in (typing.Union, types.UnionType)
        for kind in typing.get_args(field.annotation) if union else (field.annotation,):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from fields(kind, f"{path}.{name}")
            else:
                yield f"{path}.{name}", kind, field.metadata


@pytest.mark.parametrize(("model", "path"), [(SynthSettings, "synth"), (DistillSettings, "distill")])
def test_every_integer_has_an_upper_bound(model, path):
    integers = {key: constraints for key, kind, constraints in fields(model, path) if kind is int}
    assert len(integers) >= 6
    assert [key for key, found in integers.items() if not any(isinstance(c, Le | Lt) for c in found)] == []


def test_a_dataset_numbers_its_trajectories_with_32_bits():
    half = {"shards": 2**24, "groups_per_shard": 2, "group_size": 2**6}
    assert SynthSettings.model_validate(half).shards * 2 * 2**6 == MAX_TRAJECTORIES
    with pytest.raises(ValidationError, match=f"trajectories: a dataset holds at most {MAX_TRAJECTORIES}"):
        SynthSettings.model_validate(half | {"groups_per_shard": 3})
