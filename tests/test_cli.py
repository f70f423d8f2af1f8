"""The command line and the Python interface, on a tiny model: what goes where, and exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import sparring
from sparring import runlog
from sparring.cli import app
from sparring.errors import DataError, UserError
from sparring.recipe.toml_text import write_toml
from tests.train.tiny_run import grpo_tables, write_checkpoint, write_data

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a tiny model, its data, recipes, and a finished run of grpo in run/."""
    folder = tmp_path_factory.mktemp("cli")
    write_checkpoint(folder / "model")
    write_data(folder)
    evaluation = {"data": {"eval": f"{folder}/prompts.jsonl", "system_prompt": "Be brief."}}
    text = write_toml(grpo_tables(folder, **evaluation, lora={"rank": 2}, train={"steps": 2}))
    (folder / "grpo.toml").write_text(text, encoding="utf-8")
    result = run("grpo", folder / "grpo.toml")
    assert result.exit_code == 0, result.output
    (folder / "grpo.stdout").write_text(result.stdout)
    (folder / "grpo.stderr").write_text(result.stderr)
    return folder


def run(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


def rows(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_training_prints_nothing_to_standard_output_and_ends_with_a_table(trained):
    assert (trained / "grpo.stdout").read_text() == ""
    table = (trained / "grpo.stderr").read_text().splitlines()[-3:]
    assert "95% interval" in table[0]
    assert [line.split()[0] for line in table[1:]] == ["before", "after"]


def test_the_run_directory_is_the_promised_one(trained):
    folder = trained / "run"
    names = {path.name for path in folder.iterdir()}
    assert {"recipe.toml", "environment.json", "metrics.jsonl", "rollouts", "checkpoints"} <= names
    assert {"final", "summary.json"} <= names
    assert [record.step for record in runlog.read_steps(folder)] == [1, 2]
    summary = runlog.read_summary(folder)
    assert summary is not None
    assert set(summary["before"]) >= {"accuracy", "low", "high", "n"}
    assert summary["seconds"] > 0
    row = runlog.read_rollouts(folder, 1)[0]
    assert {"prompt", "completion", "rewards", "advantage", "finish_reason"} <= row.keys()


def test_a_directory_with_a_run_is_refused(trained):
    before = (trained / "run" / "metrics.jsonl").read_bytes()
    result = run("grpo", trained / "grpo.toml")
    assert result.exit_code == 2
    assert "--resume" in result.stderr
    assert "--run.dir" in result.stderr
    assert (trained / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["grpo", "{}/grpo.toml", "--run.dir", "{}/x", "--model.path", "{}/nope"], "{}/nope"),
        (["grpo", "{}/grpo.toml", "--run.dir", "{}/x", "--data.train", "{}/nope.jsonl"], "{}/nope"),
        (["grpo", "{}/grpo.toml", "--run.dir", "{}/x", "--data.prompt", "question"], "question"),
        (["grpo", "{}/grpo.toml", "--loss.clip_lo", "1"], "clip_lo"),
        (["grpo", "{}/nope.toml"], "{}/nope.toml"),
        (["grpo", "{}/grpo.toml", "again"], "takes one RECIPE"),
        (["grpo", "--train.steps", "3"], "takes one RECIPE, got none"),
        (["grpo", "{}/grpo.toml", "--train.steps"], "--train.steps needs a value"),
        (["sft", "{}/grpo.toml", "--advantage.name", "mean"], "sft has no advantages"),
        (["eval"], "eval takes a RECIPE"),
        (["eval", "{}/grpo.toml", "--reward", "math"], "its own [[reward]]"),
        (["generate", "--model", "{}/model"], "--prompt"),
        (["generate", "--model", "{}/nope", "--prompt", "x"], "{}/nope"),
        (["generate", "--model", "{}/model", "--prompt", "x", "--top-p", "2"], "top_p"),
        (["generate", "--model", "{}/model", "--prompt", "x", "--device", "tpu"], "tpu"),
        (["generate", "--model", "{}/model", "--input", "{}/rewards.py"], "rewards.py"),
        (["generate", "--model", "{}/model", "--input", "{}/rows.jsonl"], "rows.jsonl:1"),
        (["reward", "nope", "--input", "{}/rows.jsonl"], "math"),
        (["reward", "math", "format", "--input", "{}/rows.jsonl"], "one NAME"),
        (["reward", "format", "--input", "{}/rows.jsonl", "--lenient", "1"], "layout"),
    ],
)
def test_wrong_input_is_one_message_and_exit_code_2(trained, words, message):
    (trained / "rows.jsonl").write_text('{"completion": "x", "reference": "x"}\n')
    result = run(*(word.format(trained) for word in words))
    assert result.exit_code == 2, result.stderr
    assert message.format(trained) in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert not (trained / "x").exists()


@pytest.mark.parametrize("words", [["nope"], ["grpo"], ["dpo", "x.toml"], ["generate", "--model"]])
def test_misuse_of_the_command_is_exit_code_2(words):
    assert run(*words).exit_code == 2


