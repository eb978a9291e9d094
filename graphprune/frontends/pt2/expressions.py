"""Sizes written as expressions: what may stand in one before sympy is let near it.

``torch.export`` stores a size that isn't fixed as text, such as
``FloorDiv(Symbol('s77', positive=True, integer=True), Integer(2))``, and sympy reads text by
running it as Python. Allowed are symbols, numbers, arithmetic, comparisons and the functions that
PyTorch itself has for sizes: no attributes, no subscripts, no text but a symbol's name or a number.
"""

from __future__ import annotations

import ast
import math
import re
from dataclasses import dataclass

from graphprune.errors import GraphPruneError

_LENGTH = 50_000
_NODES = 10_000
_DEPTH = 150
_BITS = 4096
"""Of a number that sympy may compute; a symbol counts as one of 64."""
_TERMS = 100_000
"""Of a sum that sympy may multiply out."""

_SYMBOL = re.compile(r"[A-Za-z][A-Za-z0-9]*(_[A-Za-z0-9]+)*")
_BARE = re.compile(r"(s|u|zf|zuf|ps|i)\d{1,9}")
_NUMBER = re.compile(r"[+-]?(\d{1,40}(\.\d{0,40})?(e[+-]?\d{1,4})?|inf|nan)")

_SUMS = frozenset({"Add"})
_PRODUCTS = frozenset({"Mul", "FloatTrueDiv", "IntTrueDiv"})
_POWERS = frozenset({"Pow", "PowByNatural", "FloatPow", "LShift"})
_OTHERS = frozenset(
    "Max Min Mod PythonMod FloorDiv CleanDiv CeilDiv ModularIndexing RShift Where ITE Piecewise "
    "ExprCondPair Abs floor ceiling sign sqrt exp log FloorToInt CeilToInt TruncToInt TruncToFloat "
    "RoundToInt RoundDecimal ToFloat Identity IsNonOverlappingAndDenseIndicator And Or Not Xor "
    "Equality Unequality Eq Ne Lt Le Gt Ge StrictLessThan StrictGreaterThan LessThan GreaterThan "
    "Relational BitwiseFn_bitwise_and BitwiseFn_bitwise_or BitwiseFn_bitwise_xor "
    "BitwiseFn_bitwise_not".split()
)
_OPAQUE = re.compile(r"OpaqueUnaryFn_[a-z0-9]{1,10}")
_CONSTANTS = frozenset(
    "oo int_oo zoo nan E pi I true false True False "
    "BooleanTrue BooleanFalse NegativeInfinity Infinity".split()
)


class ExpressionError(GraphPruneError):
    """An expression has more in it than sizes are made of."""


@dataclass(frozen=True)
class _Growth:
    """How large what an expression stands for can become.

    Attributes:
        bits: of the number.
        terms: of the sum, when it is multiplied out.
    """

    bits: int = 64
    terms: int = 1


def check_expression(text: str) -> None:
    """See that text is nothing but arithmetic on symbols and numbers, of a size to compute with.

    Raises:
        ExpressionError: it is more.
    """
    if len(text) > _LENGTH:
        raise _refused(f"it has {len(text):,} characters")
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise _refused("it can't be parsed") from error
    if sum(1 for _ in ast.walk(tree)) > _NODES:
        raise _refused("it has too many parts")
    _measure(tree.body, 0)


def is_symbol(name: object) -> bool:
    """Whether something can be the name of a symbol."""
    return isinstance(name, str) and len(name) <= 100 and _SYMBOL.fullmatch(name) is not None


def _measure(node: ast.expr, depth: int) -> _Growth:
    if depth > _DEPTH:
        raise _refused("it is nested too deeply")
    if isinstance(node, ast.Constant):
        return _number(node.value)
    if isinstance(node, ast.Name):
        if node.id not in _CONSTANTS and not _BARE.fullmatch(node.id):
            raise _refused(f"{node.id[:60]} is no symbol")
        return _Growth()
    if isinstance(node, ast.Call):
        return _call(node, depth)
    if isinstance(node, ast.BinOp):
        return _operation(node, depth)
    if isinstance(node, ast.UnaryOp | ast.Compare | ast.BoolOp):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                inner = _measure(child, depth + 1)
        return inner if isinstance(node, ast.UnaryOp) else _Growth(1)
    if isinstance(node, ast.Tuple):  # a case of Piecewise
        for child in node.elts:
            _measure(child, depth + 1)
        return _Growth()
    raise _refused(f"it has a {type(node).__name__}")


def _number(value: object) -> _Growth:
    if isinstance(value, bool | float):
        return _Growth()
    if isinstance(value, int) and value.bit_length() <= 256:
        return _Growth(max(1, value.bit_length()))
    raise _refused("it has text or a huge number in it")


