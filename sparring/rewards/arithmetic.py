"""The value of an arithmetic expression that a model wrote, as an exact fraction.

The syntax tree is walked, nothing is evaluated: integers and decimals, + - * /, signs, brackets. No
powers, no floor division, no names; bounds on length, digits and depth.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from fractions import Fraction

MAX_CHARACTERS = 1000
MAX_DIGITS = 60
MAX_DEPTH = 60

_SPELLINGS = (
    (r"\times", "*"), (r"\cdot", "*"), (r"\div", "/"), ("×", "*"), ("÷", "/"), ("·", "*"),
    ("−", "-"), ("–", "-"), (r"\left", ""), (r"\right", ""), ("[", "("), ("]", ")"),
)  # fmt: skip
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_ALLOWED = re.compile(r"[\d\s+\-*/().]*")


class ArithmeticFault(ValueError):
    """The text is no plain arithmetic, or has no value; the message says why."""


@dataclass(frozen=True, slots=True)
class Computed:
    """The value of an expression and the integers and decimals that stand in it, in order."""

    value: Fraction
    literals: tuple[Fraction, ...]
    num_operations: int


def compute(text: str) -> Computed:
    """Walk the expression. Raises ArithmeticFault for anything but plain arithmetic."""
    if len(text) > MAX_CHARACTERS:
        raise ArithmeticFault(f"the expression has {len(text)} characters")
    for spelling, sign in _SPELLINGS:
        text = text.replace(spelling, sign)
    while (replaced := _FRACTION.sub(r"((\1)/(\2))", text)) != text:
        text = replaced
    text = text.strip()
    if not text:
        raise ArithmeticFault("the expression is empty")
    if any(sign in text for sign in ("**", "//", "^")):
        raise ArithmeticFault("powers and floor division are not allowed")
    if not _ALLOWED.fullmatch(text):
        raise ArithmeticFault("the expression holds more than numbers, + - * / and brackets")
    if max(map(len, re.findall(r"[\d.]+", text)), default=0) > MAX_DIGITS:
        raise ArithmeticFault(f"a number has more than {MAX_DIGITS} digits")
    if _bracket_depth(text) > MAX_DEPTH:
        raise ArithmeticFault("the brackets are nested too deep")
    text = re.sub(r"(?<![\d.])0+(?=\d)", "", " ".join(text.split()))
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise ArithmeticFault("the expression cannot be read") from error
    literals: list[Fraction] = []
    operations = [0]
    value = _walk(tree.body, text, literals, operations, 0)
    return Computed(value, tuple(literals), operations[0])


def _bracket_depth(text: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += (character == "(") - (character == ")")
        deepest = max(deepest, depth)
    return deepest


def _walk(
    node: ast.expr, text: str, literals: list[Fraction], operations: list[int], depth: int
) -> Fraction:
    if depth > 4 * MAX_DEPTH:
        raise ArithmeticFault("the expression is nested too deep")
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        literal = Fraction(ast.get_source_segment(text, node) or "")
        literals.append(literal)
        return literal
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        inner = _walk(node.operand, text, literals, operations, depth + 1)
        return -inner if isinstance(node.op, ast.USub) else inner
    if isinstance(node, ast.BinOp):
        left = _walk(node.left, text, literals, operations, depth + 1)
        right = _walk(node.right, text, literals, operations, depth + 1)
        operations[0] += 1
        return _apply(node.op, left, right)
    raise ArithmeticFault("the expression holds more than numbers, + - * / and brackets")


def _apply(operator: ast.operator, left: Fraction, right: Fraction) -> Fraction:
    if isinstance(operator, ast.Add):
        return left + right
    if isinstance(operator, ast.Sub):
        return left - right
    if isinstance(operator, ast.Mult):
        return left * right
    if isinstance(operator, ast.Div):
        if right == 0:
            raise ArithmeticFault("division by zero")
        return left / right
    raise ArithmeticFault("only + - * / are allowed")
