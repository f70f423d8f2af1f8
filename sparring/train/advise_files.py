"""Advice made ready to run: rows sorted into files, and a recipe for each kind of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparring.data.conversations import SHAREGPT_ROLES
from sparring.data.named import read_rows
from sparring.data.rows import Row, Rows
from sparring.errors import UserError
from sparring.recipe import Recipe, recipe_tables
from sparring.recipe.toml_text import write_toml
from sparring.train.advise import Advice
from sparring.train.row_kinds import kind_of_row, read_row

SFT_PASSES = 4
FEWEST_SFT_STEPS = 60
ADAPTER_RATE, FULL_RATE = 1e-4, 2e-5


def write_advice(recipe: Recipe, advice: Advice, folder: Path) -> list[Path]:
    """Write sft.jsonl with sft.toml, and grpo.jsonl with grpo.toml, as far as there are such rows.

    Rows stay as they are where the command reads them so; others become messages, or prompt and
    reference. What the recipe says is kept; an sft.toml has rates and steps of SFT, and a grpo.toml
    goes on from its run. Raises UserError where the folder cannot be written.
    """
    data = recipe.data
    rows = read_rows(data.train, split=data.split, bad_rows=data.bad_rows)
    wanted = advice.recommendation
    files: dict[str, str] = {}
    tables = recipe_tables(recipe)
    start = tables["model"]
    if wanted in ("sft", "sft_then_grpo"):
        found = [_conversation(recipe, rows, place) for place in advice.sft_places]
        files["sft.jsonl"] = _jsonl(found)
        files["sft.toml"] = write_toml(_sft_tables(recipe, tables, folder, len(found)))
        start = {**start, "path": str(folder / "sft"), "adapter": ""}
    if wanted in ("grpo", "grpo_filtered", "sft_then_grpo"):
        files["grpo.jsonl"] = _jsonl([_problem(recipe, rows, p) for p in advice.grpo_places])
        files["grpo.toml"] = write_toml(_grpo_tables(tables, folder, start, _names(recipe, rows)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder.absolute()} cannot be written: {error.strerror}") from error
    return [folder / name for name in files]


def _sft_tables(
    recipe: Recipe, tables: Mapping[str, Any], folder: Path, num_rows: int
) -> dict[str, Any]:
    data = recipe.data
    per_step = min(recipe.train.conversations_per_step, max(1, num_rows))
    steps = max(FEWEST_SFT_STEPS, -(-SFT_PASSES * num_rows // per_step))
    kept = {
        key: getattr(data, key)
        for key in ("system_prompt", "template", "bad_rows", "general", "general_ratio")
    }
    section = {
        "model": tables["model"],
        "data": {"train": str(folder / "sft.jsonl"), **kept, "placeholders": data.placeholders},
        "optimizer": {"learning_rate": FULL_RATE if recipe.lora is None else ADAPTER_RATE},
        "train": {
            "steps": steps,
            "conversations_per_step": per_step,
            "micro_batch_tokens": recipe.train.micro_batch_tokens,
            "checkpointing": recipe.train.checkpointing,
        },
        "run": {**tables["run"], "dir": str(folder / "sft")},
    }
    if "lora" in tables:
        section["lora"] = tables["lora"]
    return section


def _grpo_tables(
    tables: Mapping[str, Any], folder: Path, start: Mapping[str, Any], names: Mapping[str, str]
) -> dict[str, Any]:
    data = {**tables["data"], **names, "train": str(folder / "grpo.jsonl"), "split": "train"}
    for key in ("weight", "general", "general_ratio", "placeholders"):
        data.pop(key, None)
    kept = {name: table for name, table in tables.items() if name != "value"}
    return {
        **kept,
        "model": dict(start),
        "data": data,
        "run": {**tables["run"], "dir": str(folder / "grpo")},
    }


def _conversation(recipe: Recipe, rows: Rows, place: int) -> Row:
    """The row as messages."""
    row = rows[place]
    turns = row.get("messages") or row.get("conversations")
    if isinstance(turns, list | tuple):
        known = [turn for turn in turns if isinstance(turn, Mapping)]
        return {"messages": [_message(turn) for turn in known]}
    questions, answer = read_row(row, recipe.data.prompt, recipe.data.reference)
    system = str(row.get("system") or "").strip()
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": questions[-1] if questions else ""})
    return {"messages": [*messages, {"role": "assistant", "content": answer}]}


def _message(turn: Mapping[str, Any]) -> dict[str, Any]:
    """A turn with role and content, also where it came with from and value."""
    if "role" in turn:
        return dict(turn)
    role = SHAREGPT_ROLES.get(str(turn.get("from")), str(turn.get("from")))
    return {"role": role, "content": turn.get("value")}


def _problem(recipe: Recipe, rows: Rows, place: int) -> Row:
    """The row as GRPO reads it."""
    row, data = rows[place], recipe.data
    has_reference = not data.reference or row.get(data.reference) not in (None, "")
    if row.get(data.prompt) and has_reference:
        return row
    found = kind_of_row(row, prompt_column=data.prompt, reference_column=data.reference)
    others = {key: value for key, value in row.items() if key not in ("messages", "conversations")}
    names = _names(recipe, rows)
    added = {names["prompt"]: found.question}
    if names["reference"]:
        added[names["reference"]] = found.answer
    return others | added


def _names(recipe: Recipe, rows: Rows) -> dict[str, str]:
    """The prompt and the reference column of what is written."""
    data = recipe.data
    return {
        "prompt": data.prompt if data.prompt in rows.columns else "prompt",
        "reference": data.reference if data.reference in ("", *rows.columns) else "reference",
    }


def _jsonl(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
