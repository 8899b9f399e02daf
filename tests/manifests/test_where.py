import math
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests.errors import UsageError
from manifests.schema import SCHEMA
from manifests.where import columns_of, compile_where

SMALL = pa.schema(
    [
        ("label", pa.int32()),
        ("step", pa.int16()),
        ("confidence", pa.float32()),
        ("class_name", pa.string()),
        ("kept", pa.bool_()),
    ]
)
ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "label": st.none() | st.integers(-3, 3),
            "step": st.none() | st.integers(-3, 3),
            "confidence": st.none() | st.sampled_from([0.0, 0.25, 0.5, 1.0]),
            "class_name": st.none() | st.sampled_from(["a", "b", "it's", "ü"]),
            "kept": st.none() | st.booleans(),
        }
    ),
    max_size=8,
)
NUMBERS = st.sampled_from(["label", "step", "confidence", "1", "-2", "0.5", "label + step", "-label * 2", "step - 0.5"])
COMPARISONS = st.builds(
    lambda a, op, b: f"{a} {op} {b}", NUMBERS, st.sampled_from(["==", "!=", "<", "<=", ">", ">="]), NUMBERS
)
ATOMS = st.one_of(
    COMPARISONS,
    st.builds(lambda a, b, c: f"{a} < {b} <= {c}", NUMBERS, NUMBERS, NUMBERS),
    st.sampled_from(
        [
            "kept",
            "kept == True",
            "class_name == 'a'",
            'class_name != "it\'s"',
            "class_name >= 'b'",
            "class_name in ('a', 'ü')",
            "label in [1, 2]",
            "label not in (0, -1)",
            "confidence is None",
            "class_name is not None",
        ]
    ),
)
CONDITIONS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.builds(lambda a: f"not ({a})", inner),
        st.builds(lambda a, b: f"({a}) and ({b})", inner, inner),
        st.builds(lambda a, b: f"({a}) or ({b})", inner, inner),
    ),
    max_leaves=4,
)


def reference(text: str, row: dict[str, Any]) -> bool:
    """Evaluate with unknowns: walk the same grammar, slowly and obviously."""
    import ast
    import operator as op

    compare = {ast.Eq: op.eq, ast.NotEq: op.ne, ast.Lt: op.lt, ast.LtE: op.le, ast.Gt: op.gt, ast.GtE: op.ge}
    arithmetic = {ast.Add: op.add, ast.Sub: op.sub, ast.Mult: op.mul}

    def both(values: list[Any]) -> Any:
        return False if any(v is False for v in values) else None if any(v is None for v in values) else True

    def run(node: ast.expr) -> Any:
        match node:
            case ast.Name():
                return row[node.id]
            case ast.Constant():
                return node.value
            case ast.UnaryOp(op=ast.Not()):
                value = run(node.operand)
                return None if value is None else not value
            case ast.UnaryOp():
                value = run(node.operand)
                return None if value is None else -value
            case ast.BinOp():
                left, right = run(node.left), run(node.right)
                return None if left is None or right is None else arithmetic[type(node.op)](left, right)
            case ast.BoolOp():
                values = [run(value) for value in node.values]
                if isinstance(node.op, ast.And):
                    return both(values)
                flipped = both([None if value is None else not value for value in values])
                return None if flipped is None else not flipped
            case ast.Compare():
                operands = [node.left, *node.comparators]
                return both([pair(operands[i], kind, operands[i + 1]) for i, kind in enumerate(node.ops)])
        raise AssertionError(ast.dump(node))

    def pair(left: ast.expr, kind: ast.cmpop, right: ast.expr) -> Any:
        if isinstance(kind, ast.Is | ast.IsNot):
            return (run(left) is None) == isinstance(kind, ast.Is)
        if isinstance(kind, ast.In | ast.NotIn):
            assert isinstance(right, ast.Tuple | ast.List)
            value = run(left)
            found = None if value is None else value in [run(entry) for entry in right.elts]
            return found if found is None or isinstance(kind, ast.In) else not found
        a, b = run(left), run(right)
        return None if a is None or b is None else compare[type(kind)](a, b)

    return run(ast.parse(text, mode="eval").body) is True


@settings(max_examples=300, deadline=None)
@given(rows=ROWS, text=CONDITIONS)
def test_a_selection_is_the_filter_that_python_would_apply(rows: list[dict[str, Any]], text: str) -> None:
    table = pa.Table.from_pylist(rows, schema=SMALL)
    expected = [row for row in rows if reference(text, row)]
    assert table.filter(compile_where(text, SMALL)).to_pylist() == expected


def test_dictionary_columns_select_like_text() -> None:
    table = pa.table({"class_name": pa.array(["a", "b", None, "a"]).dictionary_encode()})
    for text, count in (("class_name == 'a'", 2), ("class_name in ('b', 'c')", 1), ("class_name > 'a'", 1)):
        assert table.filter(compile_where(text, table.schema)).num_rows == count


def test_constants_are_rounded_like_the_column() -> None:
    table = pa.table({"confidence": pa.array([0.1, 0.7, None], pa.float32())})
    for text, count in (("confidence == 0.1", 1), ("confidence >= 0.7", 1), ("confidence in (0.1, 0.7)", 2)):
        assert table.filter(compile_where(text, table.schema)).num_rows == count


def test_division_is_one_of_reals() -> None:
    table = pa.table({"label": pa.array([1, 0, 3], pa.int32())})
    assert table.filter(compile_where("label / 2 == 0.5", table.schema)).num_rows == 1
    assert table.filter(compile_where("1 / label > 1e300", table.schema)).num_rows == 1
    assert math.isinf(1e400)


def test_columns_are_found_for_projection() -> None:
    assert columns_of("cosine >= 0.75 and teacher_label == label or label in (1,)") == [
        "cosine",
        "label",
        "teacher_label",
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("lable == 1", r"unknown column 'lable'; did you mean label"),
        ("nothing == 1", "unknown column 'nothing'; there are: key"),
        ("label = 1", "invalid syntax"),
        ("", "invalid syntax"),
        ("label", "yields a number, expected a condition"),
        ("label == 'a'", "'label' is a number, \"'a'\" a text"),
        ("kept + 1 > 0", "'kept' is a condition, expected a number"),
        ("label and kept", "'label' is a number, expected a condition"),
        ("kept < True", "conditions have no order"),
        ("cosine == None", "write 'is None'"),
        ("label is 3", "'is' only asks"),
        ("label in 3", "'in' needs a list"),
        ("label in ()", "'in' needs a list"),
        ("label in ('a',)", "constants of the kind"),
        ("label in (step,)", "constants of the kind"),
        ("lca == 1", "only numbers, text and true/false"),
        ("xxh3 == b'0'", "only numbers, text and true/false"),
        ("label == 9999999999999999999999", "too large"),
        ("label ** 2 == 4", "is not allowed here"),
        ("label.real == 1", "is not allowed here"),
        ("__import__('os').system('true') == 0", "is not allowed here"),
        ("(lambda: True)()", "is not allowed here"),
        ("[x for x in (1,)] == 1", "is not allowed here"),
        ("label == 1j", "is no number"),
        ("not " * 900 + "kept", "deep"),
        ("(" * 900 + "kept" + ")" * 900, "nested|parenthes"),
        ("-" * 900 + "label == 1", "deep"),
        ("label" + " + 1" * 900 + " == 1", "deep"),
        ("kept or " * 600 + "kept", "4096 are read"),
        ("label == 1\0", "null byte|invalid"),
    ],
)
def test_bad_expressions_are_usage_errors_in_one_line(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as caught:
        compile_where(text, SCHEMA)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700
