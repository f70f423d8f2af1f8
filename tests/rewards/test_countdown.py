"""Countdown and its arithmetic: exact values from a walked tree, and nothing is ever run."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparring.errors import RewardError
from sparring.rewards.arithmetic import ArithmeticFault, compute
from sparring.rewards.countdown import countdown


def judged(expression, numbers=(3, 5, 7, 2), target=24, **knobs):
    logged = {}
    values = countdown(
        [f"<answer>{expression}</answer>"],
        [list(numbers)],
        [target],
        log_extra=logged.__setitem__,
        **knobs,
    )
    return values[0], logged["reason"][0]


@pytest.mark.parametrize(
    "expression",
    [
        "3*5+7+2", "(3 * 5) + 7 + 2", "3 × 5 + 7 + 2", "3 x 5 + 7 + 2", "3 \\times 5 + 7 + 2",
        "3*5+7+2 = 24", "$3 \\cdot 5 + 7 + 2$", "[3*5]+(7+2)", "7-(-2)+3*5", "\\boxed{3*5+7+2}",
    ],
)  # fmt: skip
def test_right_expressions(expression):
    assert judged(expression)[0] == 1.0


@pytest.mark.parametrize(
    ("expression", "why"),
    [
        ("3*5+7", "it uses 3, 5, 7"),
        ("3*5+7+2+0", "it uses"),
        ("3*5+7+2*1", "it uses"),
        ("24", "it uses 24"),
        ("3+5+7+2", "is 17, the target 24"),
        ("3*5+7+2 = 25", "is 24, not 25"),
        ("3**5+7+2", "powers"),
        ("3//5+7+2", "floor division"),
        ("3^2+5+7", "powers"),
        ("3/(5-5)", "division by zero"),
        ("3*5+7+", "cannot be read"),
        ("", "empty"),
        ("__import__('os').getcwd()", "more than numbers"),
        ("(lambda: 24)()", "more than numbers"),
        ("1e1+14", "more than numbers"),
        ("0x18", "it uses 0, 18"),
        ("9" * 61, "more than 60 digits"),
        ("(" * 61 + "3" + ")" * 61, "nested too deep"),
        ("three times five", "more than numbers"),
    ],
)
def test_wrong_expressions_and_why(expression, why):
    value, reason = judged(expression)
    assert value == 0.0
    assert why in reason


def test_exactness_and_credit():
    assert judged("1/3+1/3+1/3", (1, 3, 1, 3, 1, 3), 1)[0] == 1.0
    assert judged("8/(3-8/3)", (8, 3, 8, 3), 24)[0] == 1.0
    assert judged("3+5+7+2", expression_credit=0.1)[0] == 0.1
    assert judged("3+5", expression_credit=0.1)[0] == 0.0
    assert judged("3*5+7+2", (3, 5, 7, 2, 9), use="some")[0] == 1.0
    assert judged("3*3+5*3", (3, 5), use="some")[0] == 0.0
    with pytest.raises(RewardError, match="expression_credit"):
        judged("1", expression_credit=1.0)


def test_bare_expressions_columns_as_text_and_rows_that_cannot_be_judged():
    bare = "44 + (80 - 37) - 10 + 5"
    assert countdown([bare], ["44, 80, 37, 10, 5"], ["82"]) == [1.0]
    assert countdown(["<think>hm"], [[1]], [1]) == [0.0]
    rows = [(None, 1), ([1, "x"], 1), ([1], None), ([True], 1), ([], 1)]
    assert countdown(["1"] * 5, [n for n, _ in rows], [t for _, t in rows]) == [None] * 5


numbers = st.integers(0, 999).map(str)
expressions = st.recursive(
    numbers,
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(
        lambda t: f"({' '.join(t)})"
    ),
    max_leaves=12,
)


@given(expressions)
def test_values_equal_those_of_another_evaluator(text):
    try:
        expected = _oracle(text)
    except ZeroDivisionError:
        with pytest.raises(ArithmeticFault, match="zero"):
            compute(text)
        return
    assert compute(text).value == expected


def _oracle(text):
    """A second evaluator, for fully bracketed text: no syntax tree, no precedence."""
    tokens = text.replace("(", " ( ").replace(")", " ) ").split()

    def read(position):
        if tokens[position] != "(":
            return Fraction(int(tokens[position])), position + 1
        left, position = read(position + 1)
        sign = tokens[position]
        right, position = read(position + 1)
        value = {
            "+": lambda: left + right,
            "-": lambda: left - right,
            "*": lambda: left * right,
            "/": lambda: left / right,
        }[sign]()
        return value, position + 1

    return read(0)[0]


@pytest.mark.parametrize("unit", ["(", ")", "1+", "-", "1", "*", "1 ", "[", "\\frac{1}{", "."])
def test_long_expressions_are_refused_quickly(unit):
    start = time.perf_counter()
    countdown(
        [(unit * 100_000)[:100_000], f"<answer>{(unit * 500)[:499]}</answer>"], [[1]] * 2, [1, 1]
    )
    assert time.perf_counter() - start < 1.0
