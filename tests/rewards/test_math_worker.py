"""The worker that compares formulas: killed on time, replaced, and never led to run Python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparring.rewards.math import MathReward
from sparring.rewards.math_pool import MathPool
from sparring.rewards.process import bare_environment

BOMB = "9^{9^{9^{9^{9}}}}"
REFERENCE = "\\sqrt{2}+x"


@pytest.fixture
def pool():
    made = MathPool(num_workers=1, limit_seconds=1.0)
    made.compare([("\\sqrt{3}", "1")])  # started and warm
    yield made
    made.close()


def test_a_bomb_costs_its_own_verdict_and_one_respawn(pool):
    before = pool.num_spawned
    pairs = [(REFERENCE, "x+\\sqrt{2}"), (REFERENCE, BOMB), (REFERENCE, "x+\\frac{2}{\\sqrt{2}}")]
    pairs += [(REFERENCE, "x+1")]
    start = time.perf_counter()
    results = pool.compare(pairs)
    seconds = time.perf_counter() - start
    assert [result.verdict for result in results] == [True, False, True, False]
    assert "took over 1 s" in results[1].reason
    assert pool.num_spawned == before + 1
    assert seconds < 15.0


def test_a_bomb_of_a_reference_is_not_blamed_on_the_answer(pool):
    reference = "(" * 150 + "x" + ")" * 150
    result = pool.compare([(reference, "x+1")])[0]
    assert result.verdict is None
    assert "reference" in result.reason


def test_equal_pairs_are_compared_once_and_a_reference_is_read_once(pool):
    pool.compare([(REFERENCE, "x")])
    start = time.perf_counter()
    results = pool.compare([(REFERENCE, BOMB), (REFERENCE, BOMB)])
    assert time.perf_counter() - start < 1.9
    assert results[0] == results[1]


def test_many_bombs_get_less_time_each_and_a_batch_has_a_budget():
    pool = MathPool(num_workers=2, limit_seconds=0.8, budget_seconds=4.0)
    pool.compare([(REFERENCE, "1"), (REFERENCE, "2")])
    bombs = [(REFERENCE, f"{n}^{{9^{{9^{{9^{{9}}}}}}}}") for n in range(2, 40)]
    start = time.perf_counter()
    results = pool.compare([*bombs, (REFERENCE, "x+\\sqrt{2}")])
    assert time.perf_counter() - start < 20.0
    reasons = {result.reason for result in results}
    assert "the comparison took over 0.8 s" in reasons
    assert "the comparison took over 0.2 s" in reasons
    assert results[-1].verdict is None
    assert "used up" in results[-1].reason
    pool.close()


def test_a_worker_is_recycled_and_then_serves_on():
    pool = MathPool(num_workers=1, recycle_after=2)
    answers = [f"x+{number}" for number in range(5)]
    assert [r.verdict for r in pool.compare([("x+3", answer) for answer in answers])] == [
        False, False, False, True, False,
    ]  # fmt: skip
    assert pool.num_spawned == 3
    pool.close()


def test_memory_is_limited(pool):
    """A gigabyte of digits is refused by the worker's own limit, in time, and the batch goes on."""
    results = pool.compare([(REFERENCE, "10^{10^{9}}+x"), (REFERENCE, "x+\\sqrt{2}")])
    assert [result.verdict for result in results] == [False, True]


def test_a_worker_that_cannot_start_gives_no_verdict_and_says_why():
    pool = MathPool(num_workers=1, module="sparring.rewards.no_such_module")
    result = pool.compare([(REFERENCE, "x")])[0]
    assert result.verdict is None
    assert "could not be started" in result.reason
    pool.close()


def test_close_leaves_no_process_and_no_descriptor():
    open_before = len(os.listdir("/proc/self/fd"))
    pool = MathPool(num_workers=2)
    pool.compare([(REFERENCE, "x"), (REFERENCE, "x+1")])
    pids = [worker._process.pid for worker in pool._workers]
    pool.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_a_worker_ends_with_its_parent():
    code = (
        "import os\n"
        "from sparring.rewards.math_pool import MathPool\n"
        "pool = MathPool(num_workers=1)\n"
        "pool.compare([('x', 'y')])\n"
        "print(pool._workers[0]._process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=bare_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    pid = int(run.stdout)
    deadline = time.monotonic() + 10.0
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()


def test_parse_expr_is_never_reached():
    """Answers of the table and attacks go through a worker in which parse_expr and eval are traps,
    and sympify of any text but digits and SymPy's own names."""
    table = Path(__file__).parent / "equivalence.jsonl"
    answers = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines()]
    pairs = [(row["reference"], row["answer"]) for row in answers if row["kind"] != "unfinished"]
    attacks = [
        "__import__('os').system('true')", "\\text{__import__('os')}", "1+1", "eval(1)", "3 \\% 2",
        "\\operatorname{exec}(1)", "[x for x in (1,)]", "lambda: 1", "x.__class__", "1/2", "2*3",
    ]  # fmt: skip
    pairs = [*pairs[::4], *(("x+1", attack) for attack in attacks)]
    code = (Path(__file__).parent / "trapped_worker.py").read_text(encoding="utf-8")
    run = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(pairs),
        env=bare_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    outcome = json.loads(run.stdout.splitlines()[-1])
    assert outcome["compared"] == len(pairs)
    assert outcome["sprung"] == []
    assert outcome["trap_works"] is True


def test_512_mixed_completions_judge_alike_in_any_order():
    texts = [f"\\boxed{{{n % 7}x+\\sqrt{{{n % 5 + 2}}}}}" for n in range(64)]
    references = [f"\\sqrt{{{n % 5 + 2}}}+{n % 3}x" for n in range(64)]
    reward = MathReward()
    forward = reward.verdicts(texts, references)
    backward = reward.verdicts(texts[::-1], references[::-1])
    reward.close()
    assert forward == backward[::-1]
    assert 0 < sum(bool(verdict.verdict) for verdict in forward) < 64
