"""``--where``: a selection like ``cosine >= 0.75 and teacher_label == label``, compiled to an Arrow expression.

Only comparisons, and/or/not, in, is None, arithmetic, column names and plain constants exist; the text is parsed, never
evaluated. A comparison with a missing value is unknown, and an unknown row is not selected, also under ``not``.
"""

import ast
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from manifests.errors import UsageError, suggest

Kind = Literal["number", "text", "condition", "null"]
_MAX_TEXT = 4096
_MAX_DEPTH = 64
_COMPARE = {
    ast.Eq: pc.equal,
    ast.NotEq: pc.not_equal,
    ast.Lt: pc.less,
    ast.LtE: pc.less_equal,
    ast.Gt: pc.greater,
    ast.GtE: pc.greater_equal,
}
_ARITHMETIC = {ast.Add: pc.add_checked, ast.Sub: pc.subtract_checked, ast.Mult: pc.multiply_checked, ast.Div: pc.divide}
_ALLOWED = "comparisons, and, or, not, in, is None, + - * /, column names and constants"


@dataclass(frozen=True)
class _Term:
    """A compiled piece: its expression and what it yields; the Arrow ``type`` of a column or sum, ``value`` of a
    constant."""

    kind: Kind
    expression: pc.Expression
    type: pa.DataType | None = None
    value: Any = None

    @property
    def real(self) -> bool:
        return isinstance(self.value, float) if self.type is None else pa.types.is_floating(self.type)


def compile_where(text: str, schema: pa.Schema) -> pc.Expression:
    """The Arrow filter of ``text``; :class:`UsageError` for bad syntax, unknown columns, types that never match."""
    term = _Compiler(text, schema).term(_parse(text).body)
    if term.kind != "condition":
        raise UsageError(f"--where {_short(text)}: yields a {term.kind}, expected a condition such as label == 3")
    return term.expression


def columns_of(text: str) -> list[str]:
    """The columns that ``text`` reads, sorted."""
    return sorted({node.id for node in ast.walk(_parse(text)) if isinstance(node, ast.Name)})


def _parse(text: str) -> ast.Expression:
    if len(text) > _MAX_TEXT:
        raise UsageError(f"--where: {len(text)} characters, at most {_MAX_TEXT} are read")
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else error
        raise UsageError(f"--where {_short(text)}: {reason or 'nested too deeply'}; allowed: {_ALLOWED}") from None
    level: list[ast.AST] = [tree]
    for _ in range(_MAX_DEPTH):
        level = [child for node in level for child in ast.iter_child_nodes(node)]
    if level:
        raise UsageError(f"--where {_short(text)}: nested more than {_MAX_DEPTH} deep")
    return tree


def _short(text: str) -> str:
    return repr(text if len(text) <= 120 else f"{text[:117]}...")


