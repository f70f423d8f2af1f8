"""The problems that ship with the package: right, repeatable, the held-out ones unseen."""

from __future__ import annotations

import ast
import json
import operator
import random
import re
from pathlib import Path

import pytest

from quickstart.datasets import LEVEL_WEIGHTS, demonstrations, distinct_problems
from quickstart.make import EVAL_SEED, NUM_EVAL, TRAIN_SEED, eval_rows, sft_rows, train_rows
from quickstart.problems import KINDS, LANGUAGES, LARGEST, LEVELS, Problem, draw_problem

ASSETS = Path(__file__).parent.parent / "sparring" / "assets" / "quickstart"
SIGNS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def draws(count: int, *, seed: int = 0) -> list[Problem]:
    rng = random.Random(seed)
    return [
        draw_problem(rng, kind=kind, level=level, language=language)
        for kind in KINDS
        for level in LEVELS
        for language in LANGUAGES
        for _ in range(count)
    ]


def value_of(node: ast.expr) -> int:
    if isinstance(node, ast.BinOp):
        return SIGNS[type(node.op)](value_of(node.left), value_of(node.right))
    assert isinstance(node, ast.Constant)
    return int(node.value)


def solve(problem: Problem) -> float:
    """The answer by the text of the prompt alone, without the generator's steps."""
    text, level = problem.prompt, problem.level
    n = [int(found) for found in re.findall(r"\d+", text)]
    if problem.kind in ("expression", "sum"):
        return value_of(ast.parse(re.sub(r"[^\d+*()-]", "", text), mode="eval").body)
    if problem.kind == "chain":
        value = float(n[0])
        words = re.findall("Add|Subtract|Multiply|Divide|加|减|乘|除", text)
        for word, number in zip(words, n[1:], strict=True):
            if word in ("Add", "加"):
                value += number
            elif word in ("Subtract", "减"):
                value -= number
            else:
                value = value * number if word in ("Multiply", "乘") else value / number
        return value
    if problem.kind == "shopping":
        cost = n[0] * n[1] + (n[2] * n[3] if level >= 3 else 0)
        return n[-1] - cost if level in (2, 4) else cost
    if problem.kind == "bus":
        signs = [
            1 if word in ("on", "上来") else -1
            for word in re.findall(r"get (on|off)|(上来|下去)", text)
            for word in word
            if word
        ]
        return n[0] + sum(sign * number for sign, number in zip(signs, n[1:], strict=True))
    if problem.kind == "compare":
        if level == 1:
            return n[0] + n[1]
        second = n[0] * n[1]
        if level == 2:
            return n[0] + second
        third = second + (-n[2] if "fewer" in text or "少" in text.replace("多少", "") else n[2])
        return second + third if level == 3 else n[0] + second + third
    if problem.kind == "sharing":
        each = n[0] / n[1] if level <= 2 else n[0] * n[1] / n[2]
        if level >= 2:
            number = n[2 if level == 2 else 3]
            each += -number if "eats" in text or "吃" in text else number
        return each * n[-1] if level == 4 else each
    if problem.kind == "travel":
        way = n[0] * n[1] + (n[2] * n[3] if level >= 3 else 0)
        return n[-1] - way if level in (2, 4) else way
    assert problem.kind == "rectangle"
    if level == 4:
        return n[0] * n[1] + n[2] * n[3] + n[4]
    return n[0] * n[1] if level == 1 else 2 * (n[0] + n[1]) * (n[2] if level == 3 else 1)


def test_answers_follow_from_the_text_alone() -> None:
    for problem in draws(60):
        assert solve(problem) == problem.answer, problem


def test_steps_are_true_and_lead_to_the_answer() -> None:
    for problem in draws(40):
        known = {int(found) for found in re.findall(r"\d+", problem.prompt)}
        known |= {2} if problem.kind == "rectangle" else set()  # a fence has two of each side
        for step in problem.steps:
            left, sign, right, result = re.fullmatch(r"(\d+)([-+*/])(\d+)=(\d+)", step).groups()
            a, b, c = int(left), int(right), int(result)
            assert c == {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign], problem
            assert {a, b} <= known, problem
            assert 1 <= c <= LARGEST, problem
            known.add(c)
        assert c == problem.answer


def test_a_higher_level_takes_more_steps() -> None:
    problems = draws(20)
    for kind in KINDS:
        steps = [
            sum(len(p.steps) for p in problems if (p.kind, p.level) == (kind, level))
            for level in LEVELS
        ]
        assert steps == sorted(steps)
        assert steps[0] < steps[-1]


def test_the_same_seed_draws_the_same_problems() -> None:
    assert draws(5, seed=3) == draws(5, seed=3)
    assert draws(5, seed=3) != draws(5, seed=4)


@pytest.mark.parametrize("wrong", [{"kind": "poems"}, {"level": 9}, {"language": "fr"}])
def test_unknown_names_are_refused_with_the_known_ones(wrong: dict[str, object]) -> None:
    asked = {"kind": "bus", "level": 1, "language": "en"} | wrong
    with pytest.raises(ValueError, match="known: "):
        draw_problem(random.Random(0), **asked)


def test_about_half_of_the_demonstrations_show_their_steps() -> None:
    answers = [row["messages"][1]["content"] for row in demonstrations(5, 4000, steps_share=0.5)]
    bare = sum(answer.startswith("<think></think><answer>") for answer in answers)
    assert 0.47 < bare / len(answers) < 0.53
    with_steps = next(answer for answer in answers if "=" in answer)
    assert re.fullmatch(r"<think>[^<]+</think><answer>\d+</answer>", with_steps)


def test_shipped_problems_are_what_the_generator_makes() -> None:
    for name, rows in (("train", train_rows()), ("eval", eval_rows())):
        lines = (ASSETS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == rows
    assert len(rows) >= 500
    assert {row["level"] for row in rows} == set(LEVEL_WEIGHTS)
    assert {row["kind"] for row in rows} == set(KINDS)
    assert {row["language"] for row in rows} == set(LANGUAGES)


def test_no_held_out_problem_is_in_any_training_set() -> None:
    shipped = (ASSETS / "eval.jsonl").read_text(encoding="utf-8").splitlines()
    held_out = {json.loads(line)["prompt"] for line in shipped}
    assert len(held_out) == NUM_EVAL
    trained = {row["prompt"] for row in train_rows()}
    trained |= {row["messages"][0]["content"] for row in sft_rows()}
    assert len(trained) > 20_000
    assert not held_out & trained


def test_held_out_problems_are_not_trained_on_in_other_words() -> None:
    held_out = {p.signature for p in distinct_problems(EVAL_SEED, NUM_EVAL, held_out=True)}
    trained = {p.signature for p in distinct_problems(TRAIN_SEED, 5000, held_out=False)}
    assert len(held_out) == NUM_EVAL
    assert not held_out & trained
    same = [
        {p.is_held_out for p in draws(1, seed=seed) if p.signature in held_out}
        for seed in range(30)
    ]
    assert set().union(*same) == {True}
