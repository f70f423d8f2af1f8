"""What SFT reads and shows: weights, general data, identity data to be filled, sampled answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparring import runlog
from sparring.errors import DataError, RecipeError
from sparring.train import sft
from sparring.train.demonstrations import load_training_rows, shown_answers
from sparring.train.inference import training_template
from sparring.train.policy import build_policy
from tests.train.tiny_run import grpo_recipe, sft_recipe, write_checkpoint, write_data


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demonstrations")
    write_checkpoint(folder / "model")
    write_data(folder)
    write(folder / "general.jsonl", [{"query": f"q{n}", "response": f"r{n}"} for n in range(40)])
    write(folder / "swift.jsonl", [{"query": "who?", "response": "I am {{NAME}}.", "tag": "en"}])
    weighted = [{"prompt": f"p{n}", "completion": "abc", "importance": n + 1} for n in range(4)]
    write(folder / "weighted.jsonl", weighted)
    return folder


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(folder: Path, **data):
    recipe = sft_recipe(folder, data=data)
    policy = build_policy(recipe)
    template, _ = training_template(recipe, policy.tokenizer)
    policy = policy.speaking(template)
    lines: list[str] = []
    return load_training_rows(recipe, policy, say=lines.append), policy, recipe, lines


@pytest.mark.parametrize(("ratio", "count"), [(0.5, 6), (2.0, 24), (10.0, 40)])
def test_general_data_are_mixed_in_by_their_ratio(folder, ratio, count):
    found, policy, _, lines = read(folder, general=f"{folder}/general.jsonl", general_ratio=ratio)
    general = [policy.decode(row.token_ids.tolist()) for row in found.conversations[12:]]
    assert len(found) == 12 + count
    assert len(set(general)) == count
    assert all(text.startswith("q") for text in general)
    assert f"{count} of them are mixed in" in lines[-1]
    assert ("all there are" in lines[-1]) == (ratio == 10.0)


def test_a_row_weighs_what_its_column_says(folder):
    found, *_ = read(folder, train=f"{folder}/weighted.jsonl", weight="importance")
    assert [row.weight for row in found] == [1.0, 2.0, 3.0, 4.0]
    with pytest.raises(DataError, match="no column 'weight'"):
        read(folder, train=f"{folder}/weighted.jsonl", weight="weight")


def test_weights_change_what_is_learned(folder):
    data = {"train": f"{folder}/weighted.jsonl"}
    losses = []
    for name, more in (("plain", {}), ("weighted", {"weight": "importance"})):
        run = {"dir": f"{folder}/{name}"}
        train = {"steps": 1, "conversations_per_step": 4}
        sft.train(sft_recipe(folder, data=data | more, run=run, train=train))
        losses.append(runlog.read_steps(folder / name)[0].metrics["loss"])
    assert losses[0] != pytest.approx(losses[1], abs=1e-6)


def test_identity_data_are_filled_or_refused(folder):
    data = {"train": f"{folder}/swift.jsonl"}
    found, policy, *_ = read(folder, **data, placeholders={"name": "Ada"})
    assert "I am Ada." in policy.decode(found[0].token_ids.tolist())
    recipe = sft_recipe(folder, data=data, run={"dir": f"{folder}/unfilled"})
    with pytest.raises(DataError, match=r"swift\.jsonl:1: .*\{\{NAME\}\}"):
        sft.train(recipe)
    assert not (folder / "unfilled").exists()


def test_what_only_sft_reads_is_refused_elsewhere(folder):
    for data in ({"weight": "w"}, {"general": "g.jsonl"}, {"placeholders": {"name": "Ada"}}):
        with pytest.raises(RecipeError, match="only sft reads it"):
            grpo_recipe(folder, data={"train": f"{folder}/prompts.jsonl"} | data)


def test_sampled_answers_stand_beside_the_wanted_ones(folder):
    found, policy, recipe, _ = read(folder)
    assert len(shown_answers(recipe, policy, found)) == 1
    two = sft_recipe(folder, eval={"num_samples": 2})
    rows = shown_answers(two, policy, found)
    assert len(rows) == 2
    assert [row["reference"] for row in rows] == ["0!", "1!"]
    assert "Say 0." in rows[0]["prompt"]
    assert all(isinstance(row["completion"], str) and row["num_tokens"] >= 1 for row in rows)
    none = sft_recipe(folder, eval={"num_samples": 0})
    assert shown_answers(none, policy, found) == []


def test_a_run_shows_and_records_answers(folder, capsys):
    data = {"train": f"{folder}/chats.jsonl", "eval": f"{folder}/chats.jsonl"}
    recipe = sft_recipe(
        folder,
        data=data,
        eval={"every": 2, "num_samples": 2, "limit": 3},
        rollout={"max_completion_tokens": 6},
        run={"dir": f"{folder}/shown"},
        train={"steps": 4},
    )
    summary = sft.train(recipe)
    text = capsys.readouterr().err
    assert text.count("answers  ") == 4  # two rows after step 2, two after step 4
    rows = runlog.read_rollouts(folder / "shown", 4, kind="eval")
    assert {"prompt", "completion", "reference"} <= set(rows[0])
    assert summary["eval_loss"] > 0


def test_showing_answers_does_not_change_training(folder):
    weights = []
    for name, shown in (("seen", 2), ("unseen", 0)):
        data = {"train": f"{folder}/chats.jsonl", "eval": f"{folder}/chats.jsonl"}
        run = {"dir": f"{folder}/{name}"}
        recipe = sft_recipe(folder, data=data, eval={"every": 1, "num_samples": shown}, run=run)
        sft.train(recipe)
        (file,) = (folder / name / "final").glob("*.safetensors")
        weights.append(load_file(file))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
