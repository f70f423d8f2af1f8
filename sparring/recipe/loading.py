"""From tables to a recipe: each unknown or missing key and each wrong type is one plain error."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from sparring.errors import RecipeError
from sparring.recipe.checks import check
from sparring.recipe.resolved import located
from sparring.recipe.sections import REQUIRED, SECTIONS, Command, Recipe, RewardSection, listed
from sparring.recipe.source import Source, override, read_source
from sparring.recipe.toml_text import KeyPath, write_value

_FILLED: Mapping[Command, Mapping[str, Mapping[str, Any]]] = {
    "sft": {"loss": {"name": "sft"}},
    "dpo": {"loss": {"name": "sigmoid"}},
    "ppo": {
        "advantage": {"name": "gae"},
        "loss": {"name": "dapo", "clip_low": 0.2, "clip_high": 0.2},
        "train": {"passes": 4},
        "value": {},
    },
}
"""What a command takes where the recipe is silent; a [loss] that is named keeps its own knobs."""


def load_recipe(recipe: str, overrides: Sequence[str] = (), *, command: Command) -> Recipe:
    """Read a recipe for a command: a path or packaged name, then words like "--train.steps", "50".

    Raises RecipeError, with file and line, for anything that the command cannot run with.
    """
    return _build(override(read_source(recipe), overrides), command)


def build_recipe(
    tables: Mapping[str, Any], overrides: Sequence[str] = (), *, command: Command
) -> Recipe:
    """A recipe from tables instead of a file: {"model": {"path": ...}, "reward": [{...}], ...}."""
    source = Source(name="recipe", tables=copy.deepcopy(dict(tables)), places={})
    return _build(override(source, overrides), command)


def _build(source: Source, command: Command) -> Recipe:
    _check_shape(source)
    _check_required(source, command)
    tables = dict(source.tables)
    for section, values in _FILLED.get(command, {}).items():
        given = tables.get(section, {})
        tables[section] = given if {"name"} <= given.keys() & values.keys() else {**values, **given}
    try:
        recipe = Recipe(**{section: _fields(section, table) for section, table in tables.items()})
    except ValidationError as error:
        lines = [_explain(source, found["type"], found) for found in error.errors()]
        raise RecipeError("\n".join(dict.fromkeys(lines))) from None
    check(source, recipe, command)
    return located(recipe)


def _check_shape(source: Source) -> None:
    """Known sections alone, each a table, and [[reward]] a list of tables."""
    for section, table in source.tables.items():
        place = source.place((section,))
        if section not in SECTIONS:
            raise RecipeError(f"{place}: no section [{section}]; sections: {listed(SECTIONS)}")
        if section == "reward" and isinstance(table, dict):
            raise RecipeError(f"{place}: write [[reward]] with two brackets; there may be several")
        entries = table if section == "reward" and isinstance(table, list) else [table]
        if not all(isinstance(entry, dict) for entry in entries):
            title = "[[reward]]" if section == "reward" else f"[{section}]"
            raise RecipeError(f"{place}: '{section}' must be a table, written {title}")


def _check_required(source: Source, command: Command) -> None:
    missing = []
    for key in REQUIRED[command]:
        section, _, name = key.partition(".")
        if section == "reward":
            is_set = bool(source.tables.get(section))
        else:
            is_set = source.tables.get(section, {}).get(name, "") != ""
        if not is_set:
            missing.append("a [[reward]] table" if section == "reward" else f"[{section}] {name}")
    if missing:
        raise RecipeError(f"{source.name}: {command} also needs {', '.join(missing)}")


def _fields(section: str, table: Any) -> Any:
    """The table with every key that is no field gathered under "knobs", where there are knobs."""
    if section == "reward":
        return tuple(_with_knobs(RewardSection, entry) for entry in table)
    return _with_knobs(SECTIONS[section], table)


def _with_knobs(model: type[BaseModel], table: Mapping[str, Any]) -> Mapping[str, Any]:
    if "knobs" not in model.model_fields:
        return table
    own = [key for key in table if key in model.model_fields and key != "knobs"]
    knobs = {key: value for key, value in table.items() if key not in own}
    return {key: table[key] for key in own} | {"knobs": knobs}


_BENDING = (
    "allowed_token_ids", "bad_words", "bad_words_ids", "frequency_penalty", "logit_bias",
    "logits_processors", "min_completion_tokens", "min_new_tokens", "min_tokens",
    "no_repeat_ngram_size", "presence_penalty", "repetition_penalty", "suppress_tokens",
)  # fmt: skip
_BENDS = (
    "holding tokens back or changing logits makes completions come from another distribution than"
    " the one the trainer learns on. A reward can ask for length (group_length) or against loops"
    " (repetition)"
)


def _explain(source: Source, kind: str, error: Mapping[str, Any]) -> str:
    """One error of pydantic as a line: place, section and key, what was found, what is allowed."""
    path: KeyPath = tuple(error["loc"])
    section = str(path[0])
    depth = 2 if section == "reward" else 1
    title = f"[[{section}]]" if section == "reward" else f"[{section}]"
    place, key = source.place(path[: depth + 1]), path[depth]
    if kind == "extra_forbidden":
        known = listed(SECTIONS[section].model_fields)
        bends = f": {_BENDS}" if section == "rollout" and key in _BENDING else ""
        return f"{place}: {title} takes no '{key}'{bends}; it takes {known}"
    if kind == "missing":
        return f"{place}: {title} needs a {key}"
    found = write_value(error["input"])
    reason = error["msg"].removeprefix("Value error, ").replace("Input should", "it should")
    return f"{place}: {title} {key} = {found} is not allowed: {reason}"
