"""A short run of ``benchmarks/fuzz.py``; the long one is run by hand."""

import random

import pytest

from benchmarks import fuzz
from benchmarks.mutations import poisoned


@pytest.mark.timeout(900)
def test_mutated_files_end_in_an_answer_or_one_clear_line():
    found = fuzz.fuzz(cases=40, seed=11)
    assert found["failures"] == []
    assert found["accepted"] + found["refused"] == 40
    assert found["refused"] > 10


def test_a_traceback_is_a_failure(tmp_path, monkeypatch):
    """The harness itself: what a command must not do is seen."""
    (tmp_path / "victim").mkdir()
    monkeypatch.setattr(fuzz, "CASES", ((1, lambda folder, rng: None, (("status", "RUN"),)),))
    for error in (KeyError("x"), MemoryError()):
        monkeypatch.setattr(fuzz.cli, "main", lambda error=error: (_ for _ in ()).throw(error))
        assert fuzz.run_case(tmp_path / "victim", tmp_path / "run", 0, 0)[0] == "failed"
    monkeypatch.setattr(fuzz.cli, "main", lambda: print("\x1b[31m"))
    assert "printed raw" in fuzz.run_case(tmp_path / "victim", tmp_path / "run", 0, 0)[2]


def test_hostile_values_reach_every_place():
    tree = {"a": [1, {"b": 2}], "c": "x"}
    rng = random.Random(0)
    changed = [poisoned(tree, rng) for _ in range(300)]
    assert tree == {"a": [1, {"b": 2}], "c": "x"}
    assert any(isinstance(t, dict) and isinstance(t.get("a"), list) and t["a"][1:] != [{"b": 2}] for t in changed)
    assert any(isinstance(t, dict) and t.get("c", "x") != "x" for t in changed)
