"""How many untrusted programs a second the sandbox runs, at each level that this machine offers.

    python benchmarks/sandbox.py [--runs 400] [--workers 2]

Prints one JSON object: per level programs a second over all workers, and the wall time of one run
on an idle pool (median and 95th percentile, milliseconds). "script" prints one line; "calls" is a
function with three tests; "tests" is a test program that calls a function in a second sandbox.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from functools import partial

from sparring.environment import describe_environment
from sparring.errors import RewardError
from sparring.rewards.sandbox.ladder import FULL, LANDLOCK
from sparring.rewards.sandbox.limits import Limits
from sparring.rewards.sandbox.runner import Sandbox
from sparring.rewards.sandbox.runs import RunResult

LIMITS = Limits(wall_seconds=30.0)
SCRIPT = "import math\nprint(math.factorial(20))\n"
FUNCTION = "def f(x):\n    return sorted(x)\n"
CALLS = [{"function": "f", "args": [[3, 1, n]], "kwargs": {}} for n in range(3)]
TESTS = {
    "program": "f = __remote__('f')\nfor n in range(3): __record__(f([n, 1])[1] >= 1, '')",
    "equality": [1e-9, False, True],
    "stop_early": True,
}


KINDS: dict[str, Callable[[Sandbox], RunResult]] = {
    "script": lambda sandbox: sandbox.run(SCRIPT, limits=LIMITS),
    "calls": lambda sandbox: sandbox.run(FUNCTION, mode="calls", calls=CALLS, limits=LIMITS),
    "tests": lambda sandbox: sandbox.run_tests(FUNCTION, TESTS, limits=LIMITS)[0],
}


def measure(run: Callable[[], RunResult], num_runs: int, num_workers: int) -> dict[str, float]:
    single = []
    for _ in range(min(50, num_runs)):
        started = time.perf_counter()
        assert run().status == "ok"
        single.append(time.perf_counter() - started)
    started = time.perf_counter()
    with ThreadPoolExecutor(num_workers) as threads:
        results = list(threads.map(lambda _: run(), range(num_runs)))
    seconds = time.perf_counter() - started
    assert all(result.status == "ok" for result in results)
    single.sort()
    return {
        "runs_per_second": round(num_runs / seconds, 1),
        "median_ms": round(1e3 * statistics.median(single), 2),
        "p95_ms": round(1e3 * single[int(0.95 * (len(single) - 1))], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=400)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    report: dict[str, object] = {
        "date": date.today().isoformat(),
        "environment": describe_environment(),
        "cores": len(os.sched_getaffinity(0)),
        "workers": arguments.workers,
        "runs": arguments.runs,
    }
    levels: dict[str, object] = {}
    for level in (FULL, LANDLOCK):
        started = time.perf_counter()
        try:
            sandbox = Sandbox(require=level, strongest=level, num_workers=arguments.workers)
        except RewardError as error:
            levels[level] = {"not offered": str(error)}
            continue
        with sandbox:
            start_ms = round(1e3 * (time.perf_counter() - started), 1)
            runs = (arguments.runs, arguments.workers)
            levels[level] = {
                "start_ms": start_ms,
                "landlock_abi": sandbox.level.landlock_abi,
                **{name: measure(partial(run, sandbox), *runs) for name, run in KINDS.items()},
            }
    report["levels"] = levels
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
