"""The reward `math` and `countdown` on the shared data: every row accepts itself, and no other."""

from __future__ import annotations

import json
import random
from functools import cache

import pytest

from sparring.rewards.math import MathReward
from sparring.rewards.rows import judge_rows
from sparring.rewards.verdicts import load_reward

pytestmark = pytest.mark.shared


@cache
def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@pytest.mark.parametrize("split", ["train", "test"])
def test_gsm8k_references_accept_themselves_and_their_solutions(shared_dir, split):
    data = rows(shared_dir / "data" / "gsm8k" / f"{split}.jsonl")
    reward = MathReward()
    references = [row["reference"] for row in data]
    for completions in (
        [f"<think>so</think><answer>{reference}</answer>" for reference in references],
        [f"It is \\boxed{{{reference}}}." for reference in references],
        [row["solution"] for row in data],
        references,
    ):
        verdicts = reward.verdicts(completions, references)
        refused = [r for r, v in zip(references, verdicts, strict=True) if v.verdict is not True]
        assert refused == []
    verdicts = reward.verdicts(references, [row["solution"] for row in data])
    assert all(verdict.verdict is True for verdict in verdicts)  # references with a #### line


def test_gsm8k_references_refuse_the_others(shared_dir):
    data = rows(shared_dir / "data" / "gsm8k" / "test.jsonl")
    references = sorted({row["reference"] for row in data})
    assert len(references) > 300
    reward = MathReward()
    others = [(a, b) for a in references[::3] for b in references if a != b]
    verdicts = reward.verdicts([f"\\boxed{{{a}}}" for a, _ in others], [b for _, b in others])
    accepted = [pair for pair, v in zip(others, verdicts, strict=True) if v.verdict is not False]
    assert accepted == []


@pytest.mark.slow
def test_gsm8k_all_distinct_references_refuse_all_others(shared_dir):
    folder = shared_dir / "data" / "gsm8k"
    data = rows(folder / "train.jsonl") + rows(folder / "test.jsonl")
    references = sorted({row["reference"] for row in data})
    reward = MathReward()
    for gold in references:
        others = [text for text in references if text != gold]
        verdicts = reward.verdicts([f"\\boxed{{{text}}}" for text in others], [gold] * len(others))
        assert not any(verdict.verdict for verdict in verdicts), gold


def test_countdown_solutions_pass_and_others_do_not(shared_dir):
    data = rows(shared_dir / "data" / "countdown" / "countdown.jsonl")
    reward = load_reward("countdown")
    right = judge_rows(
        reward, [{**row, "completion": f"<answer>{row['solution']}</answer>"} for row in data]
    )
    assert [row["reason"] for row in right if row["reward"] != 1.0] == []
    shuffled = data[:]
    random.Random(0).shuffle(shuffled)
    wrong = judge_rows(
        reward,
        [
            {**row, "completion": other["solution"]}
            for row, other in zip(data, shuffled, strict=True)
        ],
    )
    right_by_chance = [
        row
        for row, other in zip(wrong, shuffled, strict=True)
        if row["reward"] and sorted(row["numbers"]) != sorted(other["numbers"])
    ]
    assert right_by_chance == []
    assert sum(row["reward"] for row in wrong) < 10
