"""Plain values through the sandbox's wall: types kept, nothing hostile built."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from decimal import Decimal
from fractions import Fraction

import pytest

from sparring.rewards.sandbox.values import Equality, NotPlainError, decode, encode, matches

PLAIN = [
    *(None, True, 0, -5, 2**63, -(2**200), 1.5, float("inf"), "", "é\ud800\0", b"\x00\xff"),
    *([], [1, [2]], (), (1,), {1, 2}, frozenset({(1, 2)}), {"a": [1], 2: None}, 1 + 2j),
    *(Fraction(1, 3), Decimal("0.10"), int, [int, str], bytearray(b"x")),
]


@pytest.mark.parametrize("value", PLAIN, ids=repr)
def test_values_travel_with_their_types(value):
    document = json.loads(json.dumps(encode(value)))
    back = decode(document)
    assert back == value
    assert type(back) is type(value)
    assert matches(value, document, Equality(tolerance=0.0))


def test_values_differ_across_types():
    strict = Equality(tolerance=0.0)
    same_kind = {
        repr(value): value for value in [True, 1, "1", [1], (1,), {1}, {1: 1}, b"1", 1j, None]
    }
    for one in same_kind.values():
        for other in same_kind.values():
            expected = one is other
            assert matches(one, encode(other), strict) == expected, (one, other)


def test_equality_policies():
    strict, loose = Equality(tolerance=0.0), Equality(tolerance=1e-9)
    assert matches(1, encode(1.0), strict)
    assert matches(1.0, encode(1), strict)
    assert not matches(0.3, encode(0.1 + 0.2), strict)
    assert matches(0.3, encode(0.1 + 0.2), loose)
    assert not matches(10**20, encode(10**20 + 1), loose), "integers are exact"
    assert matches(math.nan, encode(math.nan), strict)
    assert not matches(1.0, encode(10**400), loose)
    assert matches([1, [2]], encode((1, (2,))), Equality(tuple_is_list=True))
    assert not matches((1,), encode([1]), Equality(tuple_is_list=True))
    assert matches(False, encode(0), Equality(int_is_bool=True))
    assert not matches(0, encode(False), Equality(int_is_bool=True))
    assert not matches(True, encode(2), Equality(int_is_bool=True))
    assert matches({1, 2}, encode(frozenset({2, 1})), strict)
    assert not matches({1}, encode({True}), strict)
    assert matches({"a": 0.3}, encode(Counter(a=0.1 + 0.2)), loose)
    assert not matches({1: 2}, encode({True: 2}), strict)


@pytest.mark.parametrize(
    "document",
    [
        {"t": "set", "v": [1, 1]},
        {"t": "set", "v": [[1], 2]},
        {"t": "set", "v": [1, 2, 3]},
        {"t": "set", "v": 1},
        {"t": "set", "v": [1, 2], "x": 1},
        {"t": "dict", "v": [[1, 2]]},
        {"t": ["set"], "v": [1, 2]},
        [1, 2],
        "set",
        None,
    ],
)
def test_forged_documents_match_nothing(document):
    assert not matches({1, 2}, document, Equality())
    assert not matches({1: 2, 3: 4}, document, Equality())


def test_hostile_documents_cost_little():
    deep = json.loads("[" * 900 + "]" * 900)
    started = time.monotonic()
    assert not matches([[1]], deep, Equality())
    with pytest.raises(NotPlainError):
        decode(deep)
    colliding = {"t": "set", "v": [n * (2**61 - 1) for n in range(100_000)]}
    assert not matches({1, 2}, colliding, Equality())
    with pytest.raises(NotPlainError):
        decode(colliding, max_hashed=1000)
    for name, text in [("Fraction", "1e999999999"), ("int", "0x" + "f" * 10), ("type", "object")]:
        document = {"t": name, "v": text}
        assert not matches(3, document, Equality())
    assert time.monotonic() - started < 2


class AlwaysEqual(int):
    def __eq__(self, other):
        return True

    __hash__ = int.__hash__


def test_subclasses_and_strangers_do_not_travel():
    for value in (AlwaysEqual(3), object(), iter([1]), range(3), lambda: 1):
        with pytest.raises(NotPlainError):
            encode(value)
        with pytest.raises(NotPlainError):
            encode([value])
    endless: list[object] = []
    endless.append(endless)
    with pytest.raises(NotPlainError):
        encode(endless)
