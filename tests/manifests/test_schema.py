import json
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifests.schema import MAX_ROW_JSON, SCHEMA, make_key, normalize, parse_row, row_json, to_table

REQUIRED = {
    "key": "000012-000345",
    "shard": 12,
    "offset": 512,
    "size": 9,
    "xxh3": bytes(range(16)),
    "label": 3,
    "method": "diffdfkd",
    "kept": True,
}


def json_of(row: dict[str, Any]) -> bytes:
    return row_json(normalize(row))


def values(kind: pa.DataType) -> st.SearchStrategy[Any]:
    if pa.types.is_integer(kind):
        half = 1 << kind.bit_width - 1
        return st.integers(-half, half - 1)
    if pa.types.is_floating(kind):
        return st.floats(width=kind.bit_width)
    if pa.types.is_list(kind):
        return st.lists(values(kind.value_type), max_size=3)
    if pa.types.is_struct(kind):
        return st.fixed_dictionaries({field.name: values(field.type) for field in kind})
    if kind == pa.binary(16):
        return st.binary(min_size=16, max_size=16)
    return (
        st.booleans() if pa.types.is_boolean(kind) else st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    )


ROWS = st.fixed_dictionaries(
    {field.name: values(field.type) for field in SCHEMA if not field.nullable},
    optional={field.name: st.none() | values(field.type) for field in SCHEMA if field.nullable},
)


@given(ROWS)
def test_json_and_table_hold_the_same_row(row: dict[str, Any]) -> None:
    full = normalize(row)
    again = parse_row(json_of(row), row["offset"], row["size"])
    assert to_table([full]).equals(to_table([again]))
    assert json_of(again) == json_of(row)
    from_table = to_table([full]).to_pylist()[0]
    assert json_of(from_table) == json_of(row)


def test_a_number_that_is_not_finite_survives_as_null_inside_a_list() -> None:
    row = {"key": "", "shard": 0, "offset": 0, "size": 0, "xxh3": bytes(16), "label": 0, "method": "", "kept": False}
    data = json_of({**row, "logits": [float("inf"), 1.5]})
    assert parse_row(data, 0, 0)["logits"] == [None, 1.5]


def test_columns_are_those_of_the_contract() -> None:
    assert SCHEMA.names[:8] == ["key", "shard", "offset", "size", "xxh3", "label", "class_name", "prompt"]
    assert SCHEMA.field("xxh3").type == pa.binary(16)
    assert SCHEMA.field("logits").type == pa.list_(pa.float16())
    assert make_key(12, 345) == "000012-000345"


def test_row_json_is_readable_and_leaves_placement_out() -> None:
    row = {**REQUIRED, "confidence": np.float32(0.1), "prompt": "é", "lca": [], "cosine": None}
    assert json_of(row).decode() == (
        '{"key":"000012-000345","shard":12,"xxh3":"000102030405060708090a0b0c0d0e0f","label":3,"prompt":"é",'
        '"method":"diffdfkd","lca":[],"confidence":0.1,"kept":true}'
    )


def test_numbers_that_are_not_finite_become_null() -> None:
    row = normalize({**REQUIRED, "loss_ce": math.nan, "entropy": np.float32("inf"), "logits": [1.0, math.inf]})
    assert row["loss_ce"] is None
    assert row["entropy"] is None
    assert row["logits"] == [1.0, None]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"label": "3"}, "'label': expected an integer"),
        ({"label": True}, "'label': expected an integer"),
        ({"label": 1 << 31}, "'label': does not fit 32 bits"),
        ({"label": None}, "'label' must not be null"),
        ({"kept": 1}, "'kept': expected true or false"),
        ({"prompt": 5}, "'prompt': expected text"),
        ({"prompt": "\ud800"}, "'prompt'"),
        ({"xxh3": "00"}, "'xxh3': expected 16 bytes"),
        ({"confidence": "high"}, "'confidence': expected a number"),
        ({"lca": [{"step": 1}]}, "'lca': expected an object with step, timestep"),
        ({"lca": {}}, "'lca': expected a list"),
        ({"__reduce__": 1}, "unknown column '__reduce__'"),
    ],
)
def test_wrong_values_are_named(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        normalize({**REQUIRED, **change})


GOOD = json.loads(json_of(REQUIRED))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"key":' * 5000,
        b" " * (MAX_ROW_JSON + 1),
        json.dumps({**GOOD, "offset": 5}).encode(),
        json.dumps({**GOOD, "extra": 5}).encode(),
        json.dumps({**GOOD, "confidence": math.nan}).encode(),
        json.dumps({**GOOD, "xxh3": "zz" * 16}).encode(),
        json.dumps({k: v for k, v in GOOD.items() if k != "label"}).encode(),
        json.dumps(GOOD).replace('"label": 3', '"label": ' + "9" * 5000).encode(),
        json.dumps(GOOD).replace('"label": 3', '"label": 1e999').encode(),
    ],
)
def test_hostile_json_is_one_clear_error(data: bytes) -> None:
    with pytest.raises(ValueError) as caught:
        parse_row(data, 0, 0)
    assert "\n" not in str(caught.value)
