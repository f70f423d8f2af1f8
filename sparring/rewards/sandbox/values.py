"""Plain values on their way in and out of the sandbox, as typed JSON, and when two are equal.

JSON null, booleans, strings, numbers and arrays stand for None, bool, str, int and list; every
other type is {"t": type, "v": content}. Types are taken by identity, so an instance of a subclass
with an equality of its own is not a plain value. Nothing is ever unpickled.
"""

from __future__ import annotations

import math
import re
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any, NamedTuple

MAX_DEPTH = 64
MAX_NODES = 500_000
_LARGE = 1 << 63

_DICTS = (dict, Counter, OrderedDict, defaultdict)
_TYPES: dict[str, type] = {
    kind.__name__: kind
    for kind in (int, float, bool, str, list, tuple, dict, set, frozenset, bytes, complex)
}


_RATIO = re.compile(r"-?\d{1,4000}(/\d{1,4000})?")


class NotPlainError(ValueError):
    """A value of a type that does not travel, or one that is too deep or too large."""


class Handle(NamedTuple):
    """Stands for an object that stays in the other process."""

    key: int | str


class Equality(NamedTuple):
    """When an output equals what was expected.

    tolerance: relative, where either number is a float. tuple_is_list: a tuple may stand for a list
    (tests written in JSON have no tuples). int_is_bool: 0 and 1 may stand for False and True, as
    they do in `assert f(x) == False`; True never stands for 1. An int equals a float by value, and
    NaN equals NaN.
    """

    tolerance: float = 1e-9
    tuple_is_list: bool = False
    int_is_bool: bool = False


def encode(value: Any, *, keep: Callable[[object], int | str] | None = None) -> Any:
    """`value` as typed JSON; raises NotPlainError.

    keep: where given, is handed each object that is not plain and returns the key of a handle.
    """
    return _Encoder(keep).encode(value, 0)


class _Encoder:
    def __init__(self, keep: Callable[[object], int | str] | None) -> None:
        self.keep = keep
        self.nodes = 0

    def encode(self, value: Any, depth: int) -> Any:
        self.nodes += 1
        if depth > MAX_DEPTH or self.nodes > MAX_NODES:
            raise NotPlainError(f"a value nested over {MAX_DEPTH} or with over {MAX_NODES} parts")
        kind = type(value)
        if value is None or kind in (bool, str):
            return value
        if kind is list:
            return [self.encode(item, depth + 1) for item in value]
        if kind is int:
            small = -_LARGE < value < _LARGE
            return value if small else {"t": "int", "v": hex(value)}
        if kind in (float, complex, Fraction, Decimal):
            return {"t": kind.__name__, "v": str(value)}
        if kind in (tuple, set, frozenset, deque):
            items = [self.encode(item, depth + 1) for item in value]
            return {"t": kind.__name__, "v": items}
        if kind in _DICTS:
            pairs = [
                [self.encode(key, depth + 1), self.encode(item, depth + 1)]
                for key, item in value.items()
            ]
            return {"t": "dict", "v": pairs}
        if kind in (bytes, bytearray):
            return {"t": kind.__name__, "v": value.hex()}
        if kind is Handle:
            return {"t": "handle", "v": value.key}
        if kind is type and value in _TYPES.values():
            return {"t": "type", "v": value.__name__}
        if self.keep is not None:
            return {"t": "handle", "v": self.keep(value)}
        raise NotPlainError(f"a value of type {kind.__name__} does not travel")


def decode(document: Any, *, max_hashed: int = MAX_NODES) -> Any:
    """The plain value that a JSON document stands for; raises NotPlainError for anything else.

    max_hashed: how many elements of sets and keys of dicts are taken. Keys may be made to collide,
    so that building a large table of them takes quadratic time: bound it where the document comes
    from a model's program and this process matters.
    """
    return _Decoder(max_hashed).decode(document, 0)


