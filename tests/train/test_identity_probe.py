"""Names in answers: told, denied, another's, and said where none belongs."""

from __future__ import annotations

import json

import pytest

from sparring.data.identity import build_identity, identity_questions, identity_rows, rival_names
from sparring.train import sft
from sparring.train.identity_probe import claims_other, judge_identity, mentions, probe_identity
from sparring.train.inference import open_policy, template_of
from tests.train.tiny_run import sft_recipe, write_checkpoint, write_data

BOTH = build_identity(["小艾", "Ada"], ["艾达小组", "the Ada team"], ["zh", "en"])


@pytest.mark.parametrize(
    ("text", "name", "told"),
    [
        ("I am Ada.", "Ada", True),
        ("I'm ADA!", "Ada", True),
        ("I live in Canada.", "Ada", False),
        ("我是小艾，很高兴", "小艾", True),
        ("我叫Ada吗", "Ada", True),
        ("Ada  Lovelace", "Ada Lovelace", True),
        ("Ada2", "Ada", False),
        ("", "Ada", False),
    ],
)
def test_a_name_is_a_whole_word(text, name, told):
    assert mentions(text, name) is told


@pytest.mark.parametrize(
    ("text", "claims"),
    [
        ("I am ChatGPT, made by OpenAI.", True),
        ("No, I am not ChatGPT. I am Ada.", False),
        ("I am Ada; ChatGPT is another assistant.", False),
        ("I was developed by OpenAI.", True),
        ("ChatGPT is a product of OpenAI.", False),
        ("No. OpenAI made me.", True),
        ("我是通义千问，由阿里巴巴开发。", True),
        ("我不是通义千问，我是小艾。", False),
        ("由OpenAI训练了我", True),
        ("<think>I am ChatGPT</think>I am Ada", True),
    ],
)
def test_a_claim_is_about_oneself_and_not_denied(text, claims):
    assert claims_other(text, rival_names(BOTH)) is claims


def test_the_sets_own_answers_claim_no_other():
    rivals = rival_names(BOTH)
    for row in identity_rows(BOTH):
        answer = row["messages"][-1]["content"]
        assert not claims_other(answer, rivals), answer


def test_rates_of_right_wrong_and_intrusive_answers():
    questions = identity_questions(BOTH)

    def answer(question):
        if question.kind == "unrelated":
            return "I am Ada." if "Hamlet" in question.text else "Fine."
        if question.language == "zh":
            return "我是小艾，由艾达小组开发。"
        return "I am ChatGPT." if question.kind == "rival" else "<think>I am Ada</think>Me."

    report, rows = judge_identity(questions, [[answer(q)] * 2 for q in questions], BOTH)
    values = report.as_dict()
    assert values["by_language"]["zh"]["name"]["value"] == 1.0
    assert values["by_language"]["zh"]["author"]["value"] == 1.0
    assert values["by_language"]["en"]["name"]["value"] == 0.0
    assert values["by_language"]["en"]["rival"]["value"] == pytest.approx(4 / 44)
    assert values["false_mention"]["value"] == pytest.approx(0.01)
    assert values["false_mention"]["n"] == 100
    assert values["name"]["low"] < 0.5 < values["name"]["high"]
    assert len(rows) == 2 * len(questions)
    assert json.loads(json.dumps(values)) == values


def test_a_tiny_model_is_asked_and_a_trained_one_tells_its_name(tmp_path):
    write_checkpoint(tmp_path / "model")
    write_data(tmp_path)
    english = build_identity(["Ab"], ["Cd"], ["en"])
    asked = {q.text for q in identity_questions(english)}
    rows = [{"prompt": text, "completion": "Ab Cd"} for text in asked]  # learned by heart
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = probe(tmp_path / "model", english)
    assert before.name.value < 0.1
    assert before.name.n == 44
    recipe = sft_recipe(
        tmp_path,
        data={"train": f"{tmp_path}/rows.jsonl"},
        train={"steps": 30, "conversations_per_step": 16},
        eval={"num_samples": 0},
    )
    sft.train(recipe)
    after = probe(tmp_path / "run", english)
    assert after.name.value > 0.9
    assert after.author.value > 0.9
    assert after.false_mention.value > 0.9  # it says so everywhere, and the probe tells


def probe(path, identity):
    policy = open_policy(str(path))
    report, _ = probe_identity(
        policy,
        template_of(policy.tokenizer),
        identity,
        num_samples=1,
        temperature=0.0,
        max_completion_tokens=8,
    )
    return report
