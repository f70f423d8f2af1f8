"""The quickstart, proved: does GRPO make the shipped policy better, and a random reward not?

For each seed the packaged recipe `quickstart` and its control `quickstart-random` run through the
command line, as a user runs them. Prints one JSON object: per run accuracy before and after with
its 95% interval, the share of answers with steps and the tokens of thinking, seconds and peak
memory; then what holds over all seeds. Exit code 1 where a target is missed.

    python benchmarks/quickstart.py --seeds 5 --threads 2 --output quickstart.json
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

from sparring.environment import describe_environment

RECIPES = ("quickstart", "quickstart-random")
TARGET_GAIN = 0.20
TARGET_SEEDS = 0.8
TARGET_SECONDS = 360
BEFORE_BETWEEN = (0.25, 0.60)
THOUGHT = re.compile("<think>(.*?)</think>", re.DOTALL)


def reasoning(file: Path) -> dict[str, float]:
    """Share of completions with steps, and characters of thinking and tokens a completion."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    thoughts = [THOUGHT.search(row["completion"]) for row in rows]
    lengths = [len(thought[1]) if thought else 0 for thought in thoughts]
    return {
        "share_with_steps": round(sum(length > 0 for length in lengths) / len(rows), 4),
        "thinking_characters": round(statistics.mean(lengths), 2),
        "completion_tokens": round(statistics.mean(row["num_tokens"] for row in rows), 2),
    }


def run(recipe: str, seed: int, threads: int, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """One run of a packaged recipe in its own process, and what came out of it."""
    directory = folder / f"{recipe}-{seed}"
    command = [sys.executable, "-m", "sparring", "grpo", recipe]
    command += ["--run.dir", str(directory), "--run.seed", str(seed), *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    subprocess.run(command, env=environment, check=True, stdout=sys.stderr)
    summary = json.loads((directory / "summary.json").read_text())
    found: dict[str, Any] = {"seed": seed, "seconds": summary["seconds"]}
    found["peak_memory_mib"] = round(summary["peak_memory_bytes"] / 2**20)
    files = sorted((directory / "rollouts").glob("eval_*.jsonl"))
    for when, file in (("before", files[0]), ("after", files[-1])):
        wanted = ("accuracy", "low", "high", "n", "greedy")
        found[when] = {key: round(summary[when][key], 4) for key in wanted} | reasoning(file)
    return found


def verdict(runs: list[dict[str, Any]], control: list[dict[str, Any]]) -> dict[str, Any]:
    """What holds over all seeds; `passed` where every target is met."""

    def mean(of: list[dict[str, Any]], when: str, key: str) -> float:
        return round(statistics.mean(float(one[when][key]) for one in of), 4)

    gains = [one["after"]["accuracy"] - one["before"]["accuracy"] for one in runs]
    better = [
        gain >= TARGET_GAIN and one["after"]["low"] > one["before"]["high"]
        for gain, one in zip(gains, runs, strict=True)
    ]
    rises = ("accuracy", "share_with_steps", "thinking_characters")
    low, high = BEFORE_BETWEEN
    checks = {
        "before_in_range": all(low <= one["before"]["accuracy"] <= high for one in runs),
        "enough_problems": all(one["before"]["n"] >= 500 for one in runs),
        "enough_seeds_better": sum(better) >= TARGET_SEEDS * len(runs),
        "all_rise_together": all(mean(runs, "after", k) > mean(runs, "before", k) for k in rises),
        "in_time": max(one["seconds"] for one in runs) <= TARGET_SECONDS,
    }
    result: dict[str, Any] = {
        "gains": [round(gain, 4) for gain in gains],
        "seeds_better": f"{sum(better)} of {len(runs)}",
        "mean_before": mean(runs, "before", "accuracy"),
        "mean_after": mean(runs, "after", "accuracy"),
        "slowest_seconds": max(one["seconds"] for one in runs),
        "peak_memory_mib": max(one["peak_memory_mib"] for one in runs),
    }
    if control:
        result["control_mean_after"] = mean(control, "after", "accuracy")
        result["control_limit"] = mean(control, "before", "high")
        checks["control_is_not_better"] = result["control_mean_after"] <= result["control_limit"]
    return result | {"checks": checks, "passed": all(checks.values())}


def main() -> None:
    """Run all seeds and print the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--no-control", action="store_true")
    parser.add_argument("--output", type=Path, help="a file for the report, beside standard output")
    arguments, overrides = parser.parse_known_args()
    recipes = RECIPES[:1] if arguments.no_control else RECIPES
    wanted = [(recipe, seed) for seed in range(arguments.seeds) for recipe in recipes]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.jobs) as pool:

        def one(job: tuple[str, int]) -> dict[str, Any]:
            return run(*job, arguments.threads, Path(folder), overrides)

        found = list(zip(wanted, pool.map(one, wanted), strict=True))
    runs, control = ([r for (name, _), r in found if name == recipe] for recipe in RECIPES)
    report: dict[str, Any] = {
        "date": date.today().isoformat(),
        "environment": describe_environment(),
        "threads": arguments.threads,
        "jobs": arguments.jobs,
        "verdict": verdict(runs, control),
    }
    report |= {"runs": runs, "control": control}
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")
    sys.exit(0 if report["verdict"]["passed"] else 1)


if __name__ == "__main__":
    main()
