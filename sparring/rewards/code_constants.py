"""Values of constant expressions in test code, without running it: literals, bounded arithmetic."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any

_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_TYPES: dict[str, type] = {
    kind.__name__: kind for kind in (int, float, bool, str, list, tuple, dict, set)
}
_EMPTY: dict[str, Callable[[], Any]] = {"set": set, "list": list, "dict": dict, "tuple": tuple}
_MAX_SIZE = 100_000
_MAX_NUMBER = 1 << 4096


class NotConstantError(ValueError):
    """An expression whose value is not written in it."""


def constant(node: ast.expr) -> Any:
    """The value of a constant expression; raises NotConstantError for any other.

    Literals, arithmetic on numbers, joined and repeated strings and lists, built-in types by name.
    """
    match node:
        case ast.Constant(value=value) if value is not ...:
            return value
        case ast.List(elts=items):
            return [constant(item) for item in items]
        case ast.Tuple(elts=items):
            return tuple(constant(item) for item in items)
        case ast.Set(elts=items):
            return {constant(item) for item in items}
        case ast.Dict(keys=keys, values=values):
            return {
                constant(key): constant(value)
                for key, value in zip(_keys(keys), values, strict=True)
            }
        case ast.Name(id=name) if name in _TYPES:
            return _TYPES[name]
        case ast.Call(func=ast.Name(id=name), args=[], keywords=[]) if name in _EMPTY:
            return _EMPTY[name]()
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=operand):
            value = constant(operand)
            if type(value) not in (int, float, complex):
                raise NotConstantError(ast.dump(node)[:80])
            return -value if isinstance(sign, ast.USub) else value
        case ast.BinOp(left=left, op=sign, right=right):
            return _arithmetic(constant(left), sign, constant(right))
    raise NotConstantError(ast.dump(node)[:80])


def _keys(keys: list[ast.expr | None]) -> list[ast.expr]:
    present = [key for key in keys if key is not None]
    if len(present) < len(keys):
        raise NotConstantError("a dict with another unpacked in it")
    return present


def _arithmetic(left: Any, sign: ast.operator, right: Any) -> Any:
    compute = _OPERATORS.get(type(sign))
    are_numbers = type(left) in (int, float, complex) and type(right) in (int, float, complex)
    if compute is None or not (are_numbers or _joins(left, sign, right)):
        raise NotConstantError("no arithmetic of numbers or sequences")
    if are_numbers and isinstance(sign, ast.Pow) and (abs(right) > 1000 or abs(left) > _MAX_SIZE):
        raise NotConstantError("a power out of bounds")
    try:
        value = compute(left, right)
    except (ArithmeticError, ValueError) as error:
        raise NotConstantError(str(error)) from error
    if isinstance(value, int) and abs(value) > _MAX_NUMBER:
        raise NotConstantError("a number out of bounds")
    return value


def _joins(left: Any, sign: ast.operator, right: Any) -> bool:
    if isinstance(sign, ast.Add):
        return type(left) is type(right) and type(left) in (str, list, tuple, bytes)
    if isinstance(sign, ast.Mult):
        for items, times in ((left, right), (right, left)):
            if type(items) in (str, list, tuple, bytes) and type(times) is int:
                return len(items) * max(times, 0) <= _MAX_SIZE
    return False
