"""Where a recipe's values come from: a file or a packaged name, then overrides.

Every value remembers its place, so that an error can name it. What values mean is not known here.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from sparring.errors import RecipeError
from sparring.recipe.sections import SECTIONS, listed
from sparring.recipe.toml_text import KeyPath, read_toml, read_value

PACKAGE_PREFIX = "package:"
"""A path that starts with this lies in the package's own assets, wherever it is installed."""

QUICKSTART = "quickstart"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Tables as they were read, and the place of each key: "recipes/a.toml:14" or "--loss.name"."""

    name: str
    tables: Mapping[str, Any]
    places: Mapping[KeyPath, str]

    def place(self, path: KeyPath) -> str:
        """The place of a key, of the nearest table around it, or the name of the whole."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, self.name)


def locate(path: str) -> str:
    """The path itself; for "package:quickstart/train.jsonl", where that asset is installed."""
    if not path.startswith(PACKAGE_PREFIX):
        return path
    return str(_assets() / path.removeprefix(PACKAGE_PREFIX))


def locate_model(path: str) -> str:
    """As `locate`; "quickstart" is the packaged policy, unless a model of this name lies here."""
    if path != QUICKSTART or _holds_model(Path(path)):
        return locate(path)
    return locate(f"{PACKAGE_PREFIX}{QUICKSTART}/policy")


def portable(path: str) -> str:
    """The reverse of `locate`: a path inside the package's assets in its "package:" form."""
    found = Path(path)
    if not found.is_relative_to(_assets()):
        return path
    return PACKAGE_PREFIX + found.relative_to(_assets()).as_posix()


def packaged_recipes() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(path.stem for path in (_assets() / "recipes").glob("*.toml"))


def read_source(recipe: str) -> Source:
    """The tables of a recipe file, of a run directory's recipe.toml, or of a packaged recipe.

    Raises RecipeError where there is none, or where it is not TOML.
    """
    path = _find(recipe)
    name = recipe if path == Path(recipe) else str(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path.absolute()}: cannot be read as text: {error}") from error
    tables, lines = read_toml(text, source=name)
    return Source(
        name=name, tables=tables, places={key: f"{name}:{line}" for key, line in lines.items()}
    )


def override(source: Source, overrides: Sequence[str]) -> Source:
    """The source with command-line overrides laid over it.

    overrides: words of a command line, each override one ("--section.key=VALUE") or two
    ("--section.key", "VALUE"). VALUE is read as TOML, else as a text. Raises RecipeError for a word
    that is no override, an unknown section, or a reward that the recipe does not have.
    """
    tables, places = copy.deepcopy(dict(source.tables)), dict(source.places)
    words = list(overrides)
    while words:
        word = words.pop(0)
        option, equals, text = word.partition("=")
        if not option.startswith("--") or "." not in option:
            raise RecipeError(f"'{word}' is no override; an override is --section.key VALUE")
        if not equals:
            if not words:
                raise RecipeError(f"{option} needs a value: {option} VALUE, or {option}=VALUE")
            text = words.pop(0)
        section, _, name = option.removeprefix("--").partition(".")
        if section not in SECTIONS:
            raise RecipeError(f"{option}: no section [{section}]; sections: {listed(SECTIONS)}")
        table, path = _target(tables, section, name, option)
        table[str(path[-1])] = _value(section, str(path[-1]), text)
        places[path] = option
    return Source(name=source.name, tables=tables, places=places)


def _holds_model(folder: Path) -> bool:
    names = ("config.json", "adapter_config.json")
    return any((place / name).is_file() for place in (folder, folder / "final") for name in names)


def _assets() -> Path:
    return Path(str(resources.files("sparring"))) / "assets"


def _find(recipe: str) -> Path:
    path = Path(recipe)
    if path.is_file():
        return path
    if recipe in packaged_recipes():
        return _assets() / "recipes" / f"{recipe}.toml"
    if (path / "recipe.toml").is_file():
        return path / "recipe.toml"
    known = ", ".join(packaged_recipes()) or "none"
    raise RecipeError(
        f"there is no recipe {path.absolute()}; give the path of a TOML file or of a run directory,"
        f" or the name of a packaged recipe: {known}"
    )


def _value(section: str, key: str, text: str) -> Any:
    """`text` read as TOML; as it stands where only text is allowed, so that `--run.dir 7` works."""
    value = read_value(text)
    field = SECTIONS[section].model_fields.get(key)
    wants_text = field is not None and field.annotation is str
    return text if wants_text and not isinstance(value, str) else value


def _target(
    tables: dict[str, Any], section: str, name: str, option: str
) -> tuple[dict[str, Any], KeyPath]:
    """The table that an override writes into, and the path of its key."""
    if section == "reward":
        return _target_reward(tables, name, option)
    table = tables.setdefault(section, {})
    if not isinstance(table, dict):
        raise RecipeError(f"{option}: '{section}' of the recipe is no table; write [{section}]")
    return table, (section, name)


def _target_reward(
    tables: dict[str, Any], name: str, option: str
) -> tuple[dict[str, Any], KeyPath]:
    """As _target for --reward.NAME.KEY; NAME may be "math", "file.py:mine" or just "mine"."""
    reward, _, key = name.rpartition(".")
    written = tables.get("reward")
    rewards = {
        index: (entry, str(entry.get("name")))
        for index, entry in enumerate(written if isinstance(written, list) else [])
        if isinstance(entry, dict)
    }
    found = [
        (entry, index)
        for index, (entry, full) in rewards.items()
        if reward in (full, full.rpartition(":")[2])
    ]
    if not key or len(found) != 1:
        known = ", ".join(full for _, full in rewards.values()) or "it has none"
        raise RecipeError(
            f"{option}: a reward's key is written --reward.NAME.KEY, where NAME is one of this"
            f" recipe's rewards: {known}"
        )
    table, index = found[0]
    return table, ("reward", index, key)