def _operation(node: ast.BinOp, depth: int) -> _Growth:
    left, right = _measure(node.left, depth + 1), _measure(node.right, depth + 1)
    if isinstance(node.op, ast.Add | ast.Sub):
        return _limited(_sum([left, right]))
    if isinstance(node.op, ast.Mult | ast.Div):
        return _limited(_product([left, right]))
    if isinstance(node.op, ast.Pow | ast.LShift):
        return _power(left, node.right)
    if isinstance(node.op, ast.FloorDiv | ast.Mod | ast.RShift | ast.BitAnd | ast.BitOr):
        return _Growth(max(left.bits, right.bits))
    raise _refused(f"it has a {type(node.op).__name__}")


def _call(node: ast.Call, depth: int) -> _Growth:
    name = node.func.id if isinstance(node.func, ast.Name) else ""
    if name in ("Symbol", "Dummy", "Wild"):
        _check_symbol(node)
        return _Growth()
    if name in ("Integer", "Float", "Rational"):
        return _literal(node)
    if any(keyword.arg != "evaluate" for keyword in node.keywords):
        raise _refused("a function has keywords")
    for keyword in node.keywords:
        _measure(keyword.value, depth + 1)
    parts = [_measure(argument, depth + 1) for argument in node.args]
    if name in _SUMS:
        return _limited(_sum(parts))
    if name in _PRODUCTS:
        return _limited(_product(parts))
    if name in _POWERS and len(parts) == 2:
        return _power(parts[0], node.args[1])
    if name in _OTHERS or _OPAQUE.fullmatch(name):
        return _Growth(max((one.bits for one in parts), default=1))
    raise _refused(f"it calls {name[:60] or 'something that has no name'}")


def _check_symbol(node: ast.Call) -> None:
    """``Symbol('s0', positive=True, integer=True)``."""
    first = node.args[0] if len(node.args) == 1 else None
    if not (isinstance(first, ast.Constant) and is_symbol(first.value)):
        raise _refused("the name of a symbol is none")
    for keyword in node.keywords:
        value = keyword.value.value if isinstance(keyword.value, ast.Constant) else ""
        plain = int | None if keyword.arg == "dummy_index" else bool | None
        if keyword.arg is None or not isinstance(value, plain):
            raise _refused("a symbol has other properties than true and false")


def _literal(node: ast.Call) -> _Growth:
    """``Integer(2)``, ``Rational(1, 2)`` and ``Float('0.5', precision=53)``."""
    bits = [1]
    for argument in node.args:
        value = _constant(argument)
        if isinstance(value, str):
            if not _NUMBER.fullmatch(value):
                raise _refused("a number is none")
            bits.append(160)
        else:
            bits.append(_number(value).bits)
    for keyword in node.keywords:
        value = _constant(keyword.value)
        if keyword.arg not in ("precision", "dps") or not isinstance(value, int) or value > 1000:
            raise _refused("a number has other properties than a precision")
    return _Growth(max(bits))


def _constant(node: ast.expr) -> object:
    """A number, perhaps with a sign, or text."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _constant(node.operand)
        if not isinstance(value, int | float):
            raise _refused("a number is none")
        return -value if isinstance(node.op, ast.USub) else value
    if not isinstance(node, ast.Constant):
        raise _refused("a number is none")
    return node.value


def _power(base: _Growth, exponent: ast.expr) -> _Growth:
    """Powers grow so fast that only those by a small number that is written out are let pass."""
    if isinstance(exponent, ast.Call):
        name = exponent.func.id if isinstance(exponent.func, ast.Name) else ""
        values = [_constant(one) for one in exponent.args]
        if name == "Rational" and len(values) == 2 and all(isinstance(v, int) for v in values):
            numerator, denominator = values
            value: object = numerator / denominator if denominator else None  # type: ignore[operator]
        elif name == "Float" and len(values) == 1 and _NUMBER.fullmatch(str(values[0])):
            value = float(str(values[0]))
        else:
            value = values[0] if name == "Integer" and len(values) == 1 else None
    else:
        value = _constant(exponent) if isinstance(exponent, ast.Constant | ast.UnaryOp) else None
    if not isinstance(value, int | float) or not math.isfinite(value) or abs(value) > 64:
        raise _refused("an exponent isn't a small number")
    times = max(1, math.ceil(abs(value)))
    if times * math.log2(max(base.terms, 1)) > 64:
        raise _refused("it stands for too long a sum")
    return _limited(_Growth(base.bits * times, base.terms**times))


def _sum(parts: list[_Growth]) -> _Growth:
    bits = max((one.bits for one in parts), default=1) + len(parts)
    return _Growth(bits, sum(one.terms for one in parts))


def _product(parts: list[_Growth]) -> _Growth:
    terms = 1
    for one in parts:
        terms = min(terms * one.terms, _TERMS + 1)
    return _Growth(sum(one.bits for one in parts), terms)


def _limited(growth: _Growth) -> _Growth:
    if growth.bits > _BITS:
        raise _refused("it stands for a huge number")
    if growth.terms > _TERMS:
        raise _refused("it stands for too long a sum")
    return growth


def _refused(why: str) -> ExpressionError:
    return ExpressionError("an expression isn't one of a size", why=why)
