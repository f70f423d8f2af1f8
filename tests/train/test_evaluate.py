"""Intervals against worked values, and accuracy by prompt."""

from __future__ import annotations

import json

import pytest
import torch

from sparring.errors import RewardError
from sparring.rewards.verdicts import RewardReport
from sparring.rollout.sampler import Sampling
from sparring.train.evaluate import Measured, shares_correct, summarise
from sparring.train.intervals import bootstrap, interval_of, wilson
from sparring.train.order import rows_of_step
from sparring.types import Group, Prompt, Rollout


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


def test_shares_that_are_all_the_same_leave_some_doubt() -> None:
    assert interval_of([0.0] * 8, num_samples=4) == pytest.approx((0.0, 0.324), abs=1e-3)
    assert interval_of([1.0, 0.0] * 15, num_samples=1) == wilson(15, 30)
    assert interval_of([0.5, 1.0, 0.25], num_samples=4) == bootstrap([0.5, 1.0, 0.25])


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


def judged(values: list[list[float]], answers: list[list[str | None]]) -> Measured:
    """What `summarise` makes of groups with these verdicts and extracted answers."""
    groups = []
    for index, row in enumerate(values):
        prompt = Prompt(id=10 * index, token_ids=(1, 2), text="q", columns={"reference": "4"})
        rollouts = tuple(
            Rollout(
                prompt=prompt,
                sample_index=sample,
                token_ids=torch.arange(2 + sample),
                logprobs=torch.zeros(2 + sample),
                loss_mask=torch.ones(2 + sample, dtype=torch.bool),
                text=f"text {sample}",
                finish_reason="length" if sample == 0 else "stop",
                policy_version=0,
            )
            for sample in range(len(row))
        )
        part = torch.tensor(row)
        groups.append(
            Group(prompt=prompt, rollouts=rollouts, rewards_G=part, reward_parts={"math": part})
        )
    flat = [answer for row in answers for answer in row]
    report = RewardReport(
        name="math",
        num_samples=len(flat),
        num_judged=len(flat),
        mean=0.0,
        std=0.0,
        seconds=0.0,
        reasons={},
        first_traceback="",
        metrics={},
        extras={"answer": flat, "reason": [f"because {answer}" for answer in flat]},
    )
    sampling = Sampling(max_completion_tokens=8, seed=5)
    return summarise(groups, report, sampling=sampling, greedy=None)


def test_a_summary_holds_pass_majority_and_rates() -> None:
    nan = float("nan")
    found = judged(
        [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, nan]],
        [["4", "5", "5.0", None], ["4", "4.0", "7", None]],
    )
    evaluation = found.evaluation
    assert evaluation.accuracy == pytest.approx((1 / 4 + 2 / 3) / 2)
    assert evaluation.pass_at["2"]["value"] == pytest.approx((0.5 + 1.0) / 2)
    assert evaluation.pass_at["4"]["value"] == 1.0  # the second prompt has three judged samples
    assert evaluation.majority_at["4"]["value"] == 0.0  # 5 and 5.0 are one vote
    assert evaluation.no_answer == 0.25
    assert evaluation.truncated == 0.25
    assert evaluation.accuracy_finished == pytest.approx(1 / 5)
    assert (evaluation.mean_tokens, evaluation.p95_tokens) == (3.5, 5.0)
    assert evaluation.mean_tokens_right == pytest.approx(7 / 3)
    assert json.loads(json.dumps(evaluation.as_dict())) == evaluation.as_dict()


def test_sample_rows_say_what_was_extracted_and_why() -> None:
    found = judged([[1.0, 0.0]], [["4", None]])
    assert [row["answer"] for row in found.rows] == ["4", None]
    assert [row["reason"] for row in found.rows] == ["because 4", "because None"]
    assert [row["correct"] for row in found.rows] == [True, False]
    row = found.rows[1]
    assert (row["prompt_id"], row["sample"], row["seed"], row["reference"]) == (0, 1, 5, "4")
    assert (row["completion"], row["num_tokens"], row["finish_reason"]) == ("text 1", 3, "stop")


def test_nothing_judged_is_an_error() -> None:
    with pytest.raises(RewardError, match="judged none of 1"):
        judged([[float("nan")]], [[None]])
