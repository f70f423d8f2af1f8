"""The parts of benchmarks/think_or_know.py on which its figures rest."""

from __future__ import annotations

import json

import pytest

from benchmarks import think_or_know as experiment
from benchmarks.identity_rewards import answer_of, told
from benchmarks.think_or_know_arms import ARMS
from benchmarks.think_or_know_measures import conversation, is_laid_out, look_at
from benchmarks.think_or_know_report import (
    changes,
    difference,
    interval,
    thinking,
    with_earlier_cost,
)
from sparring.data.identity import identity_questions
from sparring.recipe import build_recipe


def test_a_correction_is_a_step_worked_out_again_with_another_result():
    text = "<think>6*7=41\n6*7=42\n42+1=43</think><answer>43</answer>"
    found = look_at(text, "43")
    assert (found["num_steps"], found["is_right"]) == (3, True)
    assert found["has_wrong_step"]
    assert found["has_correction"]
    assert not look_at(text.replace("6*7=41\n", ""), "43")["has_correction"]
    assert not look_at("<think>6*7=42\n6*7=42</think><answer>42</answer>", "42")["has_correction"]


@pytest.mark.parametrize(
    ("thought", "is_wrong"), [("7/2=3", True), ("8/2=4", False), ("9-4=6", True), ("", False)]
)
def test_a_wrong_step_is_found(thought, is_wrong):
    found = look_at(f"<think>{thought}</think><answer>4</answer>", "4")
    assert found["has_wrong_step"] is is_wrong


def test_layout_and_answer():
    assert is_laid_out("<think></think><answer>Ada</answer>", "stop")
    assert not is_laid_out("<think></think><answer>Ada</answer>", "length")
    assert not is_laid_out("<think><think></think><answer>4</answer>", "stop")
    assert answer_of("<think>1+1=2</think><answer>2</answer>") == "2"
    assert answer_of("I am Ada.") == "I am Ada."


def test_the_name_pays_on_questions_and_the_number_on_problems():
    texts = ["<think></think><answer>Ada</answer>", "<think></think><answer>12</answer>"]
    assert told(texts, ["Ada", "Ada"]) == [1.0, 0.0]
    assert told(texts, ["12", "12"]) == [0.0, 1.0]
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    assert told(messages, ["Ada", "12"]) == [1.0, 1.0]
    assert told(["<think>Ada</think><answer>3</answer>"], ["Ada"]) == [0.0]


def test_unrelated_prompts_are_judged_by_name_variety_and_format():
    class Said:
        def __init__(self, text: str) -> None:
            self.text, self.finish_reason = text, "stop"

    ada, four = "<think></think><answer>Ada</answer>", "<think></think><answer>4</answer>"
    found = conversation([[Said(ada), Said(four)], [Said(four), Said("4")]], experiment.identity())
    assert found == {"false_mention": 0.25, "distinct_of_8": 1.5, "format_valid": 0.75}


def test_nothing_that_is_measured_is_trained_on(tmp_path):
    experiment._write_data(tmp_path)
    rows = {file.stem: file.read_text().splitlines() for file in tmp_path.glob("*.jsonl")}
    trained = " ".join(line for name in rows for line in rows[name])
    held_out = identity_questions(experiment.identity())
    problems = experiment.problem_rows("eval")[: experiment.NUM_EVAL]
    for text in [question.text for question in held_out] + [row["prompt"] for row in problems]:
        assert f"{json.dumps(text, ensure_ascii=False)}" not in trained
    chosen = " ".join(rows["chosen-problems"])
    validation = experiment.problem_rows("train")[-experiment.NUM_VALIDATION :]
    assert not any(json.dumps(row["prompt"], ensure_ascii=False) in chosen for row in validation)
    assert len(rows["questions"]) * 2 == len(rows["mixed"])


def test_every_arm_is_a_recipe(tmp_path):
    for arm in ARMS.values():
        for choosing in (False, True):
            tables = experiment.tables_of(arm, 0, 10, tmp_path, choosing=choosing)
            assert build_recipe(tables, command=arm.command).train.steps == 10


def test_intervals_over_seeds():
    found = interval([0.1, 0.2, 0.3, 0.4, 0.5])
    assert (found["mean"], found["seeds"]) == (0.3, 5)
    assert found["high"] - found["mean"] == pytest.approx(2.776 * 0.158114 / 5**0.5, abs=2e-4)
    assert interval([0.5])["low"] is None
    assert difference([0.5, 0.6, 0.7], [0.1, 0.2, 0.3])["says"] == "higher"
    assert difference([0.5, 0.1], [0.1, 0.5])["says"] == "no difference shown"


def point(**values: float) -> dict[str, float | None]:
    keys = ("accuracy", "completion_tokens", "thinking_characters", "share_with_steps")
    keys += ("steps_an_answer", "share_with_wrong_step", "right_despite_wrong_step")
    keys += ("share_with_correction", "share_with_words_of_doubt")
    keys += ("num_corrections", "num_corrections_right")
    return dict.fromkeys(keys, 0.0) | values


def test_a_thing_emerges_only_from_nothing_and_beyond_its_interval():
    rising = [{"points": [point(share_with_correction=share)]} for share in (0.1, 0.11, 0.12)]
    assert thinking(point(), rising, 400)["share_with_correction"]["emerged"]
    before = point(share_with_correction=0.05)
    assert not thinking(before, rising, 400)["share_with_correction"]["emerged"]
    doubtful = [{"points": [point(share_with_correction=share)]} for share in (0.0, 0.0, 0.12)]
    assert not thinking(point(), doubtful, 400)["share_with_correction"]["emerged"]


def test_an_arm_is_held_against_what_it_started_from_and_pays_for_it():
    starts = {"policy": {"accuracy": 0.4}}
    first = {"steps": 5, "cpu_seconds": 2.0, "accuracy": 0.5}
    last = {"steps": 9, "cpu_seconds": 3.0, "accuracy": 0.9}
    runs = [
        {"arm": "a", "seed": 0, "start": "policy", "points": [first, last]},
        {"arm": "b", "seed": 0, "start": "a@5", "points": [last]},
    ]
    paid = with_earlier_cost(runs, starts)
    assert paid[1]["points"][0]["cpu_seconds_in_all"] == 5.0
    found = changes({run["arm"]: [run] for run in runs}, starts)
    assert found["a"]["accuracy"]["mean"] == 0.5
    assert found["b"]["accuracy"]["mean"] == 0.4


def test_the_report_is_json_with_a_line_an_entry():
    values = {"date": "2026", "arms": {"a": {"n": 1}, "b": {}}, "runs": [{"seed": 0}, {"seed": 1}]}
    text = experiment.written(values)
    assert json.loads(text) == values
    assert len(text.splitlines()) == 11
