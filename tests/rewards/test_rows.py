"""`sparring reward`: rows in, rows with reward and reason out."""

from __future__ import annotations

import json

import pytest

from sparring.errors import DataError, RewardError
from sparring.rewards.rows import judge_rows
from sparring.rewards.verdicts import load_reward


def test_rows_come_back_whole_with_reward_and_reason():
    rows = [
        {"completion": "<answer>4</answer>", "reference": "4", "id": "a"},
        {"completion": "<answer>5</answer>", "reference": "4", "id": "b"},
        {"completion": "<answer>5</answer>", "reference": "", "id": "c"},
    ]
    judged = judge_rows(load_reward("math"), rows)
    assert [row["reward"] for row in judged] == [1.0, 0.0, None]
    assert [row["reason"] for row in judged] == [
        "the same text", "5 is not 4", "the reference is empty",
    ]  # fmt: skip
    assert [{key: row[key] for key in ("completion", "reference", "id")} for row in judged] == rows
    assert "reward" not in rows[0]
    json.dumps(judged)


def test_explain_shows_extraction_path_and_what_was_compared():
    row = {"completion": "so \\boxed{\\dfrac12}", "reference": "0.5"}
    judged = judge_rows(load_reward("math"), [row], explain=True)[0]
    assert judged["explain"] == {
        "stage": "number",
        "answer": "\\dfrac12",
        "path": "boxed > string > number",
        "compared": "\\frac{1}{2} | 0.5",
    }


@pytest.mark.parametrize(
    ("name", "columns", "reason"),
    [
        ("format", {}, "<think> occurs 0 times"),
        ("tags", {}, "no tag"),
        ("random", {}, "seed 0"),
        ("language", {}, "words"),
        ("soft_overlong", {"completion_ids": [1, 2]}, "2 of 10 tokens"),
        ("cosine_length", {"completion_ids": [1, 2], "correct": True}, "right, 2 of 10 tokens"),
        ("group_length", {"completion_ids": [1, 2], "correct": True}, "in a group of 2 to 2"),
        ("repetition", {"completion_ids": [1, 2]}, "repeated 20-grams"),
        ("countdown", {"numbers": [4], "target": 4}, "the expression is 4"),
        ("math", {"reference": "5"}, "4 is not 5"),
    ],
)
def test_every_reward_gives_a_reason(name, columns, reason):
    knobs = {"max_tokens": 10} if name in ("soft_overlong", "cosine_length") else {}
    judged = judge_rows(load_reward(name, knobs=knobs), [{"completion": "4", **columns}])[0]
    assert reason in judged["reason"] or name == "language"
    assert isinstance(judged["reward"], float)


def test_rows_of_one_prompt_are_a_group():
    rows = [
        {"prompt": prompt, "completion": "x", "completion_ids": [1] * length, "correct": True}
        for prompt, length in [("p", 1), ("q", 9), ("p", 3), ("q", 5)]
    ]
    values = [row["reward"] for row in judge_rows(load_reward("group_length"), rows)]
    assert values == [0.5, -0.5, -0.5, 0.5]
    numbered = [{**row, "group_id": index} for index, row in enumerate(rows)]
    assert [row["reward"] for row in judge_rows(load_reward("group_length"), numbered)] == [0.0] * 4


def test_a_users_own_function_with_and_without_reasons(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def mine(completions, **columns):\n"
        "    return [None if c == 'skip' else len(c) for c in completions]\n"
        "def boom(completions):\n    raise ValueError('not today')\n",
        encoding="utf-8",
    )
    rows = [{"completion": "four"}, {"completion": "skip"}]
    judged = judge_rows(load_reward(f"{file}:mine"), rows)
    assert [(row["reward"], row["reason"]) for row in judged] == [
        (4.0, "mine returned 4"),
        (None, "None"),
    ]
    judged = judge_rows(load_reward(f"{file}:boom"), rows)
    assert judged[0]["reward"] is None
    assert judged[0]["reason"] == "error: ValueError: not today"


def test_rows_that_cannot_be_judged_name_the_row_and_the_remedy():
    with pytest.raises(DataError, match=r"row 2 has no 'completion'.*its keys: text"):
        judge_rows(load_reward("format"), [{"completion": "a"}, {"text": "b"}])
    with pytest.raises(RewardError, match=r"'math' needs 'reference'.*columns: none"):
        judge_rows(load_reward("math"), [{"completion": "a"}])
    with pytest.raises(RewardError, match="needs 'completion_ids'"):
        judge_rows(load_reward("group_length"), [{"completion": "a"}])
    assert judge_rows(load_reward("format"), []) == []
