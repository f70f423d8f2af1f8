"""A recipe written back as TOML, two recipes compared, and what may change when a run goes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from sparring.errors import RunDirectoryError
from sparring.recipe.sections import SECTIONS, Recipe
from sparring.recipe.source import locate, locate_model, portable
from sparring.recipe.toml_text import write_toml, write_value

RESUMABLE = frozenset({"train.steps", "run.checkpoint_every", "run.keep_checkpoints", "run.track"})
"""Keys that may differ when a run goes on, beside all of [eval]."""

_PATHS = {"model": ("path", "adapter"), "data": ("train", "eval", "general"), "value": ("path",)}
"""Keys that may name a file of the package."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One key that two recipes give different values ("absent" where one lacks it)."""

    key: str
    old: str
    new: str


def located(recipe: Recipe) -> Recipe:
    """The recipe with its "package:" paths as the real ones of this installation."""
    changed = {}
    for section, names in _PATHS.items():
        table = getattr(recipe, section)
        if table is None:
            continue
        find = locate if section == "data" else locate_model
        paths = {name: find(getattr(table, name)) for name in names}
        changed[section] = table.model_copy(update=paths)
    return recipe.model_copy(update=changed)


def recipe_tables(recipe: Recipe) -> dict[str, Any]:
    """The recipe as the tables of its file: every key resolved, knobs beside the other keys.

    Paths into the package are written in their "package:" form, which holds on every machine.
    """
    tables: dict[str, Any] = {}
    for section in SECTIONS:
        value = getattr(recipe, section)
        if section == "reward":
            if value:
                tables[section] = [_flat(reward) for reward in value]
        elif value is not None:
            tables[section] = _flat(value)
    for section, names in _PATHS.items():
        if section in tables:
            tables[section] |= {name: portable(tables[section][name]) for name in names}
    return tables


def recipe_text(recipe: Recipe) -> str:
    """The resolved recipe as TOML; reading it back gives the same recipe."""
    return write_toml(recipe_tables(recipe))


def recipe_differences(old: Recipe, new: Recipe) -> list[Difference]:
    """Every key with another value, in the order of the sections."""
    before, after = _flat_keys(old), _flat_keys(new)
    keys = dict.fromkeys([*before, *after])
    return [
        Difference(key=key, old=before.get(key, "absent"), new=after.get(key, "absent"))
        for key in keys
        if before.get(key) != after.get(key)
    ]


def check_resume(old: Recipe, new: Recipe) -> list[Difference]:
    """The permitted differences of a resumed run; RunDirectoryError that lists any other."""
    found = recipe_differences(old, new)
    refused = [d for d in found if d.key not in RESUMABLE and not d.key.startswith("eval.")]
    if refused:
        listed = "\n".join(f"  {d.key}: {d.old} -> {d.new}" for d in refused)
        allowed = ", ".join(["eval.*", *sorted(RESUMABLE)])
        raise RunDirectoryError(
            f"--resume goes on with the run as it was started, but the recipe differs:\n{listed}\n"
            f"may change: {allowed}; take the old values, or start anew with another --run.dir"
        )
    return found


def _flat(section: BaseModel) -> dict[str, Any]:
    values: dict[str, Any] = section.model_dump()
    knobs: dict[str, Any] = values.pop("knobs", {})
    return values | knobs


def _flat_keys(recipe: Recipe) -> dict[str, str]:
    keys: dict[str, str] = {}
    for section, table in recipe_tables(recipe).items():
        if section != "reward":
            keys |= {f"{section}.{key}": write_value(value) for key, value in table.items()}
            continue
        for reward in table:
            prefix = f"reward.{reward['name']}"
            keys |= {f"{prefix}.{key}": write_value(value) for key, value in reward.items()}
    return keys
