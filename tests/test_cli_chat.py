"""Talking to the quickstart's policy, and generate's options for sampling."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from sparring.cli import app
from sparring.errors import UserError
from sparring.recipe import locate_model
from sparring.rollout.sampler import Sampling
from sparring.train.conversation import Conversation
from sparring.train.inference import open_policy, template_of

QUESTION = "Compute 12 + 7."


@pytest.fixture(scope="module")
def policy():
    return open_policy(locate_model("quickstart"), device="cpu")


def conversation(policy, **knobs):
    sampling = Sampling(**{"max_completion_tokens": 40, **knobs})
    return Conversation(policy, template_of(policy.tokenizer), sampling)


def run(*words, lines=""):
    command = ["generate", "--model", "quickstart", "--device", "cpu", *map(str, words)]
    return CliRunner().invoke(app, command, input=lines)


def test_answers_arrive_in_pieces_and_join_the_conversation(policy):
    talk, heard = conversation(policy), []
    rollout = talk.answer(QUESTION, heard.append)
    assert len(heard) > 5
    assert "".join(heard) == rollout.prompt.prefill + rollout.text
    assert talk.messages == [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "".join(heard)},
    ]
    talk.answer("And 3 more?", heard.append)
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 2
    again = conversation(policy)
    assert again.answer(QUESTION, heard.append).text == rollout.text
    talk.clear()
    assert talk.messages == []
    assert talk.answer(QUESTION, heard.append).prompt.text == rollout.prompt.text


def test_what_an_interrupted_answer_had_written_stays(policy):
    talk, heard = conversation(policy), []

    def stop(piece):
        heard.append(piece)
        if len(heard) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        talk.answer(QUESTION, stop)
    assert talk.messages[1]["content"] == "".join(heard)
    heard.clear()
    talk.answer(QUESTION, heard.append)
    assert len(talk.messages) == 4


def test_a_conversation_that_has_grown_too_long_goes_on_without_the_message(policy):
    talk = conversation(policy, max_completion_tokens=4)
    talk.answer(QUESTION, lambda _: None)
    with pytest.raises(UserError, match="max_tokens"):
        talk.answer("7 " * policy.max_tokens, lambda _: None)
    assert len(talk.messages) == 2
    talk.answer(QUESTION, lambda _: None)


def test_without_a_template_there_is_nobody_to_talk_to(policy):
    template = template_of(policy.tokenizer, template="none")
    with pytest.raises(UserError, match="no chat template"):
        Conversation(policy, template, Sampling(max_completion_tokens=4))


def test_chat_prints_answers_alone(policy):
    lines = f'{QUESTION}\n\n/help\n/new\n"""Compute\n3 + 4."""\n/exit\nnever read\n'
    result = run("--chat", "--max-completion-tokens", 40, "--seed", 5, lines=lines)
    assert result.exit_code == 0, result.stderr
    talk, heard = conversation(policy, seed=5), []
    for message in (QUESTION, "Compute\n3 + 4."):
        talk.clear()
        talk.answer(message, heard.append)
        heard.append("\n")
    assert result.stdout == "".join(heard)
    assert "/exit" in result.stderr
    assert "(a new conversation)" in result.stderr


def test_chat_ends_with_its_input_and_says_where_an_answer_was_cut():
    result = run("--chat", "--max-completion-tokens", 2, lines=QUESTION)
    assert result.exit_code == 0, result.stderr
    assert "(cut after 2 tokens" in result.stderr
    result = run("--chat", "--max-completion-tokens", 2, lines="7 " * 4000 + "\n" + QUESTION)
    assert result.exit_code == 0
    assert "max_tokens" in result.stderr
    assert len(result.stdout) > 0


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--chat", "--prompt", "x", "--json"], "leave out --prompt, --json"),
        (["--chat", "--num-samples", "2"], "leave out --num-samples"),
        (["--chat", "--input", "a.jsonl"], "leave out --input"),
        ([], "--chat"),
        (["--prompt", "x", "--min-p", "1"], "min_p is 1.0"),
        (["--chat", "--min-p", "-1"], "min_p is -1.0"),
        (["--prompt", "x", "--min-completion-tokens", "600"], "from 0 to 512"),
        (["--prompt", "x", "--max-completion-tokens", "0"], "max_completion_tokens is 0"),
    ],
)
def test_wrong_options_end_with_one_message(words, part):
    result = run(*words)
    assert result.exit_code == 2, result.stderr
    assert part in result.stderr
    assert "Traceback" not in result.stderr


def test_the_options_of_sampling_reach_the_engine(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"prompt": QUESTION}) + "\n" for _ in range(3)))

    def rows(*words):
        result = run("--input", source, "--num-samples", 4, *words)
        assert result.exit_code == 0, result.stderr
        return [json.loads(line) for line in result.stdout.splitlines()]

    long = rows("--min-completion-tokens", 30, "--max-completion-tokens", 30)
    assert {row["num_tokens"] for row in long} == {30}
    likeliest = rows("--min-p", "0.999999", "--max-completion-tokens", 20)
    assert len({row["completion"] for row in likeliest}) == 1
    assert len({row["completion"] for row in rows("--max-completion-tokens", 20)}) > 1
    stopped = rows("--stop", "</think>", "--max-completion-tokens", 60)
    assert not any("</think>" in row["completion"] for row in stopped)
    assert "stop" in {row["finish_reason"] for row in stopped}
