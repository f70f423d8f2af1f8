"""Throughput of the reward `math`, beside Math-Verify called inline as open-r1 does.

512 completions of 64 prompts: 40 % integers, 20 % decimals or fractions, 30 % LaTeX formulas, 10 %
without an answer, half right, after some hundred characters of reasoning. Ours judges them in one
call with two workers and a wall limit of 3 s a comparison; the other way parses and verifies one
after the other in this process. Both are timed warm (imports and workers up, no pair seen before),
the first batch with the start of the workers apart. Prints JSON.

    python benchmarks/math_reward.py [--repeats 5]
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import statistics
import time
from dataclasses import dataclass
from datetime import date
from typing import Any

from sparring.environment import describe_environment
from sparring.rewards.math import MathReward

NUM_PROMPTS, GROUP_SIZE = 64, 8
LIMIT_SECONDS = 3.0
SENTENCES = (
    "First we write down what is given and what is asked.",
    "Then the two quantities are added, which gives an intermediate value of {n}.",
    "Multiplying by {n} and simplifying, the terms cancel.",
    "Let us check this: with {n} on both sides the equation $x + {n} = y$ holds.",
    "So the value must lie between {n} and the bound that we found before.",
)


@dataclass(frozen=True)
class Item:
    """One completion with its reference; is_right: what a fair judge says."""

    completion: str
    reference: str
    is_right: bool


def make_items(seed: int) -> list[Item]:
    """The batch, in exact shares; those without an answer are among the wrong ones."""
    rng = random.Random(seed)
    kinds = ["integer"] * 29 + ["decimal"] * 7 + ["fraction"] * 7 + ["formula"] * 21
    items, wrong_places = [], []
    for kind in kinds:
        reference, right, wrong = _answers(kind, rng)
        for sample in range(GROUP_SIZE):
            is_right = sample % 2 == 0
            answer = rng.choice(right) if is_right else wrong(rng)
            text = f"{_reasoning(rng)}\nSo it is \\boxed{{{answer}}}."
            if not is_right:
                wrong_places.append(len(items))
            items.append(Item(text, reference, is_right))
    for place in rng.sample(wrong_places, len(items) // 10):
        text = _reasoning(rng) + "\nI cannot finish this."
        items[place] = Item(text, items[place].reference, False)
    rng.shuffle(items)
    return items


def _reasoning(rng: random.Random) -> str:
    lines = [rng.choice(SENTENCES).format(n=rng.randint(2, 999)) for _ in range(rng.randint(5, 12))]
    return "<think>" + "\n".join(lines) + "</think>"


def _answers(kind: str, rng: random.Random) -> tuple[str, list[str], Any]:
    """A reference, right spellings of it, and a maker of wrong answers of the same kind."""
    a, b, c = rng.randint(2, 9), rng.randint(11, 99), rng.choice([2, 3, 5, 7])
    if kind == "integer":
        value = rng.randint(-5000, 50000)
        return (
            str(value),
            [str(value), f"{value:,}"],
            lambda r: str(r.randint(-5000, 50000) * 2 + 1),
        )
    if kind == "decimal":
        value = rng.randint(1, 9999) * 2 + 1
        spelled = f"{value / 100:.2f}"
        right = [spelled, spelled + "0", f"\\frac{{{value}}}{{100}}"]
        return spelled, right, lambda r: f"{r.randint(1, 9999) / 50:.2f}1"
    if kind == "fraction":
        top = b * 10 + 1
        right = [
            f"\\frac{{{top}}}{{{a * 10}}}",
            f"{top}/{a * 10}",
            f"\\dfrac{{{2 * top}}}{{{a * 20}}}",
        ]
        return right[0], right, lambda r: f"\\frac{{{r.randint(2, 999)}}}{{{a * 10 + 1}}}"
    root = f"{a}\\sqrt{{{c}}}"
    forms = [
        (f"{root}+{b}", [f"{b}+{root}", f"{b}+\\sqrt{{{a * a * c}}}"], (f"{root}+", "")),
        (f"x^2-{a * a}", [f"(x-{a})(x+{a})", f"-{a * a}+x^{{2}}"], ("x^2-x-", "")),
        (f"\\frac{{{a}\\pi}}{{{b}}}", [f"{a}\\pi/{b}", f"\\frac{{{a}}}{{{b}}}\\pi"], ("\\pi+", "")),
        (f"\\left({a},\\frac{{{b}}}{{{c}}}\\right)", [f"({a}, {b}/{c})"], (f"({a},", ")")),
        (f"{a}x+{b}", [f"{b}+{a}x", f"y={a}x+{b}"], (f"{a}x-", "")),
        (f"[0,{root})", [f"[0, {root})", f"0 \\leq x < {root}"], ("[0,\\sqrt{2}+", ")")),
    ]
    reference, right, (before, after) = rng.choice(forms)
    return reference, right, lambda r: f"{before}{r.randint(2, 9999)}{after}"


def inline_way() -> Any:
    """A judge that calls Math-Verify in this process for each completion, as open-r1 does."""
    from math_verify import LatexExtractionConfig, parse, verify
    from math_verify.parser import NormalizationConfig

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    config = LatexExtractionConfig(
        normalization_config=NormalizationConfig(
            nits=False, malformed_operators=False, basic_latex=True, boxed="all", units=True
        ),
        boxed_match_priority=0,
        try_extract_without_anchor=False,
    )

    def judge(items: list[Item]) -> list[float | None]:
        values: list[float | None] = []
        for item in items:
            gold = parse(item.reference, extraction_mode="first_match")
            if not gold:
                values.append(None)
                continue
            answer = parse(
                item.completion, extraction_config=[config], extraction_mode="first_match"
            )
            values.append(float(verify(gold, answer)))
        return values

    return judge


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--repeats", type=int, default=5)
    repeats = arguments.parse_args().repeats
    reward = MathReward(limit_seconds=LIMIT_SECONDS, num_workers=2)
    inline = inline_way()

    def ours(items: list[Item]) -> list[float | None]:
        return reward([item.completion for item in items], [item.reference for item in items])

    cold, _ = timed(ours, make_items(1000))
    timed(inline, make_items(1000)[:32])
    seconds: dict[str, list[float]] = {"sparring": [], "inline": []}
    agreeing: dict[str, list[float]] = {"sparring": [], "inline": []}
    for seed in range(repeats):
        items = make_items(seed)
        for name, judge in (("sparring", ours), ("inline", inline)):
            taken, values = timed(judge, items)
            seconds[name].append(taken)
            right = sum(value == item.is_right for value, item in zip(values, items, strict=True))
            agreeing[name].append(right / len(items))
    reward.close()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(
        json.dumps(
            {
                "date": date.today().isoformat(),
                "environment": describe_environment(),
                "completions": NUM_PROMPTS * GROUP_SIZE,
                "repeats": repeats,
                "seconds": {name: round(value, 3) for name, value in medians.items()},
                "worst_seconds": round(max(seconds["sparring"]), 3),
                "first_batch_seconds": round(cold, 3),
                "times_faster": round(medians["inline"] / medians["sparring"], 2),
                "verdicts_right": {
                    name: round(statistics.mean(values), 4) for name, values in agreeing.items()
                },
            },
            indent=2,
        )
    )


def timed(judge: Any, items: list[Item]) -> tuple[float, list[float | None]]:
    start = time.perf_counter()
    values = judge(items)
    return time.perf_counter() - start, values


if __name__ == "__main__":
    main()
