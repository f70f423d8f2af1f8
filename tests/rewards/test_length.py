"""Rewards of length: worked numbers, clamped at the limit, None where correctness is not known."""

from __future__ import annotations

import pytest

from sparring.errors import RewardError
from sparring.rewards.length import cosine_length, group_length, soft_overlong


def ids(*lengths):
    return [[1] * length for length in lengths]


def test_soft_overlong_is_zero_then_falls_then_stays_at_minus_one():
    values = soft_overlong(ids(0, 80, 85, 90, 100, 130), max_tokens=100, buffer_tokens=20)
    assert values == pytest.approx([0.0, 0.0, -0.25, -0.5, -1.0, -1.0])


def test_soft_overlong_takes_the_runs_limit_and_a_fifth_as_buffer():
    state = {"max_completion_tokens": 100}
    assert soft_overlong(ids(80, 90, 100), trainer_state=state) == pytest.approx([0.0, -0.5, -1.0])
    with pytest.raises(RewardError, match="max_tokens"):
        soft_overlong(ids(1))
    with pytest.raises(RewardError, match="buffer_tokens"):
        soft_overlong(ids(1), max_tokens=10, buffer_tokens=11)


def test_cosine_runs_between_its_four_values_and_is_clamped():
    judged = {"math": [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, None]}
    values = cosine_length(ids(0, 50, 100, 400, 0, 50, 100, 7), judged, max_tokens=100)
    assert values[:7] == pytest.approx([1.0, 0.75, 0.5, 0.5, -1.0, -0.75, -0.5])
    assert values[7] is None


def test_cosine_falls_with_length_for_right_and_rises_for_wrong_answers():
    lengths = range(0, 101, 10)
    right = cosine_length(ids(*lengths), {"math": [1.0] * 11}, max_tokens=100)
    wrong = cosine_length(ids(*lengths), {"math": [0.0] * 11}, max_tokens=100)
    assert right == sorted(right, reverse=True)
    assert wrong == sorted(wrong)


def test_group_length_is_measured_within_each_group():
    judged = {"math": [1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0]}
    values = group_length(ids(10, 20, 30, 10, 30, 5, 5), [0, 0, 0, 0, 0, 1, 1], judged)
    assert values == pytest.approx([0.5, 0.0, -0.5, 0.0, -0.5, 0.0, 0.0])


def test_group_length_leaves_unjudged_samples_out_of_the_spread():
    values = group_length(ids(10, 20, 1000), [0, 0, 0], {"math": [1.0, 1.0, None]})
    assert values == [0.5, -0.5, None]


def test_which_reward_decides_on_correctness():
    judged = {"math": [1.0], "format": [0.0]}
    assert cosine_length(ids(0), judged, max_tokens=10) == [1.0]
    assert cosine_length(ids(0), judged, max_tokens=10, correct_by="format") == [-1.0]
    assert cosine_length(ids(0), {"code": [0.5]}, max_tokens=10, correct_from=0.5) == [1.0]
    assert cosine_length(ids(0, 0), None, [True, None], max_tokens=10) == [1.0, None]
    with pytest.raises(RewardError, match="the others: math, format"):
        cosine_length(ids(0), judged, max_tokens=10, correct_by="judge")
    with pytest.raises(RewardError, match="column 'correct'"):
        group_length(ids(0), [0])
