"""Reward functions of the ecosystem as rewards of a run: called as TRL calls them.

Keywords only; every column but the prompt under its own name; a synchronous function in the main
thread, one after another, async ones side by side; None where it does not apply; no clock. The sum
is over what is there, and a completion that none judged is left out.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from sparring.compat.state import TrainerState
from sparring.errors import RewardError, UserError
from sparring.rewards.model import ModelReward
from sparring.rewards.registry import named_rewards
from sparring.rewards.verdicts import Reward, load_reward

SECONDS = 3600.0
"""An async function that has not answered by then is given up."""

_HIDDEN = ("prefills", "finish_reasons", "group_ids")
"""Given to those alone that name them: TRL does not know them."""


def build_rewards(
    reward_funcs: Any, weights: Sequence[float] | None, *, max_steps: int
) -> list[Reward]:
    """The rewards of a trainer. Raises UserError or RewardError.

    reward_funcs: one or a list of functions, objects with __call__, names of Sparring's own rewards
    ("math"), and names or folders of sequence classifiers. weights: one each; None: all 1.
    """
    given = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    if reward_funcs is None or not given:
        raise UserError("reward_funcs is empty; give a function, or a list of functions")
    if weights is not None and len(weights) != len(given):
        raise UserError(
            f"reward_weights has {len(weights)} entries for {len(given)} reward functions; give one"
            " for each"
        )
    rewards: list[Reward] = []
    for index, one in enumerate(given):
        weight = 1.0 if weights is None else float(weights[index])
        reward = _build(one, weight, max_steps)
        names = [other.name for other in rewards]
        number = sum(name == reward.name or name.startswith(f"{reward.name}_") for name in names)
        if reward.name in names:
            reward = replace(reward, name=f"{reward.name}_{number + 1}")
        rewards.append(reward)
    return rewards


def name_of(function: Any) -> str:
    """TRL's name of a reward: the function's, its class's, or the last part of a model's id."""
    if isinstance(function, functools.partial):
        return name_of(function.func)
    return str(getattr(function, "__name__", type(function).__name__))


def _build(one: Any, weight: float, max_steps: int) -> Reward:
    if isinstance(one, str) and one in named_rewards():
        return replace(load_reward(one, weight=weight), is_optional=True)
    if isinstance(one, str):
        loaded = load_reward(
            "model",
            knobs={"path": one, "standardise": "none", "thinking": "keep", "clip": 1e30},
            weight=weight,
            timeout_seconds=SECONDS,
        )
        judge = _classifier(cast(ModelReward, loaded.function))
        return replace(
            loaded, name=Path(one).name, function=judge, knobs={}, is_fitted=False, is_optional=True
        )
    if not callable(one) or hasattr(one, "forward"):
        raise UserError(
            f"a reward is a {type(one).__name__}; give a function, an object with __call__, or the"
            " folder or Hub id of a sequence classifier as text"
        )
    is_async = _is_async(one)
    call = _async_call(one, max_steps) if is_async else _sync_call(one, max_steps)
    return Reward(
        name=name_of(one),
        function=call,
        weight=weight,
        timeout_seconds=SECONDS,
        source=name_of(one),
        is_optional=True,
        is_inline=not is_async,
    )


def _classifier(model: ModelReward) -> Callable[..., Any]:
    """A sequence classifier as TRL calls it: on a text prompt with its completion as they stand."""

    def call(prompts: list[Any], completions: list[Any]) -> Any:
        if all(isinstance(prompt, str) for prompt in prompts):
            return model.score_texts([p + c for p, c in zip(prompts, completions, strict=True)])
        return model(prompts=prompts, completions=completions)

    return call


def _is_async(function: Any) -> bool:
    if isinstance(function, functools.partial):
        return _is_async(function.func)
    called = getattr(function, "__call__", None)  # noqa: B004 - an object's own method
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(called)


def _sync_call(function: Any, max_steps: int) -> Callable[..., Any]:
    def call(**offered: Any) -> Any:
        return function(**_arguments(function, offered, max_steps))

    return call


def _async_call(function: Any, max_steps: int) -> Callable[..., Any]:
    async def call(**offered: Any) -> Any:
        return await function(**_arguments(function, offered, max_steps))

    return call


def _arguments(function: Any, offered: dict[str, Any], max_steps: int) -> dict[str, Any]:
    """What TRL would give, less what a function without **kwargs does not take."""
    state = TrainerState(
        global_step=int(offered["trainer_state"].get("step", 0)), max_steps=max_steps
    )
    given = {**offered, "trainer_state": state}
    parameters = inspect.signature(function).parameters.values()
    named = {one.name for one in parameters if one.kind is not one.VAR_KEYWORD}
    takes_all = any(one.kind is one.VAR_KEYWORD for one in parameters)
    missing = [
        one.name
        for one in parameters
        if one.default is one.empty
        and one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)
        and one.name not in given
    ]
    if missing:
        raise RewardError(
            f"reward '{name_of(function)}' needs '{missing[0]}', which is no column of the data;"
            f" there are {', '.join(sorted(given))}"
        )
    return {
        name: value
        for name, value in given.items()
        if name in named or (takes_all and name not in _HIDDEN)
    }
