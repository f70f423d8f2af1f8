"""Means with intervals over seeds for benchmarks/think_or_know.py, and what they allow to say.

The interval is Student's, over training seeds: the evaluation problems and their noise are the same
in every run, so it says how far another seed would lead and nothing of other problems.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from datetime import date
from typing import Any

from sparring.environment import describe_environment
from sparring.train.intervals import wilson

T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Student's t by degrees of freedom, two-sided 95%."""

THINKING = (
    "accuracy",
    "completion_tokens",
    "thinking_characters",
    "share_with_steps",
    "steps_an_answer",
    "share_with_wrong_step",
    "right_despite_wrong_step",
    "share_with_correction",
    "share_with_words_of_doubt",
)
NO_MEASURE = ("steps", "cpu_seconds", "cpu_seconds_in_all", "peak_mib", "peak_mib_above_start")
RARE = 0.01
"""What a policy does less often than this it does not do: only from there can a thing emerge."""


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean and 95% interval over seeds; low and high are None for a single seed."""
    mean, n = statistics.mean(values), len(values)
    half = T_95[n - 1] * statistics.stdev(values) / math.sqrt(n) if n > 1 else None
    return {
        "mean": round(mean, 4),
        "low": None if half is None else round(mean - half, 4),
        "high": None if half is None else round(mean + half, 4),
        "seeds": n,
    }


def over_seeds(points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Every number of these points, one a seed, with its interval; None counts as absent."""
    found: dict[str, Any] = {}
    for key in points[0]:
        values = [point[key] for point in points if point[key] is not None]
        if values and key != "steps":
            found[key] = interval([float(value) for value in values])
    return found


def difference(new: Sequence[float], old: Sequence[float]) -> dict[str, Any]:
    """Mean over seeds of new less old, seed by seed, and whether the interval leaves zero out."""
    found = interval([after - before for after, before in zip(new, old, strict=True)])
    low, high = found["low"], found["high"]
    found["says"] = "no difference shown"
    if low is not None and (low > 0 or high < 0):
        found["says"] = "higher" if low > 0 else "lower"
    return found


def started_from(
    run: dict[str, Any], runs: list[dict[str, Any]], starts: dict[str, Any]
) -> dict[str, Any]:
    """What was measured of the policy that a run began with; {} where that was not run."""
    name, _, steps = run["start"].partition("@")
    if name in starts:
        found: dict[str, Any] = starts[name]
        return found
    earlier = [r for r in runs if (r["arm"], r["seed"]) == (name, run["seed"])]
    points = [point for r in earlier for point in r["points"]]
    wanted = [point for point in points if str(point["steps"]) == steps] or points[-1:]
    return wanted[0] if wanted else {}


