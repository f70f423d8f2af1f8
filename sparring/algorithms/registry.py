"""Names to functions: finds a loss or an advantage and checks its knobs against its signature.

The registries themselves are the `__all__` of losses.py (grpo and ppo), advantages.py (grpo),
preference.py (dpo) and gae.py (ppo). No mathematics here.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import Any

from torch import Tensor

from sparring.algorithms import advantages, gae, losses, preference
from sparring.errors import RecipeError
from sparring.types import Batch, Group, LossOutput, TokenScores

Loss = Callable[[TokenScores, Batch], LossOutput]
"""A loss with its knobs bound."""

Advantage = Callable[[Sequence[Group]], list[Tensor]]
"""An advantage with its knobs bound."""

Estimator = Callable[[Sequence[Batch], Sequence[Tensor]], list[Batch]]
"""An advantage that needs a critic, with its knobs bound: see gae.py."""

NOT_BUILT = {
    "bnpo": (
        "its mean is taken over the tokens of each micro-batch, so loss and gradient would depend"
        " on how the step is split; take dapo with equal clips (clip_low = 0.2, clip_high = 0.2),"
        " which is the same surrogate with its mean over the whole step"
    ),
}
"""Losses that people ask for by name and that are left out on purpose, with the reason."""

LOWER_BOUNDS = {
    **dict.fromkeys(["clip_low", "clip_high", "kl_coef", "epsilon", "constant"], 0.0),
    **dict.fromkeys(["label_smoothing", "sft_coef", "gamma", "lam"], 0.0),
}
STRICTLY_ABOVE = frozenset({"clip_high", "constant"})
"""Knobs that may not be 0 either: with clip_high 0 nothing could be learned from a success."""
UPPER_BOUNDS = {"label_smoothing": 0.49, "gamma": 1.0, "lam": 1.0}
"""label_smoothing: at one half a label says nothing."""


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


def build_preference_loss(name: str, knobs: Mapping[str, Any]) -> partial[LossOutput]:
    """The loss on pairs of this name with its knobs bound; its kl_coef is above 0."""
    function = _find(preference, "loss", name)
    check_knobs(function, knobs, section="loss")
    if knobs.get("kl_coef") == 0:
        raise RecipeError(
            f"[loss] {name}: kl_coef must be above 0, got 0: it is what a margin is multiplied by"
            " (beta in the papers); 0.1 is usual"
        )
    return partial(function, **knobs)


def build_estimator(name: str, knobs: Mapping[str, Any]) -> partial[list[Batch]]:
    """The advantage of a critic of this name with its knobs bound."""
    function = _find(gae, "advantage", name)
    check_knobs(function, knobs, section="advantage")
    return partial(function, **knobs)


def knob_defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """Keyword-only parameters with their defaults (inspect.Parameter.empty: there is none)."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def check_knobs(
    function: Callable[..., Any], knobs: Mapping[str, Any], *, section: str = "loss"
) -> None:
    """RecipeError unless every knob is a parameter of `function` and a value that it can take."""
    defaults = knob_defaults(function)
    name = getattr(function, "__name__", str(function))
    takes = ", ".join(sorted(defaults)) or "no knobs"
    for key, value in knobs.items():
        if key not in defaults:
            raise RecipeError(f"[{section}] {name} takes no '{key}'; it takes {takes}")
        if isinstance(defaults[key], bool):
            if not isinstance(value, bool):
                raise RecipeError(f"[{section}] {name}: {key} must be true or false, got {value!r}")
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise RecipeError(f"[{section}] {name}: {key} must be a number, got {value!r}")
        bound = LOWER_BOUNDS.get(key, -math.inf)
        is_low = value <= bound if key in STRICTLY_ABOVE else value < bound
        if is_low or not math.isfinite(value):
            allowed = f"{'above' if key in STRICTLY_ABOVE else 'at least'} {bound:g}"
            raise RecipeError(
                f"[{section}] {name}: {key} must be finite and {allowed}, got {value}"
            )
        if value > UPPER_BOUNDS.get(key, math.inf):
            raise RecipeError(
                f"[{section}] {name}: {key} must be at most {UPPER_BOUNDS[key]:g}, got {value}"
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
