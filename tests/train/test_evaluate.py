"""Intervals against worked values, and accuracy by prompt."""

from __future__ import annotations

import pytest
import torch

from sparring.train.evaluate import bootstrap, shares_correct, wilson
from sparring.train.order import rows_of_step
from sparring.types import Group, Prompt


def test_wilson_matches_published_values() -> None:
    assert wilson(9, 30) == pytest.approx((0.167, 0.479), abs=1e-3)
    assert wilson(0, 8) == pytest.approx((0.0, 0.324), abs=1e-3)
    assert wilson(0, 16) == pytest.approx((0.0, 0.194), abs=1e-3)
    assert wilson(16, 16)[1] == 1.0


def test_bootstrap_is_centred_and_as_wide_as_the_standard_error_says() -> None:
    shares = [1.0, 0.5, 0.25, 0.0] * 50
    low, high = bootstrap(shares)
    error = torch.tensor(shares, dtype=torch.float64).std().item() / len(shares) ** 0.5
    assert (low + high) / 2 == pytest.approx(0.4375, abs=0.01)
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.1)
    assert bootstrap(shares) == (low, high)


def test_shares_count_judged_samples_with_full_credit() -> None:
    prompt = Prompt(id=0, token_ids=(1,), text="a")

    def group(values: list[float]) -> Group:
        part = torch.tensor(values)
        return Group(prompt=prompt, rollouts=(), rewards_G=part, reward_parts={"math": part})

    nan = float("nan")
    groups = [group([1.0, 0.0, nan]), group([nan, nan]), group([0.5, 1.0, 1.0, 1.0])]
    assert shares_correct(groups, "math") == [0.5, 0.75]


def test_every_row_comes_up_once_an_epoch_and_steps_need_no_state() -> None:
    rows = list(range(10))
    steps = [rows_of_step(rows, step=step, per_step=4, seed=3) for step in range(5)]
    drawn = [row for step in steps for row in step]
    assert sorted(drawn[:10]) == rows
    assert sorted(drawn[10:]) == rows
    assert drawn[:10] != drawn[10:]
    assert rows_of_step(rows, step=3, per_step=4, seed=3) == steps[3]
    assert rows_of_step(rows, step=3, per_step=4, seed=4) != steps[3]
    assert len(rows_of_step(rows, step=0, per_step=25, seed=0)) == 25