def with_earlier_cost(runs: list[dict[str, Any]], starts: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs, each point also with the cost of the arm that it started from."""
    found = []
    for run in runs:
        spent = started_from(run, runs, starts).get("cpu_seconds", 0.0)
        points = [
            p | {"cpu_seconds_in_all": round(p["cpu_seconds"] + spent, 2)} for p in run["points"]
        ]
        found.append(run | {"points": points})
    return found


def changes(
    by_arm: dict[str, list[dict[str, Any]]], starts: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """By arm: its last point less the policy that it began with, seed by seed."""
    runs = [run for found in by_arm.values() for run in found]
    result: dict[str, dict[str, Any]] = {}
    for name, found in by_arm.items():
        pairs = [(run["points"][-1], started_from(run, runs, starts)) for run in found]
        result[name] = {
            key: difference([new[key] for new, _ in pairs], [old[key] for _, old in pairs])
            for key in pairs[0][0]
            if key not in NO_MEASURE and all(_has(key, *pair) for pair in pairs)
        }
    return result


def _has(key: str, *points: dict[str, Any]) -> bool:
    return all(point.get(key) is not None for point in points)


def thinking(
    before: dict[str, Any], runs: list[dict[str, Any]], num_problems: int
) -> dict[str, Any]:
    """What changed from the first to the last milestone of a GRPO run, and what emerged."""
    found: dict[str, Any] = {}
    last = [run["points"][-1] for run in runs]
    for key in THINKING:
        points = [point for point in last if point[key] is not None]
        if points and before[key] is not None:
            found[key] = {
                "before": before[key],
                "after": interval([point[key] for point in points]),
                "change": difference([p[key] for p in points], [before[key]] * len(points)),
            }
    for key in ("share_with_steps", "share_with_correction", "share_with_words_of_doubt"):
        most = wilson(before[key] * num_problems, num_problems)[1]
        change = found[key]["change"]
        found[key]["before_at_most"] = round(most, 4)
        found[key]["emerged"] = most < RARE and change["says"] == "higher"
    tried, right = (sum(p[k] for p in last) for k in ("num_corrections", "num_corrections_right"))
    low, high = wilson(right, tried)
    found["corrections"] = {
        "before": [before["num_corrections_right"], before["num_corrections"]],
        "after_all_seeds": [right, tried],
        "success_low": round(low, 4),
        "success_high": round(high, 4),
    }
    return found


def contrasts(by_arm: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Arms against each other, seed by seed, at their last milestones."""
    pairs = {
        "grpo_less_ppo": ("grpo", "ppo"),
        "silent_sft_then_grpo_less_grpo": ("silent-sft-grpo", "silent-grpo"),
        "silent_sft_then_grpo_less_sft": ("silent-sft-grpo", "silent-sft"),
        "weak_sft_then_grpo_less_grpo": ("weak-sft-grpo", "weak-grpo"),
        "weak_sft_then_grpo_less_sft": ("weak-sft-grpo", "weak-sft"),
        "identity_sft_mixed_less_grpo": ("identity-sft-mixed", "identity-grpo"),
        "identity_sft_general_less_mixed": ("identity-sft-general", "identity-sft-mixed"),
        "warm_short_sft_less_grpo": ("warm-sft-short", "warm-grpo"),
        "warm_sft_less_grpo": ("warm-sft-mixed", "warm-grpo"),
        "warm_sft_less_grpo_mixed": ("warm-sft-mixed", "warm-grpo-mixed"),
    }
    found: dict[str, Any] = {}
    for name, (one, other) in pairs.items():
        both = [by_seed(by_arm.get(arm, [])) for arm in (one, other)]
        seeds = sorted(both[0].keys() & both[1].keys())
        if not seeds:
            continue
        keys = [k for k in both[0][seeds[0]] if k in both[1][seeds[0]] and k != "steps"]
        found[name] = {
            key: difference([both[0][s][key] for s in seeds], [both[1][s][key] for s in seeds])
            for key in keys
            if all(side[s][key] is not None for side in both for s in seeds)
        }
    return found


def by_seed(runs: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The last point of each seed."""
    return {run["seed"]: run["points"][-1] for run in runs}


def gain_per_minute(before: dict[str, Any], runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Points of accuracy gained for a CPU minute of training, by milestone."""
    found = []
    for place in range(len(runs[0]["points"])):
        points = [run["points"][place] for run in runs]
        gains = [60 * (p["accuracy"] - before["accuracy"]) / p["cpu_seconds"] for p in points]
        found.append({"steps": points[0]["steps"], **interval(gains)})
    return found


def report(starts: dict[str, Any], runs: list[dict[str, Any]], num_problems: int) -> dict[str, Any]:
    """Everything that the runs show, for docs/benchmarks/think-or-know.json."""
    runs = with_earlier_cost(runs, starts)
    by_arm: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        by_arm.setdefault(run["arm"], []).append(run)
    arms = {
        name: {
            "start": found[0]["start"],
            "points": [
                {
                    "steps": found[0]["points"][place]["steps"],
                    **over_seeds([run["points"][place] for run in found]),
                }
                for place in range(len(found[0]["points"]))
            ],
        }
        for name, found in by_arm.items()
    }
    # Runs may be of several commits, and this report of another; LOG.md names theirs.
    where = {key: value for key, value in describe_environment().items() if key != "commit"}
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "environment": where,
        "cost": "CPU seconds of training calls, one thread, reward workers included",
        "num_problems": num_problems,
        "starts": starts,
        "arms": arms,
        "changes": changes(by_arm, starts),
        "contrasts": contrasts(by_arm),
    }
    for name, arm, start in (
        ("thinking", "grpo", "policy"),
        ("thinking_from_silent", "silent-grpo", "silent"),
    ):
        if arm in by_arm:
            result[name] = thinking(starts[start], by_arm[arm], num_problems)
    for name in ("grpo", "ppo"):
        if name in by_arm:
            result.setdefault("accuracy_gain_a_cpu_minute", {})[name] = gain_per_minute(
                starts["policy"], by_arm[name]
            )
    training = sum(run["points"][-1]["cpu_seconds"] for run in runs)
    measuring = sum(run["measuring_cpu_seconds"] for run in runs)
    result["cpu_minutes"] = {
        "training": round(training / 60, 1),
        "measuring": round(measuring / 60, 1),
    }
    return result | {"runs": runs}
