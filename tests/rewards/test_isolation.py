"""Rewards in a worker process: hangs are killed, crashes survived, only JSON travels."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from sparring.errors import RewardError, RunError
from sparring.rewards.rows import judge_rows
from sparring.rewards.verdicts import load_reward

SOURCE = """
import os, sys, time
print("loading prints")
CALLS = []

def pid(completions, log_extra):
    print("judging prints")
    CALLS.append(1)
    log_extra("reason", [f"pid {os.getpid()} call {len(CALLS)}"] * len(completions))
    return [1.0] * len(completions)

def echo(completions, payload, completion_ids, *, scale=1.0):
    return [scale * len(str(item)) for item in payload]

async def later(completions):
    return [2.0] * len(completions)

def hangs(completions):
    time.sleep(100)

def crashes(completions):
    os._exit(7)

def raises(completions):
    raise KeyError("remote")

def nans(completions):
    return [float("nan"), float("inf"), None, 1][: len(completions)]

def words(completions):
    return ["one"] * len(completions)

class Built:
    def __init__(self, scale=1): self.scale = scale
    def __call__(self, completions): return [self.scale] * len(completions)

def reads_input(completions):
    return [float(len(sys.stdin.read()))] * len(completions)
"""


@pytest.fixture
def loaded(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(SOURCE, encoding="utf-8")
    rewards = []

    def load(name, **fields):
        rewards.append(load_reward(f"{file}:{name}", isolate=True, **fields))
        return rewards[-1]

    yield load
    for reward in rewards:
        reward.close()


def rows(count=2, **columns):
    return [{"completion": "x", **columns} for _ in range(count)]


def test_it_runs_in_one_other_process_that_stays(loaded, capfd):
    reward = loaded("pid")
    reasons = [judge_rows(reward, rows())[0]["reason"] for _ in range(2)]
    assert reasons[0].endswith("call 1")
    assert reasons[1].endswith("call 2")
    assert reasons[0].split()[1] == reasons[1].split()[1] != str(os.getpid())
    captured = capfd.readouterr()
    assert "prints" not in captured.out
    assert "judging prints" in captured.err


def test_arguments_knobs_and_async_functions_travel(loaded):
    payload = {"list": [1, 2.5, None, True], "text": "数"}
    row = {"completion": "x", "payload": payload, "completion_ids": [1, 2]}
    judged = judge_rows(loaded("echo", knobs={"scale": 2.0}), [row])
    assert judged[0]["reward"] == 2.0 * len(str(payload))
    assert judge_rows(loaded("later"), rows())[0]["reward"] == 2.0
    assert judge_rows(loaded("Built", knobs={"scale": 3}), rows())[0]["reward"] == 3.0
    assert judge_rows(loaded("reads_input"), rows())[0]["reward"] == 0.0


def test_what_is_no_json_is_refused_by_name(loaded):
    row = {"completion": "x", "payload": {1, 2}, "completion_ids": []}
    with pytest.raises(RewardError, match="'payload' holds a set"):
        judge_rows(loaded("echo"), [row])
    with pytest.raises(RewardError, match="keys that are no strings"):
        judge_rows(loaded("echo"), [{**row, "payload": {1: 2}}])


def test_a_hang_is_killed_and_the_next_call_starts_anew(loaded):
    reward = loaded("hangs", timeout_seconds=0.5)
    pid = reward.function._process.pid
    start = time.perf_counter()
    judged = judge_rows(reward, rows())
    assert time.perf_counter() - start < 5.0
    assert [row["reward"] for row in judged] == [None, None]
    assert "timeout" in judged[0]["reason"]
    assert not Path(f"/proc/{pid}").exists()
    assert "timeout" in judge_rows(reward, rows())[0]["reason"]


def test_a_crash_costs_the_batch_and_not_the_run(loaded):
    reward = loaded("crashes")
    for _ in range(2):
        judged = judge_rows(reward, rows())
        assert judged[0]["reward"] is None
        assert "ended with code 7" in judged[0]["reason"]


def test_remote_errors_keep_their_name_and_traceback(loaded):
    judged = judge_rows(loaded("raises"), rows())
    assert judged[0]["reason"] == "error: KeyError: 'remote'"


def test_odd_numbers_and_broken_contracts_are_seen_from_here(loaded):
    judged = judge_rows(loaded("nans"), rows(4))
    assert [row["reward"] for row in judged] == [None, None, None, 1.0]
    with pytest.raises(RewardError, match="returned 'one'"):
        judge_rows(loaded("words"), rows())


def test_loading_fails_with_the_same_words_as_in_this_process(loaded, tmp_path):
    with pytest.raises(RewardError, match="'nope' is not there; functions of this file: Built"):
        loaded("nope")
    with pytest.raises(RewardError, match="takes no 'scales'; it takes scale"):
        loaded("echo", knobs={"scales": 1})
    dying = tmp_path / "dying.py"
    dying.write_text("import os\nos._exit(4)\n", encoding="utf-8")
    with pytest.raises(RewardError, match="could not load it: ended with code 4"):
        load_reward(f"{dying}:any", isolate=True)


def test_named_rewards_run_isolated_too():
    reward = load_reward("math", isolate=True)
    judged = judge_rows(reward, [{"completion": "\\boxed{x+1}", "reference": "1+x"}])
    assert judged[0]["reward"] == 1.0
    reward.close()


def test_run_error_is_a_run_error():
    assert issubclass(RunError, RuntimeError)
