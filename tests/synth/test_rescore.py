"""Columns made again: against hand-computed values."""

import math

import pyarrow as pa
import pytest
import torch

from manifests.schema import SCHEMA, normalize
from stages.synth.scores import renewed


def table(*rows):
    made = []
    for i, changes in enumerate(rows):
        base = {"key": f"000000-{i:06d}", "shard": 0, "offset": 0, "size": 1, "xxh3": bytes(16), "label": 0}
        made.append(normalize({**base, "method": "x", "kept": True, **changes}))
    return pa.Table.from_pylist(made, schema=SCHEMA)


LOGITS = torch.tensor([[math.log(3.0), 0.0], [0.0, math.log(9.0)]])  # 3/4, 1/4 and 1/10, 9/10


def test_columns_by_hand():
    old = table({"confidence": 0.1, "logits": [0, 0]}, {"label": 0, "prompt": "as it was"})
    first, second = renewed(old, LOGITS, None, None, 0.5).to_pylist()
    assert (first["teacher_label"], first["kept"], first["reject_reason"]) == (0, True, None)
    assert first["confidence"] == pytest.approx(0.75)
    assert first["margin"] == pytest.approx(0.5)
    assert first["entropy"] == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert first["logits"] == pytest.approx([math.log(3), 0], abs=1e-3)
    assert (second["teacher_label"], second["kept"], second["logits"]) == (1, False, None)
    assert second["reject_reason"] == "teacher gives its class 0.100 < 0.5"
    assert second["prompt"] == "as it was"


def test_only_rejections_by_the_threshold_are_taken_back():
    old = table({"kept": False, "reject_reason": "teacher gives its class 0.2 < 0.9"}, {"label": 1})
    assert renewed(old, LOGITS, None, None, 0.5)["kept"].to_pylist() == [True, True]
    other = table({"kept": False, "reject_reason": "near the source"}, {"label": 1})
    row = renewed(other, LOGITS, None, None, 0.5).to_pylist()[0]
    assert (row["kept"], row["reject_reason"]) == (False, "near the source")


def test_cosines_go_to_what_they_refer_to():
    same = {"trajectory": 4, "cosine": 0.9, "cosine_space": "teacher"}
    old = table(
        same | {"timestep": 500, "cosine_ref": "final"},
        same | {"timestep": 0, "cosine_ref": "class:1", "label": 1},
        {"cosine": 0.25, "cosine_space": "contrastive", "cosine_ref": "source", "source_key": "000000-000000"},
        {"cosine": 0.5, "cosine_space": "teacher", "cosine_ref": "source", "source_key": "000000-000001"},
        {"cosine": 0.5, "cosine_space": "teacher", "cosine_ref": "source", "source_key": "000009-000000"},
        {},
    )
    features = torch.tensor([[3.0, 4.0], [1.0, 0.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    weights = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    new = renewed(old, torch.zeros(6, 2), features, weights, 0.0).to_pylist()
    assert [row["cosine"] for row in new] == [
        pytest.approx(0.6), pytest.approx(0.0), 0.25, pytest.approx(math.sqrt(0.5)), None, None
    ]  # fmt: skip
    assert [row["cosine_space"] for row in new] == ["teacher", "teacher", "contrastive", "teacher", None, None]
    blind = renewed(old, torch.zeros(6, 2), None, None, 0.0).to_pylist()
    assert [row["cosine"] for row in blind] == [None, None, 0.25, None, None, None]
    assert [row["cosine_ref"] for row in blind][:3] == [None, None, "source"]
    assert [row["kept"] for row in new] == [True, True, False, False, True, True]  # cos > 0.75, where it is known


def test_derived_rows_need_threshold_and_cosine():
    """Four variants of the first row at cosines 1, 1, 0.6, 0.6; the teacher gives them 0.75, 0.1, 0.75, 0.1."""
    derived = {"source_key": "000000-000000", "cosine": 0.9, "cosine_space": "teacher", "cosine_ref": "source"}
    was = {"kept": False, "reject_reason": "cosine with its source 0.100 <= 0.75"}
    both = {"kept": False, "reject_reason": "teacher gives its class 0.2 < 0.5; cosine with its source 0.1 <= 0.75"}
    old = table({}, derived, derived, derived | was, derived | both)
    logits = torch.stack([LOGITS[0], LOGITS[0], LOGITS[1], LOGITS[0], LOGITS[1]])
    features = torch.tensor([[1.0, 0.0], [2.0, 0.0], [1.0, 0.0], [3.0, 4.0], [3.0, 4.0]])
    far = "cosine with its source 0.600 <= 0.75"
    low = "teacher gives its class 0.100 < 0.5"
    new = renewed(old, logits, features, torch.eye(2), 0.5).to_pylist()
    assert [row["reject_reason"] for row in new] == [None, None, low, far, f"{low}; {far}"]
    assert [row["kept"] for row in new] == [True, True, False, False, False]
    assert renewed(old, logits, features, torch.eye(2), 0.0, 0.5)["kept"].to_pylist() == [True] * 5
    blind = renewed(old, logits, None, None, 0.0)["kept"].to_pylist()
    assert blind == [True, True, True, False, False]  # what the filter said stands where it cannot be asked again
