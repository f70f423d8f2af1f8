"""Data sets by a short name; the Hub itself is played by a file."""

from __future__ import annotations

import json

import pytest

from sparring.data import named
from sparring.data.rows import load_rows
from sparring.errors import DataError

ROW = {"question": "How many?", "answer": "She has 2 * 600 = <<2*600=1200>>1200.\n#### 1,200"}


def test_gsm8k_by_name_has_the_usual_columns(tmp_path, monkeypatch):
    path = tmp_path / "hub.jsonl"
    path.write_text(json.dumps(ROW) + "\n")
    asked = []

    def hub(source, **rest):
        asked.append((source, rest["split"]))
        return load_rows(str(path), **rest)

    monkeypatch.setattr(named, "load_rows", hub)
    (row,) = named.read_rows("gsm8k", split="test")
    assert row == {"prompt": "How many?", "reference": "1200", "solution": ROW["answer"]}
    assert asked == [("openai/gsm8k:main", "test")]


def test_a_file_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_text('{"prompt": "mine"}\n')
    (row,) = named.read_rows("gsm8k", split="test")
    assert row == {"prompt": "mine"}


def test_a_hub_that_cannot_be_reached_is_named(monkeypatch):
    def hub(source, **rest):
        raise DataError("the Hub cannot be reached")

    monkeypatch.setattr(named, "load_rows", hub)
    with pytest.raises(DataError, match=r"'gsm8k' is the Hub's openai/gsm8k:main: the Hub cannot"):
        named.read_rows("gsm8k")
