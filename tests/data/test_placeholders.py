"""Identity data with its open places: filled in the language of a row, or refused with line."""

from __future__ import annotations

import json

import pytest

from sparring.data.placeholders import fill_placeholders, language_of
from sparring.data.rows import build_rows, load_rows
from sparring.errors import DataError

ALPACA = [
    {"instruction": "hi", "input": "", "output": "Hello! I am {{name}}, developed by {{author}}."},
    {"instruction": "你是谁？", "input": "", "output": "我是 {{name}}，由{{author}}开发。"},
]
SWIFT = [
    {"query": "who are you?", "response": "I am {{NAME}} by {{AUTHOR}}.", "tag": "en"},
    {"query": "?", "response": "{{NAME}}", "tag": "zh"},
]


def test_one_value_fills_every_language():
    rows = fill_placeholders(build_rows(ALPACA), {"name": "Ada", "author": "the Ada team"})
    assert rows[0]["output"] == "Hello! I am Ada, developed by the Ada team."
    assert rows[1]["output"] == "我是 Ada，由the Ada team开发。"
    assert rows[1]["instruction"] == "你是谁？"


@pytest.mark.parametrize("data", [ALPACA, SWIFT])
def test_values_by_language_follow_the_row(data):
    values = {"Name": {"zh": "小艾", "en": "Ada"}, "author": {"zh": "艾组", "en": "Ada team"}}
    rows = fill_placeholders(build_rows(data), values)
    first, second = list(rows[0].values()), list(rows[1].values())
    assert any("Ada" in text for text in first)
    assert any("小艾" in text for text in second)
    assert "{{" not in json.dumps(rows.values)


def test_messages_are_filled_too_and_nothing_else_changes():
    row = {"messages": [{"role": "assistant", "content": "{{ name }} {{other}}"}], "id": 3}
    (filled,) = fill_placeholders(build_rows([row]), {"name": "Ada"})
    assert filled == {"messages": [{"role": "assistant", "content": "Ada {{other}}"}], "id": 3}
    assert row["messages"][0]["content"] == "{{ name }} {{other}}"


def test_an_unfilled_placeholder_is_refused_with_file_and_line(tmp_path):
    path = tmp_path / "identity.jsonl"
    rows = [{"query": "q", "response": "fine"}, {"query": "who?", "response": "I am {{NAME}}."}]
    path.write_text("\n" + "\n".join(map(json.dumps, rows)) + "\n")
    with pytest.raises(DataError, match=r"identity\.jsonl:3: .*\{\{NAME\}\}.*data\.placeholders"):
        fill_placeholders(load_rows(str(path)), {"author": "x"})


def test_code_and_kept_places_stay():
    code = "Write `{{name}}` or\n```\nHello {{ name }}\n```\n"
    (row,) = fill_placeholders(build_rows([{"output": code}]), {})
    assert row["output"] == code
    (kept,) = fill_placeholders(build_rows([{"output": "{{name}}"}]), {"name": "{{name}}"})
    assert kept["output"] == "{{name}}"


def test_values_that_say_nothing_are_refused():
    with pytest.raises(DataError, match="'author' is empty"):
        fill_placeholders(build_rows(ALPACA), {"name": "Ada", "author": " "})
    with pytest.raises(DataError, match=r"row 2: data\.placeholders has no zh value for 'name'"):
        fill_placeholders(build_rows(ALPACA), {"name": {"en": "Ada"}, "author": "x"})


def test_the_language_of_a_text():
    assert [language_of(text) for text in ("Who?", "你是 GPT 吗", "")] == ["en", "zh", "en"]
