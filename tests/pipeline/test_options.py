"""How commands answer: whatever a file holds, nothing printed can steer a terminal."""

import json
from dataclasses import dataclass
from typing import Any

import pytest

from pipeline.terminal import show

HOSTILE = "\x1b[2J\x9b31m\u202e\x7f\nnext"


@dataclass
class Answer:
    value: Any

    def lines(self):
        return self.value


def test_lines_are_defused_even_where_a_command_forgot(capsys):
    show(Answer([f"class {HOSTILE}", "é 猫"]))
    out = capsys.readouterr().out
    assert out.splitlines() == ["class \\x1b[2J\\x9b31m\\u202e\\x7f", "next", "é 猫"]


def test_json_is_defused_and_says_the_same(capsys):
    result = {HOSTILE: [HOSTILE, "é 猫"]}
    show(Answer(result), True)
    out = capsys.readouterr().out
    assert all(line.isprintable() for line in out.splitlines())
    assert json.loads(out) == {"value": result}
    assert "é 猫" in out


def test_json_has_no_numbers_that_json_lacks(capsys):
    show(Answer({"loss": float("nan"), "seen": [1.5, float("inf"), {"x": -float("inf")}]}), True)
    found = json.loads(capsys.readouterr().out, parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    assert found == {"value": {"loss": None, "seen": [1.5, None, {"x": None}]}}