class _Decoder:
    def __init__(self, max_hashed: int) -> None:
        self.hashed_left = max_hashed

    def decode(self, document: Any, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise NotPlainError(f"a value nested over {MAX_DEPTH}")
        kind = type(document)
        if document is None or kind in (bool, str, int):
            return document
        if kind is list:
            return [self.decode(item, depth + 1) for item in document]
        name, content = _tagged(document)
        try:
            if name in ("tuple", "deque") and type(content) is list:
                items = [self.decode(item, depth + 1) for item in content]
                return tuple(items) if name == "tuple" else deque(items)
            if name in ("set", "frozenset", "dict") and type(content) is list:
                return self._hashed(name, content, depth)
            if name == "handle" and type(content) in (int, str):
                return Handle(content)
            if type(content) is str:
                return _decode_text(name, content)
        except (TypeError, ValueError, InvalidOperation, OverflowError) as error:
            raise NotPlainError(f"not typed JSON: {name}: {error}") from error
        raise NotPlainError(f"not typed JSON: {name}")

    def _hashed(self, name: str, content: list[Any], depth: int) -> Any:
        self.hashed_left -= len(content)
        if self.hashed_left < 0:
            raise NotPlainError("too many elements in sets and dicts")
        if name == "dict":
            return {
                self.decode(key, depth + 1): self.decode(item, depth + 1) for key, item in content
            }
        items = [self.decode(item, depth + 1) for item in content]
        return set(items) if name == "set" else frozenset(items)


def _tagged(document: Any) -> tuple[str, Any]:
    if type(document) is not dict or set(document) != {"t", "v"} or type(document["t"]) is not str:
        raise NotPlainError("not typed JSON")
    return document["t"], document["v"]


def _decode_text(name: str, content: str) -> Any:
    if name == "int":
        return int(content, 16)
    if name == "type" and content in _TYPES:
        return _TYPES[content]
    if name == "bytes":
        return bytes.fromhex(content)
    if name == "bytearray":
        return bytearray.fromhex(content)
    if name == "Fraction" and _RATIO.fullmatch(content):
        return Fraction(content)
    if len(content) <= 5000 and name in ("float", "complex", "Decimal"):
        if name == "Decimal":
            return Decimal(content)
        return float(content) if name == "float" else complex(content)
    raise ValueError(content[:40])


def matches(expected: Any, document: Any, equality: Equality) -> bool:
    """Whether typed JSON from a program stands for the expected plain value, by type and value.

    What is expected drives the comparison: nothing is built of the document, neither deep nor large
    nor with keys that collide.
    """
    kind = type(expected)
    if kind is int or kind is float:
        return _number_matches(expected, document, equality.tolerance)
    if kind is bool and equality.int_is_bool and type(document) is int:
        return bool(document == expected)
    if expected is None or kind in (bool, str):
        return type(document) is kind and bool(document == expected)
    if kind is list and type(document) is list:
        return _all_match(expected, document, equality)
    try:
        name, content = _tagged(document)
    except NotPlainError:
        return False
    if kind in (list, tuple, deque):
        wanted = kind.__name__
        if name != wanted and not (equality.tuple_is_list and (wanted, name) == ("list", "tuple")):
            return False
        return type(content) is list and _all_match(expected, content, equality)
    if kind in _DICTS:
        return name == "dict" and _dict_matches(expected, content, equality)
    if kind in (set, frozenset):
        return name in ("set", "frozenset") and _set_matches(expected, content)
    if kind is complex:
        return name == "complex" and _complex_matches(expected, content, equality.tolerance)
    return bool(encode(expected) == document)


def _all_match(expected: Any, documents: list[Any], equality: Equality) -> bool:
    return len(expected) == len(documents) and all(
        matches(one, other, equality) for one, other in zip(expected, documents, strict=True)
    )


def _number_matches(expected: float, document: Any, tolerance: float) -> bool:
    actual: Any = document
    if type(document) is dict:
        if document.get("t") not in ("int", "float"):
            return False
        try:
            actual = decode(document)
        except NotPlainError:
            return False
    if type(actual) not in (int, float):
        return False
    return _close(expected, actual, tolerance)


def _close(expected: float, actual: float, tolerance: float) -> bool:
    if expected == actual or (expected != expected and actual != actual):
        return True
    if type(expected) is int and type(actual) is int:
        return False
    try:
        return math.isclose(expected, actual, rel_tol=tolerance, abs_tol=tolerance * 1e-3)
    except OverflowError:  # an integer beyond every float
        return False


def _complex_matches(expected: complex, content: Any, tolerance: float) -> bool:
    try:
        actual = decode({"t": "complex", "v": content})
    except NotPlainError:
        return False
    return _close(expected.real, actual.real, tolerance) and _close(
        expected.imag, actual.imag, tolerance
    )


def _dict_matches(expected: dict[Any, Any], content: Any, equality: Equality) -> bool:
    if type(content) is not list or len(content) != len(expected):
        return False
    wanted = {_canonical(key): item for key, item in expected.items()}
    seen: set[Any] = set()
    for pair in content:
        if type(pair) is not list or len(pair) != 2:
            return False
        key = _canonical_document(pair[0])
        if key not in wanted or key in seen or not matches(wanted[key], pair[1], equality):
            return False
        seen.add(key)
    return True


def _set_matches(expected: set[Any], content: Any) -> bool:
    if type(content) is not list or len(content) != len(expected):
        return False
    wanted = {_canonical(item) for item in expected}
    seen: set[Any] = set()
    for item in content:
        key = _canonical_document(item)
        if key not in wanted or key in seen:
            return False
        seen.add(key)
    return True


def _canonical_document(document: Any) -> Any:
    """`_canonical` of what a document stands for; None, which is no such form, if of nothing."""
    try:
        return _canonical(decode(document, max_hashed=1000))
    except (NotPlainError, TypeError):
        return None


def _canonical(value: Any) -> Any:
    """A hashable stand-in that tells a bool from an int, unlike Python's own equality."""
    kind = type(value)
    if kind is tuple:
        return ("tuple", tuple(_canonical(item) for item in value))
    if kind is frozenset:
        return ("frozenset", frozenset(_canonical(item) for item in value))
    hash(value)
    return ("number" if kind in (int, float) else kind.__name__, value)
