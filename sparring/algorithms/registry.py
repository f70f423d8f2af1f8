"""Names to functions: finds a loss or an advantage and checks its knobs against its signature.

The registries themselves are the `__all__` of losses.py and advantages.py. No mathematics here.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import Any

from torch import Tensor

from sparring.algorithms import advantages, losses
from sparring.errors import RecipeError
from sparring.types import Batch, Group, LossOutput, TokenScores

Loss = Callable[[TokenScores, Batch], LossOutput]
"""A loss with its knobs bound."""

Advantage = Callable[[Sequence[Group]], list[Tensor]]
"""An advantage with its knobs bound."""

NOT_BUILT = {
    "bnpo": (
        "its mean is taken over the tokens of each micro-batch, so loss and gradient would depend"
        " on how the step is split; take dapo with equal clips (clip_low = 0.2, clip_high = 0.2),"
        " which is the same surrogate with its mean over the whole step"
    ),
}
"""Losses that people ask for by name and that are left out on purpose, with the reason."""

LOWER_BOUNDS = {"clip_low": 0.0, "clip_high": 0.0, "kl_coef": 0.0, "epsilon": 0.0, "constant": 0.0}
STRICTLY_ABOVE = frozenset({"clip_high", "constant"})
"""Knobs that may not be 0 either: with clip_high 0 nothing could be learned from a success."""


def find_loss(name: str) -> Callable[..., LossOutput]:
    """The loss of this name; RecipeError with the known names, and for bnpo with the reason."""
    if name in NOT_BUILT:
        raise RecipeError(
            f"[loss] name '{name}' is not built: {NOT_BUILT[name]}. Losses: {_known(losses)}"
        )
    found: Callable[..., LossOutput] = _find(losses, "loss", name)
    return found


def find_advantage(name: str) -> Callable[..., list[Tensor]]:
    """The advantage of this name; RecipeError with the known names."""
    found: Callable[..., list[Tensor]] = _find(advantages, "advantage", name)
    return found


def build_loss(
    name: str, knobs: Mapping[str, Any], *, max_completion_tokens: int
) -> partial[LossOutput]:
    """The loss with its knobs bound; a `constant` that is not given is max_completion_tokens."""
    function = find_loss(name)
    settings = dict(knobs)
    if "constant" in knob_defaults(function):
        settings.setdefault("constant", float(max_completion_tokens))
    check_knobs(function, settings, section="loss")
    return partial(function, **settings)


def build_advantage(name: str, knobs: Mapping[str, Any]) -> partial[list[Tensor]]:
    """The advantage with its knobs bound."""
    function = find_advantage(name)
    check_knobs(function, knobs, section="advantage")
    return partial(function, **knobs)


def knob_defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """Keyword-only parameters with their defaults (inspect.Parameter.empty: there is none)."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def check_knobs(
    function: Callable[..., Any], knobs: Mapping[str, Any], *, section: str = "loss"
) -> None:
    """RecipeError unless every knob is a parameter of `function` and a number that it can take."""
    defaults = knob_defaults(function)
    name = getattr(function, "__name__", str(function))
    takes = ", ".join(sorted(defaults)) or "no knobs"
    for key, value in knobs.items():
        if key not in defaults:
            raise RecipeError(f"[{section}] {name} takes no '{key}'; it takes {takes}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise RecipeError(f"[{section}] {name}: {key} must be a number, got {value!r}")
        bound = LOWER_BOUNDS.get(key, -math.inf)
        is_low = value <= bound if key in STRICTLY_ABOVE else value < bound
        if is_low or not math.isfinite(value):
            allowed = f"{'above' if key in STRICTLY_ABOVE else 'at least'} {bound:g}"
            raise RecipeError(
                f"[{section}] {name}: {key} must be finite and {allowed}, got {value}"
            )
    for key, default in defaults.items():
        if default is inspect.Parameter.empty and key not in knobs:
            raise RecipeError(f"[{section}] {name} needs '{key}'; it takes {takes}")


def _find(module: ModuleType, section: str, name: str) -> Any:
    if name not in module.__all__:
        raise RecipeError(f"[{section}] name '{name}' is not known; known: {_known(module)}")
    return getattr(module, name)


def _known(module: ModuleType) -> str:
    return ", ".join(sorted(module.__all__))
