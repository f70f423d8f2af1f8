"""Repetition: loops cost, ordinary text does not, in any script."""

from __future__ import annotations

import random
import time

import pytest

from sparring.errors import RewardError
from sparring.rewards.repetition import loop_share, repeated_share, repetition, text_units

CHINESE = "首先我们把两个数相加，然后把结果乘以三，最后检查答案是否符合题目的要求。"


def penalty(tokens, **knobs):
    return repetition([""], [tokens], **knobs)[0]


def test_text_that_does_not_repeat_itself_costs_nothing():
    tokens = random.Random(0).choices(range(1000), k=600)
    assert penalty(tokens) == 0.0
    assert penalty(list(range(19))) == 0.0
    assert penalty([]) == 0.0


def test_a_loop_costs_nearly_everything():
    assert penalty(list(range(50)) * 40) < -0.95
    assert penalty([7] * 300) < -0.95


def test_a_loop_at_the_end_of_a_good_text_costs_its_share_of_the_tail():
    good = random.Random(1).choices(range(1000), k=2000)
    assert penalty(good + [3, 4, 5, 6] * 64) == pytest.approx(-0.5, abs=0.02)
    assert penalty(good + [3, 4, 5, 6] * 2) == 0.0


def test_worked_numbers():
    assert repeated_share([1, 2, 1, 2, 1], 2) == pytest.approx(0.5)
    assert repeated_share([1], 2) == 0.0
    assert loop_share([9, 9, *([1, 2, 3] * 20)]) == pytest.approx(60 / 62)
    assert loop_share([1, 2, 3] * 2) == 0.0
    assert penalty([1, 2, 1, 2, 1], n=2, allowance=0.0) == pytest.approx(-0.5)
    assert penalty([1, 2, 1, 2, 1], n=2, allowance=0.5) == 0.0
    assert penalty([1, 2, 1, 2, 1], n=2, allowance=0.0, max_penalty=-0.2) == pytest.approx(-0.1)


def test_chinese_loops_are_seen_without_spaces_between_words():
    loop, plain = repetition([CHINESE * 20, CHINESE], unit="text")
    assert loop < -0.9
    assert plain == 0.0
    assert len(text_units("我爱 you 3 次。")) == 6


def test_what_is_not_allowed_is_named():
    with pytest.raises(RewardError, match="unit"):
        repetition(["a"])
    for knobs in ({"n": 0}, {"allowance": 1.0}, {"max_penalty": 0.5}):
        with pytest.raises(RewardError, match="allowed"):
            repetition(["a"], [[1]], **knobs)


def test_long_completions_take_linear_time():
    start = time.perf_counter()
    repetition([""] * 4, [[1] * 32768, [1, 2] * 16384, list(range(32768)), [1] * 32767 + [2]])
    assert time.perf_counter() - start < 5.0
