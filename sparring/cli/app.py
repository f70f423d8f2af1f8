"""The command line's own object, its words, and how a recipe is read from them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparring.errors import UserError

if TYPE_CHECKING:
    from sparring.recipe import Recipe

app = typer.Typer(
    name="sparring",
    help="Train language models to reason by GRPO, sample from them and measure them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}

Words = Annotated[
    list[str],
    typer.Argument(
        metavar="RECIPE",
        help="A TOML file or a packaged recipe; --section.key VALUE overrides any key of it.",
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on from the newest checkpoint of run.dir.")
]
Traceback = Annotated[bool, typer.Option("--traceback", help="Show where an error was raised.")]
Model = Annotated[
    str,
    typer.Option(
        "--model", help="A folder, a run directory, a Hub id, or: quickstart.", metavar="MODEL"
    ),
]
Adapter = Annotated[
    str, typer.Option("--adapter", help="A PEFT adapter to put on it.", metavar="ADAPTER")
]


@app.callback(invoke_without_command=True)
def sparring(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Train language models to reason by GRPO, sample from them and measure them."""
    if version:
        from sparring import __version__

        print(__version__)
        raise typer.Exit


def split(words: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Plain words, and options with their values, of the words that no option of ours took."""
    plain, options, rest = [], [], list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            plain.append(word)
            continue
        option, equals, value = word.partition("=")
        if not equals:
            if not rest:
                raise UserError(f"{option} needs a value: {option} VALUE, or {option}=VALUE")
            value = rest.pop(0)
        options.append((option, value))
    return plain, options


def secrets_of(knobs: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The variables that rewards' knobs name in api_key_env, as far as set: read here alone."""
    names = {str(table.get("api_key_env", "")) for table in knobs}
    return {name: os.environ[name] for name in names if name in os.environ}


def recipe_secrets(recipe: Recipe) -> dict[str, str]:
    """The same of a recipe's rewards."""
    return secrets_of(reward.knobs for reward in recipe.reward)


def load(words: Sequence[str], command: Any) -> Recipe:
    """The recipe that the words of a command name, with their overrides."""
    from sparring.recipe import load_recipe

    names, options = split(words)
    if len(names) != 1:
        found = f"got {', '.join(names)}" if names else "got none"
        raise UserError(f"{command} takes one RECIPE, {found}; overrides are --section.key VALUE")
    return load_recipe(
        names[0], [f"{option}={value}" for option, value in options], command=command
    )
