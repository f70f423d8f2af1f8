"""The reward `code` on real tasks: every reference passes, every wrong mutant of one is refused."""

from __future__ import annotations

import json

import pytest

from sparring.errors import RewardError
from sparring.rewards.code import CodeReward
from sparring.rewards.code_program import assemble

pytestmark = pytest.mark.shared

WRONG = """

def __wrong(r):
    if isinstance(r, bool): return not r
    if isinstance(r, (int, float, complex)): return r + 1
    if isinstance(r, str): return r + "x"
    if isinstance(r, list): return r + [None]
    if isinstance(r, tuple): return r + (None,)
    if isinstance(r, dict): return {**r, "__x": 1}
    if isinstance(r, set): return r | {"__x"}
    return 12345

def __made_wrong(f):
    return lambda *a, **k: __wrong(f(*a, **k))

"""
"""Gives every answer the right type and the wrong value."""


def read(path):
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


def judge(rows, completions):
    """(values, reasons)."""
    notes = {}
    columns = {
        name: [row.get(name) for row in rows]
        for name in ("tests", "entry_point", "test_setup_code", "challenge_tests", "reference")
    }
    try:
        reward = CodeReward(batch_seconds=3000, wall_seconds=30, use_challenge_tests=True)
    except RewardError as error:
        pytest.skip(f"this machine offers no isolating level: {error}")
    values = reward(
        prompts=[row["prompt"] for row in rows],
        completions=completions,
        log_extra=lambda name, found: notes.update({name: found}),
        **columns,
    )
    reward.close()
    return values, notes["reason"]


def fenced(code):
    return f"<think>hm</think>\n```python\n{code}\n```"


def mutant(row, *, has_open_prompt):
    reference = row["reference"].replace("\r\n", "\n")
    opened = row["entry_point"] if has_open_prompt else ""
    program = assemble(reference, prompt=row["prompt"], entry_point=opened)
    name = "max_chain_length" if row["entry_point"] == "Pair" else row["entry_point"]
    return program + WRONG + f"{name} = __made_wrong({name})\n"


def check(rows, *, has_open_prompt):
    values, reasons = judge(rows, [fenced(row["reference"]) for row in rows])
    wrong = [
        (row["task_id"], why) for row, v, why in zip(rows, values, reasons, strict=True) if v != 1
    ]
    assert wrong == []
    mutants = [fenced(mutant(row, has_open_prompt=has_open_prompt)) for row in rows]
    values, reasons = judge(rows, mutants)
    taken = [
        (row["task_id"], why) for row, v, why in zip(rows, values, reasons, strict=True) if v != 0
    ]
    assert taken == []


def test_humaneval_sample(shared_dir):
    check(read(shared_dir / "data/humaneval/humaneval.jsonl")[::3], has_open_prompt=True)


def test_mbpp_sample(shared_dir):
    rows = read(shared_dir / "data/mbpp/mbpp.jsonl")
    hard = {367, 414, 486, 533, 596, 601, 912, 927}
    check(
        [row for row in rows if row["task_id"] in hard or row["task_id"] % 12 == 0],
        has_open_prompt=False,
    )


@pytest.mark.slow
def test_humaneval_whole(shared_dir):
    rows = read(shared_dir / "data/humaneval/humaneval.jsonl")
    assert len(rows) == 164
    check(rows, has_open_prompt=True)


@pytest.mark.slow
def test_mbpp_whole(shared_dir):
    rows = read(shared_dir / "data/mbpp/mbpp.jsonl")
    assert len(rows) == 974
    check(rows, has_open_prompt=False)
