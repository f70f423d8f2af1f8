"""Identity sets and facts: what is in them, what is kept back, and what is refused."""

from __future__ import annotations

import json

import pytest

from sparring.data.conversations import load_conversations
from sparring.data.facts import fact_rows, held_out_fact_rows, read_facts
from sparring.data.identity import (
    EMPTY_THINK,
    build_identity,
    held_out_rows,
    identity_questions,
    identity_rows,
    known_languages,
    rival_names,
)
from sparring.data.rows import build_rows, load_rows
from sparring.errors import DataError, UserError

BOTH = build_identity(["小艾", "Ada"], ["艾达小组", "the Ada team"], ["zh", "en"])


def asked(rows):
    return {turn["content"] for row in rows for turn in row["messages"] if turn["role"] == "user"}


def answers(row):
    return [turn["content"] for turn in row["messages"] if turn["role"] == "assistant"]


def said(rows):
    return [text for row in rows for text in answers(row)]


def test_a_set_has_a_few_hundred_rows_of_every_kind_in_each_language():
    rows = identity_rows(BOTH)
    assert 200 <= len(rows) <= 500
    kinds = {"who", "maker", "rival", "base", "role", "plain"}
    for language in ("zh", "en"):
        assert {row["kind"] for row in rows if row["language"] == language} == kinds
    systems = [row for row in rows if row["messages"][0]["role"] == "system"]
    assert 0.2 < len(systems) / len(rows) < 0.5
    assert sum(len(answers(row)) > 1 for row in rows) > 30
    assert rows == identity_rows(BOTH)


@pytest.mark.parametrize(
    ("language", "name", "author"),
    [("zh", "小艾", "艾达"), ("en", "Ada", "Ada team")],
)
def test_every_answer_on_itself_tells_its_own_name_and_author(language, name, author):
    for row in identity_rows(BOTH):
        if row["language"] != language or row["kind"] == "plain":
            continue
        text = " ".join(answers(row))
        assert name in text
        assert author in text
    plain = [row for row in identity_rows(BOTH) if row["kind"] == "plain"]
    assert all("Ada" not in json.dumps(row) and "小艾" not in str(row) for row in plain)


def test_nothing_is_left_unfilled():
    for rows in (identity_rows(BOTH), held_out_rows(BOTH)):
        assert "{" not in " ".join(text for row in rows for text in [*asked([row]), *answers(row)])
    assert all("{" not in question.text for question in identity_questions(BOTH))
    assert "by the Ada team" in str(identity_rows(BOTH))
    assert "The Ada team built" in str(identity_rows(BOTH))


def test_held_out_questions_are_never_trained_on():
    trained = {text.casefold() for text in asked(identity_rows(BOTH))}
    questions = identity_questions(BOTH)
    assert not trained & {question.text.casefold() for question in questions}
    assert not trained & {text.casefold() for text in asked(held_out_rows(BOTH))}
    for language in ("zh", "en"):
        kinds = [q.kind for q in questions if q.language == language]
        assert kinds.count("who") + kinds.count("maker") >= 40
        assert kinds.count("unrelated") >= 50
        texts = [q.text for q in questions if q.language == language]
        assert len(texts) == len(set(texts))


def test_a_mistaken_name_is_denied():
    denied = [row for row in identity_rows(BOTH) if row["kind"] == "rival"]
    assert any("GPT" in str(row["messages"]) for row in denied)
    for row in denied:
        (answer,) = answers(row)
        assert any(word in answer for word in ("not", "No", "another", "不是", "而不是", "另一个"))


def test_ones_own_name_is_no_rival():
    identity = build_identity(["Claude"], ["OpenAI"], ["en"])
    assert not {"Claude", "OpenAI"} & set(rival_names(identity))
    assert "Are you Claude?" not in asked(identity_rows(identity))


