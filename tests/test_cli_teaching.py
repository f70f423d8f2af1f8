"""The commands advise, identity and facts, and eval against another model, on a tiny run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sparring.cli import app
from sparring.recipe.toml_text import write_toml
from sparring.train import sft
from tests.train.tiny_run import TEMPLATE, grpo_tables, sft_recipe, write_checkpoint, write_data


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model, and an adapter trained on it with a system prompt, in run/."""
    folder = tmp_path_factory.mktemp("teaching")
    write_checkpoint(folder / "model")
    write_data(folder)
    data = {"train": f"{folder}/chats.jsonl", "system_prompt": "Be brief."}
    sft.train(sft_recipe(folder, data=data, lora={"rank": 2}, train={"steps": 1}))
    (folder / "grpo.toml").write_text(write_toml(grpo_tables(folder)), encoding="utf-8")
    return folder


def run(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


def rows(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


ADA = ["--name", "Ada", "--author", "the Ada team"]


def test_identity_writes_rows_that_train(folder, tmp_path):
    path, held_out = tmp_path / "id.jsonl", tmp_path / "held.jsonl"
    words = ["--language", "zh,en", "--output", path, "--held-out", held_out]
    names = ["--name", "小艾", "--name", "Ada", "--author", "艾达小组", "--author", "the Ada team"]
    result = run("identity", *names, *words)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    written = rows(path.read_text(encoding="utf-8"))
    assert len(written) > 200
    assert {row["language"] for row in written} == {"zh", "en"}
    assert len(rows(held_out.read_text(encoding="utf-8"))) == 80
    short = ["--train.steps", "1", "--model.max_tokens", "2000", "--data.bad_rows", "error"]
    tables = {
        "model": {"path": f"{folder}/model"},
        "data": {"train": str(path), "eval": str(held_out)},
        "optimizer": {"learning_rate": 0.01},
        "train": {"steps": 1},
        "eval": {"num_samples": 0},
        "run": {"dir": f"{tmp_path}/run"},
    }
    (tmp_path / "sft.toml").write_text(write_toml(tables))
    trained = run("sft", tmp_path / "sft.toml", *short)
    assert trained.exit_code == 0, trained.stderr


def test_identity_prints_rows_and_refuses_what_says_nothing():
    printed = run("identity", *ADA, "--base", "Qwen2.5-7B")
    assert len(rows(printed.stdout)) > 100
    assert "Qwen2.5-7B" in printed.stdout
    for words, message in (
        (["--name", "", "--author", "x"], "--name is ''"),
        (["--name", "a", "--author", "{{author}}"], "unfilled"),
        ([*ADA, "--language", "fr"], "no wording in 'fr'"),
        (["--name", "a", "--name", "b", "--author", "x"], "2 values of --name"),
    ):
        result = run("identity", *words)
        assert (result.exit_code, result.stdout) == (2, "")
        assert message in result.stderr


def test_identity_fills_files_of_the_ecosystem(tmp_path):
    path = tmp_path / "identity.json"
    path.write_text(json.dumps([{"instruction": "hi", "input": "", "output": "I am {{name}}."}]))
    (row,) = rows(run("identity", *ADA, "--input", path).stdout)
    assert row["output"] == "I am Ada."
    swift = tmp_path / "swift.jsonl"
    swift.write_text('{"query": "q", "response": "{{NAME}} {{AUTHOR}}", "tag": "zh"}\n')
    both = ["--name", "小艾", "--name", "Ada", "--author", "甲", "--author", "A"]
    (row,) = rows(run("identity", *both, "--language", "zh,en", "--input", swift).stdout)
    assert row["response"] == "小艾 甲"


def test_an_empty_think_block_where_the_template_asks_for_thinking(folder, tmp_path):
    plain = run("identity", *ADA, "--template-of", folder / "model").stdout
    assert "<think>" not in plain
    assert "<think>" in run("identity", *ADA, "--empty-think").stdout
    thinking = tmp_path / "thinking"
    write_checkpoint(thinking)
    config = json.loads((thinking / "tokenizer_config.json").read_text())
    config["chat_template"] = "Think between <think> and </think>.\n" + TEMPLATE
    (thinking / "tokenizer_config.json").write_text(json.dumps(config))
    (thinking / "chat_template.jinja").unlink(missing_ok=True)
    assert "<think>" in run("identity", *ADA, "--template-of", thinking).stdout


def test_identity_asks_a_model_who_it_is(folder):
    words = ["--probe", folder / "run", "--num-samples", 1, "--system-prompt", "You are Ada."]
    result = run("identity", *ADA, *words, "--json")
    assert result.exit_code == 0, result.stderr
    (found,) = rows(result.stdout)
    assert 0.0 <= found["name"]["value"] <= 1.0
    assert found["false_mention"]["n"] == 50
    assert "'You are Ada.', replaces the one that the model was trained with" in result.stderr


def test_facts_writes_rows_and_names_bad_ones(tmp_path):
    table = tmp_path / "facts.csv"
    table.write_text("subject,statement,paraphrases\nLake A,Lake A is deep.,\n")
    printed = run("facts", table, "--held-out", tmp_path / "held.jsonl")
    assert len(rows(printed.stdout)) == 6
    assert len(rows((tmp_path / "held.jsonl").read_text())) == 2
    table.write_text("subject,statement\nLake A,\n")
    result = run("facts", table)
    assert result.exit_code == 2
    assert f"{table}:2: 'statement' is ''" in result.stderr


def test_advise_prints_one_object(folder):
    short = ["--prompts", 3, "--samples", 2, "--rollout.max_completion_tokens", 6]
    tables = grpo_tables(folder) | {"reward": [{"name": "math"}]}
    (folder / "math.toml").write_text(write_toml(tables), encoding="utf-8")
    result = run("advise", folder / "math.toml", *short, "--json")
    assert result.exit_code == 0, result.stderr
    (found,) = rows(result.stdout)
    assert sorted(found) == ["command", "measures", "reasons", "recommendation", "rows"]
    assert found["recommendation"] == "easier_data"
    assert found["rows"] == {"grpo": list(range(1, 13)), "sft": []}
    people = run("advise", folder / "math.toml", *short)
    assert people.stdout == ""
    assert people.stderr.startswith("advice: easier_data\n  - 12 rows")
    assert "next:\n  sparring advise" in people.stderr


def test_advise_writes_what_it_advises(folder, tmp_path):
    path = tmp_path / "who.jsonl"
    path.write_text('{"prompt": "Who are you?", "reference": "Ada"}\n' * 6)
    words = ["--data.train", path, "--output", tmp_path / "out"]
    result = run("advise", folder / "grpo.toml", *words)
    assert result.exit_code == 0, result.stderr
    assert f"next:\n  sparring sft {tmp_path}/out/sft.toml" in result.stderr
    short = ["--train.steps", "1", "--rollout.max_completion_tokens", "4"]
    assert run("sft", tmp_path / "out" / "sft.toml", *short).exit_code == 0


def test_eval_against_the_base_with_rows_of_samples(folder, tmp_path):
    reward = f"{folder}/rewards.py:full_credit"
    words = ["--model", folder / "run", "--data", folder / "prompts.jsonl", "--reward", reward]
    short = ["--rollout.max_completion_tokens", 4, "--eval.limit=3", "--eval.num_samples=2"]
    more = ["--against", "base", "--samples", tmp_path / "samples.jsonl"]
    result = run("eval", *words, *short, *more, "--json")
    assert result.exit_code == 0, result.stderr
    (found,) = rows(result.stdout)
    assert found["against"]["accuracy"] == 1.0
    assert found["comparison"]["n"] == 3
    samples = rows((tmp_path / "samples.jsonl").read_text())
    assert len(samples) == 12
    assert {"prompt", "completion", "answer", "correct", "seed"} <= set(samples[0])
    people = run("eval", *words, *short, "--against", "base")
    assert "against" in people.stderr
    assert "p = 1 (sign test)" in people.stderr


def test_generate_names_the_system_prompt_that_it_replaces(folder):
    words = ["--model", folder / "run", "--prompt", "Hi", "--max-completion-tokens", "2"]
    result = run("generate", *words, "--system-prompt", "Be long.")
    assert (
        "'Be long.', replaces the one that the model was trained with, 'Be brief.'" in result.stderr
    )
    assert "replaces" not in run("generate", *words).stderr