class _Compiler:
    def __init__(self, text: str, schema: pa.Schema) -> None:
        self.text, self.schema = text, schema

    def fail(self, reason: str) -> UsageError:
        return UsageError(f"--where {_short(self.text)}: {reason}")

    def term(self, node: ast.expr) -> _Term:
        match node:
            case ast.Name(id=name):
                return self.column(name)
            case ast.Constant(value=value):
                return self.constant(value)
            case ast.BoolOp(op=operator, values=values):
                join = pc.and_kleene if isinstance(operator, ast.And) else pc.or_kleene
                return _Term(
                    "condition", reduce(join, (self.expect("condition", value).expression for value in values))
                )
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return _Term("condition", pc.invert(self.expect("condition", operand).expression))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                inner = self.expect("number", operand)
                if inner.value is not None:
                    return self.constant(-inner.value)
                return self.arithmetic(ast.Mult(), self.constant(-1), inner)
            case ast.BinOp(op=operator, left=left, right=right) if type(operator) in _ARITHMETIC:
                return self.arithmetic(operator, self.expect("number", left), self.expect("number", right))
            case ast.Compare(left=left, ops=operators, comparators=others):
                pairs = zip([left, *others], operators, others, strict=False)
                return _Term("condition", reduce(pc.and_kleene, (self.compare(*pair) for pair in pairs)))
        raise self.fail(f"{ast.unparse(node)[:60]!r} is not allowed here; allowed: {_ALLOWED}")

    def column(self, name: str) -> _Term:
        if name not in self.schema.names:
            raise self.fail(f"unknown column {name!r}; {suggest(name, self.schema.names, len(self.schema))}")
        stored = self.schema.field(name).type
        stored = stored.value_type if pa.types.is_dictionary(stored) else stored
        if pa.types.is_string(stored):  # where it is read as an Arrow dictionary, it must be cast
            return _Term("text", pc.field(name).cast(stored), stored)
        if pa.types.is_boolean(stored):
            return _Term("condition", pc.field(name), stored)
        if pa.types.is_integer(stored) or pa.types.is_floating(stored):
            return _Term("number", pc.field(name), stored)
        raise self.fail(f"column {name!r} holds {stored}: only numbers, text and true/false can be selected on")

    def constant(self, value: Any) -> _Term:
        kinds: dict[type, Kind] = {type(None): "null", bool: "condition", str: "text", int: "number", float: "number"}
        if type(value) not in kinds:
            raise self.fail(f"{value!r} is no number, text, True, False or None")
        try:
            return _Term(kinds[type(value)], pc.scalar(value), value=value)
        except (OverflowError, pa.ArrowInvalid):
            raise self.fail(f"{str(value)[:30]} is too large") from None

    def expect(self, kind: Kind, node: ast.expr) -> _Term:
        term = self.term(node)
        if term.kind != kind:
            raise self.fail(f"{ast.unparse(node)!r} is a {term.kind}, expected a {kind}")
        return term

    def arithmetic(self, operator: ast.operator, left: _Term, right: _Term) -> _Term:
        """Integers stay 64-bit integers where they can; a division is always one of reals."""
        wide = pa.float64() if isinstance(operator, ast.Div) or left.real or right.real else pa.int64()
        operate = _ARITHMETIC[type(operator)]
        return _Term("number", operate(left.expression.cast(wide), right.expression.cast(wide)), wide)

    def compare(self, left: ast.expr, operator: ast.cmpop, right: ast.expr) -> pc.Expression:
        first = self.term(left)
        if isinstance(operator, ast.In | ast.NotIn):
            found = self.member(first, left, right)
            return pc.invert(found) if isinstance(operator, ast.NotIn) else found
        second = self.term(right)
        if isinstance(operator, ast.Is | ast.IsNot):
            if second.kind != "null" or first.type is None:
                raise self.fail("'is' only asks whether a column is None")
            missing = pc.is_null(first.expression)
            return pc.invert(missing) if isinstance(operator, ast.IsNot) else missing
        if "null" in (first.kind, second.kind):
            raise self.fail("a comparison with None is never true: write 'is None' or 'is not None'")
        if first.kind != second.kind:
            raise self.fail(f"{ast.unparse(left)!r} is a {first.kind}, {ast.unparse(right)!r} a {second.kind}")
        if first.kind == "condition" and not isinstance(operator, ast.Eq | ast.NotEq):
            raise self.fail("conditions have no order")
        return _COMPARE[type(operator)](_rounded(first, second), _rounded(second, first))

    def member(self, first: _Term, left: ast.expr, right: ast.expr) -> pc.Expression:
        if not isinstance(right, ast.Tuple | ast.List | ast.Set) or not right.elts:
            raise self.fail("'in' needs a list of constants, such as label in (1, 2)")
        values = [self.term(entry) for entry in right.elts]
        if any(value.value is None or value.kind != first.kind for value in values):
            raise self.fail(f"'in' needs constants of the kind of {ast.unparse(left)!r} ({first.kind})")
        return reduce(pc.or_kleene, (pc.equal(_rounded(first, value), _rounded(value, first)) for value in values))


def _rounded(term: _Term, other: _Term) -> pc.Expression:
    """A constant beside a 32-bit column is rounded as the column was, so ``confidence >= 0.7`` includes 0.7."""
    if term.value is None or other.type != pa.float32():
        return term.expression
    return pc.scalar(pa.scalar(float(term.value), pa.float32()))