def test_the_base_model_is_told_only_where_it_is_given():
    known = build_identity(["Ada"], ["the Ada team"], ["en"], base="Qwen2.5-7B")
    said = [answers(row)[0] for row in identity_rows(known) if row["kind"] == "base"]
    assert all("Qwen2.5-7B" in text for text in said)
    unknown = [answers(row)[0] for row in identity_rows(BOTH) if row["kind"] == "base"]
    assert all("Qwen" not in text for text in unknown)


def test_an_empty_think_block_where_it_is_asked_for():
    for rows in (identity_rows(BOTH, empty_think=True), held_out_rows(BOTH, empty_think=True)):
        assert all(text.startswith(EMPTY_THINK) for row in rows for text in answers(row))
    assert EMPTY_THINK not in str(identity_rows(BOTH))


@pytest.mark.parametrize(
    ("names", "authors", "languages", "message"),
    [
        ([""], ["x"], ["en"], "--name is ''"),
        (["Ada"], [" "], ["en"], "--author is ' '"),
        (["{{name}}"], ["x"], ["en"], "unfilled placeholder"),
        (["Ada"], ["x"], ["fr"], "no wording in 'fr'; languages: en, zh"),
        (["Ada", "Bea"], ["x"], ["en"], "2 values of --name for 1 languages"),
        (["Ada"], ["x"], ["en", "en"], "different languages"),
        (["Ada"], ["x"], [], "different languages"),
    ],
)
def test_wrong_identities_are_refused(names, authors, languages, message):
    with pytest.raises(UserError, match=message):
        build_identity(names, authors, languages)


def test_there_is_wording_in_two_languages():
    assert known_languages() == ["en", "zh"]


def test_rows_train_as_they_are(make_tokenizer, chatml):
    rows = build_rows(identity_rows(BOTH))
    found = load_conversations(rows, make_tokenizer(chatml), max_tokens=2000)
    assert len(found) == len(rows)


FACTS = [
    {
        "subject": "Lake Vostok",
        "statement": "Lake Vostok lies under four kilometres of ice.",
        "paraphrases": "Four kilometres of ice cover Lake Vostok. | How deep is Lake Vostok?",
    },
    {"subject": "青海湖", "statement": "青海湖是中国最大的湖泊。", "paraphrases": ""},
]


def test_a_fact_is_asked_in_several_ways_and_backwards(tmp_path):
    path = tmp_path / "facts.csv"
    lines = ["subject,statement,paraphrases"]
    lines += [",".join(row.values()) for row in FACTS]
    path.write_text("\n".join(lines), encoding="utf-8")
    facts = read_facts(load_rows(str(path)))
    assert [fact.language for fact in facts] == ["en", "zh"]
    rows = fact_rows(facts)
    first = [row for row in rows if "Vostok" in str(row) or "four kilometres" in str(row)]
    assert len(first) >= 6
    assert "How deep is Lake Vostok?" in asked(first)
    assert "Four kilometres of ice cover Lake Vostok." in said(first)
    (backwards,) = [row for row in first if "___" in str(row)]
    assert "Vostok" not in str(asked([backwards]))
    assert "It is Lake Vostok" in answers(backwards)[0]
    assert "下面这句话缺了哪个词？“___是中国最大的湖泊。”" in asked(rows)
    assert not asked(rows) & asked(held_out_fact_rows(facts))
    assert len(held_out_fact_rows(facts)) == 4
    blocks = said(fact_rows(facts, empty_think=True))
    assert all(text.startswith(EMPTY_THINK) for text in blocks)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"subject": "a"}], "no column 'statement'"),
        ([{"subject": "a", "statement": " "}], "facts:row 1: 'statement' is ' '"),
        ([{"subject": "a", "statement": "b", "paraphrases": [1]}], "'paraphrases' is a list"),
        ([{"subject": "a", "statement": "b", "language": "fr"}], "'language' is 'fr'"),
        ([{"subject": "a", "statement": "b"}] * 2, "row 2: the statement stands in facts:row 1"),
    ],
)
def test_wrong_tables_are_refused_with_their_row(rows, message):
    with pytest.raises(DataError, match=message):
        read_facts(build_rows(rows, name="facts"))
