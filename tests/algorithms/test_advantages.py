"""Advantages against worked numbers, and what a reward that was not judged does to them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparring.algorithms import advantages
from sparring.types import Group, Prompt

NAN = math.nan
ALL = [getattr(advantages, name) for name in advantages.__all__]
RELATIVE = [function for function in ALL if function is not advantages.none]


def make_group(*rewards: float) -> Group:
    return Group(
        prompt=Prompt(id=0, token_ids=(1,), text="?"),
        rollouts=(),
        rewards_G=torch.tensor(rewards, dtype=torch.float32),
        reward_parts={},
    )


def check(found: Tensor, expected: list[float], tolerance: float = 1e-6) -> None:
    assert found.dtype == torch.float32
    assert torch.allclose(
        found.double(), torch.tensor(expected).double(), rtol=0, atol=tolerance
    ), found


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([1, 0, 0, 0], [1.499700, -0.499900, -0.499900, -0.499900]),
        ([1, 1, 0, 0], [0.865875, 0.865875, -0.865875, -0.865875]),
        ([0.2, 0.5, 0.9, 0], [-0.510624, 0.255312, 1.276559, -1.021247]),
        ([1, 1, 1, 1], [0, 0, 0, 0]),
    ],
)
def test_group_matches_worked_numbers(rewards: list[float], expected: list[float]) -> None:
    check(advantages.group([make_group(*rewards)])[0], expected)


def test_group_epsilon_is_added_to_the_standard_deviation() -> None:
    check(advantages.group([make_group(1, 0, 0, 0)], epsilon=0.5)[0], [0.75, -0.25, -0.25, -0.25])


def test_mean_and_leave_one_out_match_worked_numbers() -> None:
    one = make_group(1, 0, 0, 0)
    check(advantages.mean([one])[0], [0.75, -0.25, -0.25, -0.25])
    check(advantages.leave_one_out([one])[0], [1, -1 / 3, -1 / 3, -1 / 3])


def test_leave_one_out_is_the_mean_of_the_others() -> None:
    rewards = [0.2, 0.5, NAN, 0.9, 0.0]
    judged = [0.2, 0.5, 0.9, 0.0]
    expected = [r - (sum(judged) - r) / 3 for r in judged]
    expected.insert(2, 0.0)
    check(advantages.leave_one_out([make_group(*rewards)])[0], expected)


def test_batch_takes_the_standard_deviation_of_the_whole_step() -> None:
    first, second = advantages.batch([make_group(1, 0, 0, 0), make_group(1, 1, 0, 0)])
    check(first, [1.448858, -0.482953, -0.482953, -0.482953])
    check(second, [0.965905, 0.965905, -0.965905, -0.965905])


def test_none_is_the_reward_itself_even_of_a_single_judged_sample() -> None:
    first, second = advantages.none([make_group(0.5, -2, NAN), make_group(NAN, 3.0)])
    check(first, [0.5, -2, 0])
    check(second, [0, 3])


@pytest.mark.parametrize("function", ALL)
@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
def test_unjudged_samples_leave_the_others_as_if_they_were_not_there(
    function: Callable[..., list[Tensor]], bad: float
) -> None:
    whole = function([make_group(0.2, bad, 0.5, bad, 0.9), make_group(1, 0, bad, bad, bad)])
    without = function([make_group(0.2, 0.5, 0.9), make_group(1, 0)])
    check(whole[0][[0, 2, 4]], without[0].tolist())
    check(whole[1][[0, 1]], without[1].tolist())
    assert whole[0][[1, 3]].tolist() == [0, 0]
    assert whole[1][2:].tolist() == [0, 0, 0]


@pytest.mark.parametrize("function", RELATIVE)
def test_fewer_than_two_judged_give_zeros_and_do_not_disturb_the_rest(
    function: Callable[..., list[Tensor]],
) -> None:
    lone, empty, normal = function([make_group(NAN, 7.0), make_group(NAN, NAN), make_group(1, 0)])
    assert lone.tolist() == [0, 0]
    assert empty.tolist() == [0, 0]
    assert normal[0] > 0 > normal[1]


@pytest.mark.parametrize("function", RELATIVE)
@pytest.mark.parametrize("reward", [0.1, 1 / 3, 1e6, -0.7])
def test_equal_rewards_give_exactly_zero(
    function: Callable[..., list[Tensor]], reward: float
) -> None:
    found = function([make_group(*[reward] * 7), make_group(*[reward] * 3, NAN)])
    assert all((one == 0).all() for one in found)


@pytest.mark.parametrize("function", RELATIVE)
def test_a_constant_added_to_a_group_changes_nothing(function: Callable[..., list[Tensor]]) -> None:
    plain = function([make_group(0.25, 0.5, 1.0), make_group(0, 1, 1)])
    moved = function([make_group(8.25, 8.5, 9.0), make_group(0, 1, 1)])
    if function is advantages.batch:  # the step's standard deviation sees the shift
        assert torch.allclose(moved[0] / moved[0][0], plain[0] / plain[0][0], atol=1e-5)
    else:
        assert torch.allclose(moved[0], plain[0], atol=1e-6)


def test_advantages_of_a_group_sum_to_zero_in_float64_precision() -> None:
    generator = torch.Generator().manual_seed(3)
    rewards = (torch.rand(64, generator=generator) + 1000).tolist()
    found = advantages.mean([make_group(*rewards)])[0]
    assert abs(float(found.double().sum())) < 1e-5


def test_no_groups_give_no_advantages() -> None:
    assert all(function([]) == [] for function in ALL)


def test_judged_counts_signal_and_minimum() -> None:
    groups = [
        make_group(1, 0, NAN),
        make_group(1, 1, math.inf),
        make_group(NAN, 1),
        make_group(NAN),
    ]
    assert advantages.judged_counts(groups) == [2, 2, 1, 0]
    assert [advantages.has_signal(one) for one in groups] == [True, False, False, False]
    assert [advantages.min_judged(function) for function in ALL] == [
        1 if name == "none" else 2 for name in advantages.__all__
    ]
