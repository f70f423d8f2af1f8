"""The advice on data sets of every kind; a scripted sampler stands for the model."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from sparring.data.identity import build_identity, identity_rows
from sparring.errors import RewardError
from sparring.recipe import Recipe, build_recipe, load_recipe
from sparring.rewards.verdicts import RewardReport
from sparring.rollout.sampler import Sampling
from sparring.train import grpo, sft
from sparring.train.advise import Advice, advise
from sparring.train.advise_files import write_advice
from sparring.train.evaluate import Measured, judging_reward, summarise
from sparring.train.inputs import load_rewards
from sparring.train.reward_probe import probe_rewards
from sparring.types import Group, Prompt, Rollout
from tests.train.tiny_run import write_checkpoint, write_data

MATH = [
    {"prompt": f"Tom has {n} apples and buys {n + 2} more. How many?", "reference": str(2 * n + 2)}
    for n in range(40)
]
FUNCTIONS = """
def always(completions):
    return [1.0 for _ in completions]

def small(completions):
    return [0.25 for _ in completions]

def not_empty(completions):
    return [float(bool(text)) for text in completions]

def has_tags(completions):
    return [float("<answer>" in text) for text in completions]

def right(completions, reference):
    return [float(text.strip().endswith(wanted)) for text, wanted in zip(completions, reference)]

def graded(completions):
    return [text.count("e") / max(1, len(text)) for text in completions]

def never(completions, reference):
    return [0.0 for _ in completions]

def nothing(completions):
    return [None for _ in completions]
