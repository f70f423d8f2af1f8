"""The pages on how to do things: their recipes are recipes, in both languages alike."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.shapes import SHAPES
from sparring.cli import app
from sparring.recipe import build_recipe

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = [DOCS / place / "how-to-think-or-who-i-am.md" for place in ("how-to", "zh")]


def blocks(page: Path, kind: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.S | re.M)
    return [text for name, text in found if name == kind]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_recipes_of_the_page_are_recipes(page):
    found = [tomllib.loads(text) for text in blocks(page, "toml")]
    assert len(found) == 3
    (whole,) = [tables for tables in found if "optimizer" in tables]
    recipe = build_recipe(whole, command="sft")
    assert recipe.data.general_ratio == 1.0
    for tables in found:
        build_recipe({**whole, "data": {**whole["data"], **tables["data"]}}, command="sft")


def test_both_languages_show_the_same_commands():
    english, chinese = (
        [line for text in blocks(page, "") for line in text.splitlines() if "sparring" in line]
        for page in PAGES
    )
    assert [line.partition("#")[0].strip() for line in english] == [
        line.partition("#")[0].strip() for line in chinese
    ]


@pytest.mark.parametrize("place", ["how-to", "zh"])
def test_the_recipe_of_saving_memory_is_a_recipe(place: str):
    text, weights = blocks(DOCS / place / "save-memory.md", "toml")
    tables = tomllib.loads(text)
    tables["model"] |= tomllib.loads(weights)["model"]
    tables |= {"data": {"train": "rows.jsonl"}, "reward": [{"name": "math"}], "run": {"dir": "r"}}
    recipe = build_recipe(tables, command="grpo")
    assert (recipe.train.checkpointing, recipe.train.mlp_tile_tokens) == ("layers", 8192)
    assert recipe.train.max_mismatch_kl == 0.05
    assert recipe.model.keep_16bit == ("down_proj", "model.layers.0")
    assert (recipe.model.head, recipe.model.embedding) == ("8bit", "host")


PLAN_PAGES = [DOCS / place / "plan-memory.md" for place in ("how-to", "zh")]


def test_the_recipe_of_the_plan_page_is_a_recipe_in_both_languages():
    recipes = []
    for page in PLAN_PAGES:
        (text,) = blocks(page, "toml")
        recipes.append(build_recipe(tomllib.loads(text), command="grpo"))
        assert blocks(page, "")[0].startswith("sparring plan")
    assert recipes[0] == recipes[1]
    assert recipes[0].train.checkpointing == "auto"


@pytest.mark.skipif(torch.cuda.is_available(), reason="seconds count this machine's own host there")
@pytest.mark.parametrize("page", PLAN_PAGES, ids=lambda page: page.parent.name)
def test_what_the_plan_page_shows_is_what_plan_prints(page: Path, tmp_path: Path):
    (text,) = blocks(page, "toml")
    config = tmp_path / "config.json"
    config.write_text(json.dumps(SHAPES["qwen2.5-7b"] | {"dtype": "bfloat16"}))
    (tmp_path / "seven.toml").write_text(text)
    command, shown = (blocks(page, "")[i].splitlines() for i in (0, 1))
    words = command[0].replace("seven.toml", str(tmp_path / "seven.toml")).split()[1:]
    words += ["--train.micro_batch_tokens", "8192", "--train.checkpointing", "none"]
    printed = CliRunner().invoke(app, [*words, "--model.path", str(config)]).output.splitlines()
    place = 0
    for line in shown:
        if line != "...":
            assert line in printed[place:], line
            place = printed.index(line, place)
    assert len(shown) > 20