def test_traceback_is_shown_on_request():
    assert "Traceback" in run("grpo", "nope.toml", "--traceback").stderr


def test_help_names_what_exists_and_nothing_else():
    text = run("--help").stdout
    commands = [line.split()[0] for line in text.partition("Commands:")[2].splitlines() if line]
    training = ["grpo", "sft", "dpo", "ppo", "pairs"]
    assert commands == [
        *training,
        "eval",
        "generate",
        "reward",
        "advise",
        "plan",
        "identity",
        "facts",
        "export",
    ]


def test_version():
    assert run("--version").stdout.strip() == sparring.__version__


def test_a_failed_run_is_exit_code_1(trained):
    words = ["--run.dir", trained / "fails", "--train.steps", "4"]
    text = write_toml(grpo_tables(trained, reward=[{"name": f"{trained}/rewards.py:fails_later"}]))
    (trained / "fails.toml").write_text(text, encoding="utf-8")
    result = run("grpo", trained / "fails.toml", *words)
    assert result.exit_code == 1
    assert "RunError" in result.stderr
    assert sorted(path.name for path in (trained / "fails" / "checkpoints").iterdir())


def test_resume_goes_on(trained):
    words = [trained / "grpo.toml", "--run.dir", trained / "longer"]
    assert run("grpo", *words, "--run.checkpoint_every", "1").exit_code == 0
    result = run("grpo", *words, "--resume", "--train.steps", "3")
    assert result.exit_code == 0, result.stderr
    assert [record.step for record in runlog.read_steps(trained / "longer")] == [1, 2, 3]
    refused = run("grpo", *words, "--resume", "--rollout.group_size", "2")
    assert refused.exit_code == 2
    assert "rollout.group_size: 4 -> 2" in refused.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_checkpoint(trained, number, code):
    directory = trained / f"interrupted-{code}"
    words = [trained / "grpo.toml", "--run.dir", directory, "--train.steps", "100000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", "sparring", "grpo", *map(str, words)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    deadline = time.monotonic() + 60
    while len(runlog.read_steps(directory)) < 3:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    _, message = process.communicate(timeout=60)
    assert process.returncode == code, message
    assert "--resume" in message
    assert "Traceback" not in message
    last = runlog.read_steps(directory)[-1].step
    newest = sorted((directory / "checkpoints").iterdir())[-1].name
    assert newest == f"step_{last:06d}"


def test_generate_prints_the_completion_alone(trained):
    words = ["--model", trained / "model", "--max-completion-tokens", "5"]
    result = run("generate", *words, "--prompt", "Say 3.", "--num-samples", "2")
    assert result.exit_code == 0, result.stderr
    assert "1 of 2" in result.stderr
    model, tokenizer = sparring.load(str(trained / "model"))
    messages = [{"role": "user", "content": "Say 3."}]
    group = sparring.generate(model, tokenizer, [messages], num_samples=2, max_completion_tokens=5)[
        0
    ]
    assert result.stdout == "".join(f"{rollout.text}\n" for rollout in group)


def test_generate_from_a_file_keeps_the_rows(trained, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(
        '{"prompt": "Say 1.", "reference": "1"}\n'
        '{"prompt": [{"role": "user", "content": "Say 2."}], "reference": "\u4e8c"}\n',
        encoding="utf-8",
    )
    words = ["--model", trained / "model", "--input", source, "--max-completion-tokens", "4"]
    result = run("generate", *words, "--num-samples", "2", "--output", target)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    written = rows(target.read_text(encoding="utf-8"))
    assert [row["reference"] for row in written] == ["1", "1", "\u4e8c", "\u4e8c"]
    assert [row["sample"] for row in written] == [0, 1, 0, 1]
    assert all(isinstance(row["completion"], str) and row["num_tokens"] <= 4 for row in written)
    assert rows(run("generate", *words, "--num-samples", "2").stdout) == written
    judged = run("reward", "math", "--input", target)
    assert judged.exit_code == 0
    assert len(rows(judged.stdout)) == 4


def test_a_failed_generate_leaves_the_file_that_was_there(trained, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "' + "x" * 200 + '"}\n')
    target.write_text("precious")
    result = run("generate", "--model", trained / "model", "--input", source, "--output", target)
    assert result.exit_code == 2
    assert target.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_raw_and_seed_change_what_is_read_and_written(trained):
    words = ["generate", "--model", trained / "model", "--prompt", "Say 3.", "--json"]
    short = ["--max-completion-tokens", "8"]
    texts = [
        rows(run(*words, *short, *more).stdout)[0]["completion"]
        for more in ([], ["--raw"], ["--seed", "1"], ["--temperature", "0"], [])
    ]
    assert texts[0] == texts[4]
    assert len(set(texts[:4])) == 4


def test_eval_prints_one_object(trained):
    reward = f"{trained}/rewards.py:full_credit"
    words = ["--model", trained / "run", "--data", trained / "prompts.jsonl", "--reward", reward]
    sized = ["--rollout.max_completion_tokens", "6", "--eval.limit=5"]
    result = run("eval", *words, *sized, "--json")
    assert result.exit_code == 0, result.stderr
    (found,) = rows(result.stdout)
    assert (found["accuracy"], found["n"], found["num_samples"]) == (1.0, 5, 1)
    assert found["low"] < 1.0
    people = run("eval", *words, *sized, "--eval.num_samples", "2")
    assert people.stdout == ""
    assert "100.0%" in people.stderr
    assert "pass@2" in people.stderr


def test_eval_of_a_recipe_gives_what_training_measured(trained):
    before = runlog.read_evaluations(trained / "run")[0].values
    (found,) = rows(run("eval", trained / "grpo.toml", "--json").stdout)
    assert {key: found[key] for key in before} == before


def test_reward_adds_reward_and_reason(tmp_path):
    (tmp_path / "in.jsonl").write_text(
        '{"completion": "<answer>72</answer>", "reference": "72", "id": 7}\n'
        '{"completion": "no idea", "reference": "72", "id": 8}\n'
    )
    result = run("reward", "math", "--input", tmp_path / "in.jsonl")
    assert result.exit_code == 0, result.stderr
    judged = rows(result.stdout)
    assert [(row["id"], row["reward"]) for row in judged] == [(7, 1.0), (8, 0.0)]
    assert all(row["reason"] for row in judged)
    assert "2 of 2 rows judged" in result.stderr


def test_a_reward_of_ones_own_takes_knobs_and_may_say_nothing(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def length(completions, *, most=3):\n"
        "    return [None if not c else float(len(c) <= most) for c in completions]\n"
    )
    (tmp_path / "in.jsonl").write_text('{"completion": "abcd"}\n{"completion": ""}\n')
    words = ["reward", f"{tmp_path}/mine.py:length", "--input", tmp_path / "in.jsonl"]
    assert [row["reward"] for row in rows(run(*words).stdout)] == [0.0, None]
    assert [row["reward"] for row in rows(run(*words, "--most", "4").stdout)] == [1.0, None]


def test_a_reader_that_goes_away_is_no_fault(tmp_path):
    many = "".join(f'{{"completion": "{n}", "reference": "1"}}\n' for n in range(5000))
    (tmp_path / "in.jsonl").write_text(many)
    command = f"{sys.executable} -m sparring reward format --input {tmp_path}/in.jsonl | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert len(done.stdout.splitlines()) == 1
    assert "Error" not in done.stderr


def test_a_run_directory_carries_system_prompt_and_end_tokens(trained):
    model, tokenizer = sparring.load(str(trained / "run"))
    assert model.has_adapter()
    (group,) = sparring.generate(
        model, tokenizer, [[{"role": "user", "content": "Hi"}]], max_completion_tokens=2
    )
    assert "Be brief." in group[0].prompt.text
    plain = sparring.generate(model, tokenizer, ["Hi"], max_completion_tokens=2)
    assert plain[0][0].prompt.text == "Hi"


def test_score_agrees_with_what_was_sampled(trained):
    model, tokenizer = sparring.load(str(trained / "model"))
    groups = sparring.generate(
        model, tokenizer, ["abc", "a"], num_samples=3, max_completion_tokens=9, temperature=0.7
    )
    rollouts = [rollout for group in groups for rollout in group]
    sequences = [[*r.prompt.token_ids, *r.token_ids.tolist()] for r in rollouts]
    scores = sparring.score(model, sequences, temperature=0.7)
    for rollout, sequence, logprobs in zip(rollouts, sequences, scores, strict=True):
        assert logprobs.shape == (len(sequence) - 1,)
        assert logprobs.dtype == torch.float32
        assert not logprobs.requires_grad
        sampled = logprobs[-len(rollout.token_ids) :]
        torch.testing.assert_close(sampled, rollout.logprobs, atol=1e-5, rtol=0)


def test_score_of_short_empty_and_unknown_sequences(trained):
    model, _ = sparring.load(str(trained / "model"))
    assert [len(scores) for scores in sparring.score(model, [[5], [5, 6]])] == [0, 1]
    assert sparring.score(model, []) == []
    with pytest.raises(DataError, match="empty"):
        sparring.score(model, [[5], []])
    with pytest.raises(UserError, match="0 to 263"):
        sparring.score(model, [[5, 264]])
    with pytest.raises(UserError, match="temperature"):
        sparring.score(model, [[5]], temperature=0.0)


def test_load_says_what_it_cannot_do(trained):
    with pytest.raises(UserError, match="known: none, nf4"):
        sparring.load(str(trained / "model"), quantization="int4")
    with pytest.raises(ValueError, match="float64"):
        sparring.load(str(trained / "model"), dtype="float64")


def test_one_prompt_as_text_is_refused(trained):
    model, tokenizer = sparring.load(str(trained / "model"))
    with pytest.raises(UserError, match="list of prompts"):
        sparring.generate(model, tokenizer, "Say 1.")
    assert sparring.generate(model, tokenizer, []) == []
