"""Which problems become which data set: demonstrations for SFT, prompts for GRPO, held-out prompts.

Demonstrations and training prompts are drawn from the problems that are not held out; the held-out
prompts from those that are, no signature and no wording twice. In a demonstration a coin decides
whether the steps are shown or the answer alone: a policy trained on both can reason, but does so
only some of the time.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from quickstart.problems import KINDS, Problem, draw_problem

LEVEL_WEIGHTS = {1: 1, 2: 3, 3: 4, 4: 4}
ENGLISH_SHARE = 0.75


def draw_problems(seed: int, *, held_out: bool) -> Iterator[Problem]:
    """Endless problems of all kinds, levels and languages, all held out or none of them."""
    rng = random.Random(seed)
    kinds, levels, weights = list(KINDS), list(LEVEL_WEIGHTS), list(LEVEL_WEIGHTS.values())
    while True:
        problem = draw_problem(
            rng,
            kind=rng.choice(kinds),
            level=rng.choices(levels, weights)[0],
            language="en" if rng.random() < ENGLISH_SHARE else "zh",
        )
        if problem.is_held_out == held_out:
            yield problem


def distinct_problems(seed: int, count: int, *, held_out: bool) -> list[Problem]:
    """`count` problems of which no two share a signature (hence no two a wording)."""
    found: dict[str, Problem] = {}
    for problem in draw_problems(seed, held_out=held_out):
        found.setdefault(problem.signature, problem)
        if len(found) == count:
            break
    return list(found.values())


def _draw_drills(seed: int) -> Iterator[Problem]:
    """Endless long sums, none held out."""
    rng = random.Random(seed)
    while True:
        problem = draw_problem(rng, kind="sum", level=max(LEVEL_WEIGHTS), language="en")
        if not problem.is_held_out:
            yield problem


def answer_text(problem: Problem, *, with_steps: bool) -> str:
    """What an assistant writes: the steps between think tags, or nothing between them."""
    steps = "\n".join(problem.steps) if with_steps else ""
    return f"<think>{steps}</think><answer>{problem.answer}</answer>"


def demonstrations(
    seed: int, count: int, *, steps_share: float, drill_share: float = 0.0
) -> Iterator[dict[str, Any]]:
    """Rows {"messages": [user, assistant]}; the share that shows its steps is `steps_share`.

    drill_share: rows that are long sums instead of a problem of any kind; adding and taking away
    are what takes longest to learn.
    """
    coin = random.Random(seed + 1)
    problems, drills = draw_problems(seed, held_out=False), _draw_drills(seed + 2)
    for _ in range(count):
        problem = next(drills if coin.random() < drill_share else problems)
        text = answer_text(problem, with_steps=coin.random() < steps_share)
        yield {
            "messages": [
                {"role": "user", "content": problem.prompt},
                {"role": "assistant", "content": text},
            ]
        }


def prompt_row(problem: Problem) -> dict[str, Any]:
    """A row for GRPO or evaluation: the prompt, its reference answer, and what it is."""
    return {
        "prompt": problem.prompt,
        "reference": str(problem.answer),
        "kind": problem.kind,
        "level": problem.level,
        "language": problem.language,
    }
