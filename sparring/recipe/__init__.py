"""The recipe of a run: a TOML file and command-line overrides become one validated, frozen value.

Every key stands in sections.py. Nothing is trained or written here; train/ reads a `Recipe`, and
nothing below it does.
"""

from sparring.recipe.loading import build_recipe, load_recipe
from sparring.recipe.resolved import (
    Difference,
    check_resume,
    recipe_differences,
    recipe_tables,
    recipe_text,
)
from sparring.recipe.sections import Command, Recipe, RewardSection, parse_size
from sparring.recipe.source import locate, locate_model, packaged_recipes

__all__ = [
    "Command",
    "Difference",
    "Recipe",
    "RewardSection",
    "build_recipe",
    "check_resume",
    "load_recipe",
    "locate",
    "locate_model",
    "packaged_recipes",
    "parse_size",
    "recipe_differences",
    "recipe_tables",
    "recipe_text",
]