"""


def sampler(solved: Callable[[int, int], bool], **changes) -> Callable[..., Measured]:
    """A sampler in whose groups sample `s` of the `p`th prompt is right where solved(p, s) is."""

    def sample(recipe, rewards, places: Sequence[int], num_samples: int) -> Measured:
        name = judging_reward(rewards)
        groups = []
        for number, place in enumerate(places):
            prompt = Prompt(id=place, token_ids=(1,), text="q")
            rollouts = tuple(
                Rollout(
                    prompt=prompt,
                    sample_index=index,
                    token_ids=torch.zeros(5, dtype=torch.int64),
                    logprobs=torch.zeros(5),
                    loss_mask=torch.ones(5, dtype=torch.bool),
                    text="",
                    finish_reason=changes.get("finish", "stop"),
                    policy_version=0,
                )
                for index in range(num_samples)
            )
            part = torch.tensor([float(solved(number, index)) for index in range(num_samples)])
            part = part * changes.get("credit", 1.0)
            parts = {reward.name: part for reward in rewards}
            groups.append(
                Group(prompt=prompt, rollouts=rollouts, rewards_G=part, reward_parts=parts)
            )
        count = len(groups) * num_samples
        report = RewardReport(
            name=name,
            num_samples=count,
            num_judged=count,
            mean=0.0,
            std=0.0,
            seconds=0.0,
            reasons={},
            first_traceback="",
            metrics={},
            extras={"answer": [changes.get("answer", "7")] * count},
        )
        sampling = Sampling(max_completion_tokens=8)
        return summarise(groups, report, sampling=sampling, greedy=None)

    return sample


USEFUL = sampler(lambda prompt, index: (prompt + index) % 3 == 0)


def forbidden(*_):
    raise AssertionError("nothing is to be sampled here")


def recipe(folder: Path, rows: list[dict], *, reward: str = "math", **changes) -> Recipe:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    (folder / "functions.py").write_text(FUNCTIONS)
    tables = {"model": {"path": "somewhere"}, "data": {"train": str(path)}}
    if reward:
        name = f"{folder}/functions.py:{reward}" if reward not in ("math", "format") else reward
        tables["reward"] = [{"name": name}]
    return build_recipe(tables | changes, command="advise")


def ask(made: Recipe, sample=USEFUL, **rest) -> Advice:
    found = advise(made, name="a.toml", sample=sample, **rest)
    values = json.loads(json.dumps(found.as_dict(), ensure_ascii=False))
    assert sorted(values) == ["command", "measures", "reasons", "recommendation", "rows"]
    assert sorted(values["rows"]) == ["grpo", "sft"]
    assert values["reasons"]
    return found


def test_varied_problems_with_some_success_are_for_grpo(tmp_path):
    found = ask(recipe(tmp_path, MATH))
    assert found.recommendation == "grpo"
    assert found.rows == {"grpo": list(range(1, 41)), "sft": []}
    assert found.command == "sparring grpo a.toml"
    measures = found.measures
    assert measures["solved"] == pytest.approx(0.333, abs=0.03)
    assert measures["groups_with_signal"] == 1.0
    assert measures["right_answer_share"] == 1.0
    assert measures["constant_completion_share"] < 0.2
    assert measures["empty_completion_share"] == 0.0
    assert any("are not told: the config.json of 'somewhere'" in r for r in found.reasons)
    assert not any(name.startswith("planned") for name in measures)


def test_the_cost_of_a_run_is_told_where_the_model_is_known(tmp_path):
    write_checkpoint(tmp_path / "model")
    found = ask(recipe(tmp_path, MATH, model={"path": str(tmp_path / "model")}))
    assert found.recommendation == "grpo"
    assert any("GiB" in r and "s on H200 (measured card)" in r for r in found.reasons)
    assert found.measures["planned_grpo_bytes"] > 2**30
    assert found.measures["planned_grpo_step_seconds"] > 0


@pytest.mark.parametrize("languages", [["zh"], ["en"], ["zh", "en"]])
def test_identity_sets_are_for_sft(tmp_path, languages):
    rows = identity_rows(build_identity(["小艾"], ["艾达小组"], languages))
    found = ask(recipe(tmp_path, rows, reward=""), sample=forbidden)
    assert found.recommendation == "sft"
    assert found.rows["grpo"] == []
    assert len(found.rows["sft"]) == len(rows)


@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt": "Who are you?", "reference": "Ada"}] * 20,
        [
            {"prompt": q, "reference": a}
            for q, a in [("你是谁？", "我是小艾"), ("你叫什么？", "小艾")] * 5
        ],
        [{"instruction": "你好，你是？", "input": "", "output": "我是{{name}}"}] * 8,
        [{"prompt": f"Where is office {n}?", "reference": "In the green tower."} for n in "ABCDEF"],
    ],
)
def test_statements_are_for_sft_also_in_a_recipe_for_grpo(tmp_path, rows):
    found = ask(recipe(tmp_path, rows), sample=forbidden)
    assert found.recommendation == "sft"
    assert "sparring sft" in found.command
    assert any("gradient is zero" in reason for reason in found.reasons)


def test_a_handful_of_statements_goes_into_the_system_prompt(tmp_path):
    rows = [{"prompt": "Who are you?", "reference": 'I am Ada\'s "helper".'}]
    found = ask(recipe(tmp_path, rows), sample=forbidden)
    assert found.recommendation == "system_prompt"
    words = shlex.split(found.command)
    assert words[words.index("--system-prompt") + 1] == 'I am Ada\'s "helper".'


def test_a_mixed_set_is_sft_then_grpo_with_both_lists(tmp_path):
    who = identity_rows(build_identity(["Ada"], ["the Ada team"], ["en"]))[:20]
    rows = [*MATH, *({"prompt": row["messages"][-2]["content"], "reference": "Ada"} for row in who)]
    found = ask(recipe(tmp_path, rows))
    assert found.recommendation == "sft_then_grpo"
    assert found.rows["grpo"] == list(range(1, 41))
    assert found.rows["sft"] == list(range(41, 61))
    steps = found.command.split(" && ")
    assert [step.split()[1] for step in steps] == ["advise", "sft", "grpo"]


@pytest.mark.parametrize(
    ("solved", "expected"),
    [
        (lambda prompt, index: False, "easier_data"),
        (lambda prompt, index: prompt == 0 and index == 0, "easier_data"),
        (lambda prompt, index: True, "harder_data"),
        (lambda prompt, index: prompt > 0 or index > 0, "harder_data"),
        (lambda prompt, index: prompt % 3 == 0, "easier_data"),
        (lambda prompt, index: prompt % 3 > 0, "harder_data"),
        (lambda prompt, index: prompt % 4 == 0 and index < 4, "grpo_filtered"),
        (lambda prompt, index: index > 1, "grpo_filtered"),
        (lambda prompt, index: index > 3, "grpo"),
    ],
)
def test_success_decides_between_easier_and_harder_data(tmp_path, solved, expected):
    found = ask(recipe(tmp_path, MATH), sample=sampler(solved))
    assert found.recommendation == expected


def test_filtering_leaves_out_what_carried_no_signal(tmp_path):
    found = ask(recipe(tmp_path, MATH), sample=sampler(lambda p, i: p % 4 == 0 and i < 4))
    assert found.rows["grpo"] == [line for line in range(1, 41) if line % 4 == 1]
    assert "--output" in found.command


@pytest.mark.parametrize("reward", ["always", "small", "not_empty", "has_tags", "format"])
def test_a_reward_that_a_constant_satisfies_is_to_be_mended(tmp_path, reward):
    found = ask(recipe(tmp_path, MATH, reward=reward), sample=forbidden)
    assert found.recommendation == "fix_reward"
    assert found.measures["constant_completion_share"] == 1.0
    assert "sparring reward" in found.command


def test_a_reward_that_pays_wrong_answers_as_well_is_blind(tmp_path):
    made = recipe(tmp_path, MATH)
    tables = {"data": {"train": made.data.train}, "reward": [{"name": "random"}]}
    found = ask(build_recipe(tables, command="advise"), sample=forbidden)
    assert found.recommendation == "fix_reward"
    assert found.command.startswith("sparring reward random")
    assert any("does not look at the answer" in reason for reason in found.reasons)


def test_a_graded_reward_is_not_taken_for_a_constant_one(tmp_path):
    graded = sampler(lambda p, i: i % 2 == 0, credit=0.3)
    found = ask(recipe(tmp_path, MATH, reward="graded"), sample=graded)
    assert found.recommendation == "grpo"
    assert any("is graded" in reason for reason in found.reasons)


def test_one_answer_repeated_is_a_constant_too(tmp_path):
    rows = [row | {"reference": "42"} for row in MATH]
    found = ask(recipe(tmp_path, rows), sample=forbidden)
    assert found.recommendation == "fix_reward"
    assert found.measures["most_frequent_answer_share"] == 1.0


def test_a_reward_that_judges_nothing_is_to_be_mended(tmp_path):
    def judges_nothing(*_):
        raise RewardError("the reward judged none of 64 completions")

    found = ask(recipe(tmp_path, MATH), sample=judges_nothing)
    assert found.recommendation == "fix_reward"
    found = ask(recipe(tmp_path, MATH, reward="nothing"), sample=forbidden)
    assert found.recommendation == "fix_reward"
    found = ask(recipe(tmp_path, MATH, reward="never"), sample=sampler(lambda p, i: False))
    assert found.recommendation == "fix_reward"
    assert any("own answers" in reason for reason in found.reasons)


def test_two_rewards_need_one_text_for_both(tmp_path):
    made = recipe(tmp_path, MATH)
    both = [{"name": "format"}, {"name": "math", "required": True}]
    tables = {"data": {"train": made.data.train}, "model": {"path": "x"}, "reward": both}
    assert ask(build_recipe(tables, command="advise")).recommendation == "grpo"


def test_pairs_are_for_dpo(tmp_path):
    rows = [{"prompt": f"q{n}", "chosen": "a", "rejected": "b"} for n in range(9)]
    found = ask(recipe(tmp_path, rows, reward=""), sample=forbidden)
    assert (found.recommendation, found.command) == ("dpo", "sparring dpo a.toml")


def test_worked_answers_without_a_reward_are_both(tmp_path):
    rows = [
        {
            "query": row["prompt"],
            "response": f"Adding gives {row['reference']}.\n#### {row['reference']}",
        }
        for row in MATH
    ]
    found = ask(recipe(tmp_path, rows, reward=""), sample=forbidden)
    assert found.recommendation == "sft_then_grpo"
    assert found.rows["sft"] == found.rows["grpo"]


def test_without_a_model_the_rows_and_the_rewards_speak(tmp_path):
    found = ask(recipe(tmp_path, MATH, model={"path": ""}), sample=forbidden)
    assert found.recommendation == "grpo"
    assert "solved" not in found.measures
    assert any("set model.path" in reason for reason in found.reasons)


def test_reasons_name_what_is_cut_and_what_is_not_found(tmp_path):
    sample = sampler(lambda p, i: i == 0, finish="length", answer=None)
    found = ask(recipe(tmp_path, MATH), sample=sample)
    text = " ".join(found.reasons)
    assert "100% of the completions are cut" in text
    assert "no answer is found in 100%" in text


def test_the_probe_takes_right_answers_and_refuses_others(tmp_path):
    (reward,) = load_rewards(recipe(tmp_path, MATH, reward="right"))
    found = probe_rewards(
        [reward], MATH, judging="right", prompt_column="prompt", reference_column="reference"
    )
    assert found.right == 1.0
    assert found.other is not None
    assert found.other < 0.2
    assert not found.is_constant_enough
    reward.close()


@pytest.fixture(scope="module")
def trainable(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("advised")
    write_checkpoint(folder / "model")
    write_data(folder)
    return folder


def test_what_is_written_trains(trainable):
    """The commands of the advice, run: SFT on the statements, then GRPO from there."""
    asked, said = {"role": "user", "content": "Who are you?"}, "Ada."
    english = {"messages": [asked, {"role": "assistant", "content": said}]}
    turns = [{"from": "human", "value": "你是谁？"}, {"from": "gpt", "value": "小艾"}]
    rows = [*MATH, *[english] * 6, *[{"conversations": turns}] * 6]
    made = recipe(
        trainable,
        rows,
        model={"path": f"{trainable}/model"},
        lora={"rank": 4},
        rollout={"group_size": 4, "prompts_per_step": 2, "max_completion_tokens": 8},
        optimizer={"learning_rate": 0.01},
        train={"steps": 1},
    )
    found = ask(made, folder=str(trainable / "out"))
    assert found.recommendation == "sft_then_grpo"
    assert "sparring advise" not in found.command
    written = write_advice(made, found, trainable / "out")
    assert [path.name for path in written] == ["sft.jsonl", "sft.toml", "grpo.jsonl", "grpo.toml"]
    assert len((trainable / "out" / "grpo.jsonl").read_text().splitlines()) == 40
    sft.train(load_recipe(str(trainable / "out" / "sft.toml"), ["--train.steps=2"], command="sft"))
    again = load_recipe(str(trainable / "out" / "grpo.toml"), command="grpo")
    assert again.model.path == str(trainable / "out" / "sft")
    grpo.train(again)


def test_a_real_sampler_finds_a_random_model_too_weak(trainable):
    made = recipe(
        trainable,
        MATH,
        model={"path": f"{trainable}/model"},
        rollout={"max_completion_tokens": 8},
    )
    found = advise(made, name="a.toml", num_prompts=6, num_samples=3)
    assert found.recommendation == "easier_data"
    assert found.measures["sampled_prompts"] == 6
    assert found.measures["solved"] == 0.0


def test_grpo_warns_of_statements_at_its_start(trainable, capsys):
    tables = {
        "model": {"path": f"{trainable}/model"},
        "data": {"train": f"{trainable}/who.jsonl"},
        "reward": [{"name": f"{trainable}/rewards.py:many_e"}],
        "rollout": {"group_size": 4, "prompts_per_step": 2, "max_completion_tokens": 4},
        "optimizer": {"learning_rate": 0.01},
        "train": {"steps": 1},
        "run": {"dir": f"{trainable}/warned"},
    }
    rows = [{"prompt": "Who are you?", "reference": "Ada"}] * 6
    (trainable / "who.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    grpo.train(build_recipe(tables, command="grpo"))
    assert "6 of 6 rows are statements that no program can check" in capsys.readouterr().err


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "reward"), [("gsm8k/train", "math"), ("countdown/countdown", "countdown")]
)
def test_real_problem_sets(shared_dir, name, reward):
    tables = {
        "model": {"path": "somewhere"},
        "data": {"train": str(shared_dir / "data" / f"{name}.jsonl")},
        "reward": [{"name": reward}],
    }
    found = ask(build_recipe(tables, command="advise"))
    assert found.recommendation == "grpo"
    assert found.rows["sft"] == []
    assert found.measures["right_answer_share"] == 1.0
    assert found.measures["other_rows_answer_share"] == 0.0
