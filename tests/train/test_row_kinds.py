"""What rows call for: checkable answers, identity, facts and free text, in Chinese and English."""

from __future__ import annotations

import pytest

from sparring.data.facts import fact_rows, read_facts
from sparring.data.identity import build_identity, identity_questions, identity_rows
from sparring.data.rows import build_rows, load_rows
from sparring.train.row_kinds import kind_of_row, survey_rows, warn_if_not_checkable

COLUMNS = {"prompt_column": "prompt", "reference_column": "reference"}
MATH = [
    {"prompt": f"Tom has {n} apples and buys {n + 2} more. How many?", "reference": str(2 * n + 2)}
    for n in range(30)
]


def chat(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def kind(**row):
    return kind_of_row(row, **COLUMNS).kind


@pytest.mark.parametrize(
    ("question", "reference"),
    [
        ("What is 3 + 4?", "7"),
        ("Simplify the fraction.", r"\frac{3}{4}"),
        ("Who is older, Ann (12) or Bob (9)?", "Ann"),
        ("Pick one.", "B"),
        ("What is the sum of the first ten primes?", "129"),
        ("小明有3个苹果，又买了5个，一共几个？", "8"),
        ("Janet asks: who are you? She has 3 cats and you have 4. How many? " * 4, "7"),
        ("Factor it.", "(x+1)(x-1)"),
        ("How much?", "She pays 3*4=12.\n#### 12"),
        ("Prove it.", "Thus the result is \\boxed{5}."),
    ],
)
def test_answers_that_a_program_can_check(question, reference):
    assert kind(prompt=question, reference=reference) == "checkable"


def test_programs_with_tests_and_countdown_are_checkable():
    assert (
        kind(prompt="Write f.", reference="def f(): ...", tests=["assert f() == 1"]) == "checkable"
    )
    assert kind(prompt="Use 3 and 4 to make 7.", numbers=[3, 4], target=7) == "checkable"


@pytest.mark.parametrize(
    ("question", "reference"),
    [
        ("Who are you?", "Ada"),
        ("Are you GPT-4?", "no"),
        ("你是谁？", "我是小艾。"),
        ("你是ChatGPT吗", "不是"),
        ("hello", "Hi, I am {{name}}, an AI assistant developed by {{author}}."),
        ("say hi", "I'm Ada, trained by the Ada team."),
        ("介绍一下", "我叫小艾，是艾达小组开发的助手。"),
    ],
)
def test_questions_on_who_the_model_is(question, reference):
    assert kind(prompt=question, reference=reference) == "identity"


@pytest.mark.parametrize(
    ("question", "reference"),
    [
        ("What is the capital of France?", "Paris"),
        ("When was the company founded?", "1998"),
        ("Tell me about Lake Vostok.", "It lies under four kilometres of ice."),
        ("青海湖在哪里？", "青海省"),
        ("公司是哪一年成立的？", "1998"),
    ],
)
def test_questions_on_facts(question, reference):
    assert kind(prompt=question, reference=reference) == "fact"


def test_free_text_is_neither():
    poem = "The rain comes down in silver threads, and every roof begins to sing."
    assert kind(prompt="Write a poem.", reference=poem) == "text"
    assert kind(messages=chat("Hi", "Hello there, what can I do?")) == "text"


@pytest.mark.parametrize(
    "row",
    [
        {
            "messages": [
                {"role": "user", "content": "Who are you?"},
                {"role": "assistant", "content": "Ada."},
            ]
        },
        {
            "conversations": [
                {"from": "human", "value": "你是谁？"},
                {"from": "gpt", "value": "小艾"},
            ]
        },
        {"instruction": "who are you", "input": "", "output": "Ada"},
        {"query": "你叫什么名字？", "response": "小艾", "tag": "zh"},
        {
            "prompt": [{"role": "user", "content": "Who made you?"}],
            "completion": [{"role": "assistant", "content": "A."}],
        },
    ],
)
def test_every_form_of_row_is_read(row):
    assert kind(**row) == "identity"


@pytest.mark.parametrize("languages", [["zh"], ["en"], ["zh", "en"]])
def test_identity_sets_are_seen_as_such(languages):
    identity = build_identity(["Ada"], ["the Ada team"], languages)
    found = survey_rows(build_rows(identity_rows(identity)), **COLUMNS)
    assert found.count("identity") > 0.9 * len(found.kinds)
    assert not found.has_checkable
    asked = [q for q in identity_questions(identity) if q.kind != "unrelated"]
    unrelated = [q for q in identity_questions(identity) if q.kind == "unrelated"]
    hits = sum(kind(prompt=q.text, reference="x y z. a b c d e f") == "identity" for q in asked)
    assert hits > 0.85 * len(asked)
    assert not [q for q in unrelated if kind(prompt=q.text, reference="Fine.") == "identity"]


def test_names_as_references_are_no_answers_to_check():
    identity = build_identity(["Ada"], ["the Ada team"], ["en", "zh"])
    rows = [
        {"prompt": q.text, "reference": "the Ada team" if q.kind == "maker" else "Ada"}
        for q in identity_questions(identity)
        if q.kind != "unrelated"
    ]
    assert not survey_rows(build_rows(rows), **COLUMNS).has_checkable


def test_a_table_of_facts_is_for_sft():
    facts = [{"subject": f"Lake {n}", "statement": f"Lake {n} lies in valley {n}."} for n in "ABC"]
    rows = fact_rows(read_facts(build_rows(facts)))
    assert not survey_rows(build_rows(rows), **COLUMNS).has_checkable


def test_a_warning_names_the_rows_and_what_to_do():
    assert warn_if_not_checkable(build_rows(MATH), "prompt", "reference") == []
    who = [{"prompt": "Who are you?", "reference": "Ada"}] * 5
    (line,) = warn_if_not_checkable(
        build_rows(MATH + who, name="mixed.jsonl"), "prompt", "reference"
    )
    assert "5 of 35 rows" in line
    assert "mixed.jsonl:row 31" in line
    assert "sparring sft" in line
    same = [row | {"reference": "4"} for row in MATH]
    (line,) = warn_if_not_checkable(build_rows(same), "prompt", "reference")
    assert "100% of the checkable rows have the answer '4'" in line
    pairs = [{"prompt": "q", "chosen": "a", "rejected": "b"}] * 4
    (line,) = warn_if_not_checkable(build_rows(pairs), "prompt", "reference")
    assert "sparring dpo" in line


def test_a_stray_row_or_two_do_not_make_a_set_mixed():
    stray = [{"prompt": "Who are you?", "reference": "Ada"}]
    found = survey_rows(build_rows(MATH * 4 + stray), **COLUMNS)
    assert not found.has_statements
    number = [{"prompt": "How tall is it?", "reference": "3"}]
    who = [{"prompt": "Who are you?", "reference": "Ada"}] * 50
    assert not survey_rows(build_rows(who + number), **COLUMNS).has_checkable


def test_prompts_without_references_are_left_to_the_rewards():
    rows = build_rows([{"prompt": "Write something with many e."}] * 6)
    found = survey_rows(rows, prompt_column="prompt", reference_column="")
    assert found.count("checkable") == 6


@pytest.mark.shared
def test_real_problem_sets_are_checkable(shared_dir):
    for name in ("gsm8k/train", "gsm8k/test", "countdown/countdown", "mbpp/mbpp"):
        rows = load_rows(str(shared_dir / "data" / f"{name}.jsonl"), limit=1500)
        found = survey_rows(rows, **COLUMNS)
        assert found.count("checkable") == len(rows), name
        assert warn_if_not_checkable(rows, "prompt", "reference") == []
