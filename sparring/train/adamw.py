"""AdamW's update rules by name, and their state as tensors: PyTorch's, and one with 8-bit moments.

"adamw" is torch's own, fused. "adamw_8bit" is bitsandbytes' (arXiv 2110.02861): both moments in 8
bits with a float32 scale per 256 values, which takes 2.03 bytes a parameter in place of 8; moments
of parameters with fewer than 4,096 values stay in float32. Schedules, clipping and masters are not
here (optimizer.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from sparring.errors import CheckpointError, RecipeError

RULES = ("adamw", "adamw_8bit")

_CONSTANTS = ("qmap1", "qmap2")
"""Of 8-bit moments: the same 256 values everywhere, not state."""


def build_rule(
    name: str,
    groups: list[dict[str, Any]],
    *,
    learning_rate: float,
    betas: tuple[float, float],
    epsilon: float,
) -> torch.optim.Optimizer:
    """The update rule over groups of masters, each with its own weight_decay.

    Raises RecipeError for an unknown name, and where bitsandbytes or its device is missing.
    """
    if name not in RULES:
        raise RecipeError(f"[optimizer] name '{name}' is not known; known: {', '.join(RULES)}")
    devices = {master.device.type for group in groups for master in group["params"]}
    arguments: dict[str, Any] = {"lr": learning_rate, "betas": betas, "eps": epsilon}
    if name == "adamw":
        return torch.optim.AdamW(groups, fused=devices <= {"cpu", "cuda"}, **arguments)
    if not devices <= {"cpu", "cuda"}:
        raise RecipeError(
            f"[optimizer] name 'adamw_8bit' runs on cuda and cpu, not on {', '.join(devices)};"
            " take name = 'adamw'"
        )
    try:
        library: Any = import_module("bitsandbytes.optim")
    except ImportError as error:
        raise RecipeError(
            f"[optimizer] name 'adamw_8bit' needs bitsandbytes, which cannot be imported ({error});"
            " install it (pip install 'bitsandbytes>=0.50'), or take name = 'adamw'"
        ) from error
    rule: torch.optim.Optimizer = library.AdamW8bit(groups, **arguments)
    return rule


def moments(rule: torch.optim.Optimizer, master: Tensor) -> dict[str, Tensor]:
    """The state of one master by kind, its update count as a tensor; empty before an update."""
    return {
        kind: value.detach() if isinstance(value, Tensor) else torch.tensor(float(value))
        for kind, value in rule.state.get(master, {}).items()
        if kind not in _CONSTANTS
    }


def allocate_moments(rule: torch.optim.Optimizer, master: Tensor) -> None:
    """Take the memory of a master's state now, as a first update would: zeros."""
    if isinstance(rule, torch.optim.AdamW):
        state = {kind: torch.zeros_like(value) for kind, value in _empty_torch(master).items()}
    else:
        state = _empty_8bit(rule, master)
    rule.state[master] = state


def load_moments(
    rule: torch.optim.Optimizer, master: Tensor, name: str, tensors: Mapping[str, Tensor]
) -> set[str]:
    """Take over what `moments` gave, saved as "<kind>/<name>"; returns the keys that were read.

    A master without saved moments keeps its own. Raises CheckpointError where one is missing or of
    another shape or kind.
    """
    is_torch = isinstance(rule, torch.optim.AdamW)
    if ("exp_avg/" if is_torch else "state1/") + name not in tensors:
        return set()
    empty = _empty_torch(master) if is_torch else _empty_8bit(rule, master)
    keys = {kind: f"{kind}/{name}" for kind in empty if kind not in _CONSTANTS}
    for kind, key in keys.items():
        like = empty[kind]
        if isinstance(like, Tensor):
            empty[kind] = fitting(tensors, key, like)
        else:
            empty[kind] = int(fitting(tensors, key, torch.zeros(())))
    rule.state[master] = empty
    return set(keys.values())


def _empty_torch(master: Tensor) -> dict[str, Any]:
    step = torch.zeros((), device=master.device)
    return {"step": step, "exp_avg": master.detach(), "exp_avg_sq": master.detach()}


def _empty_8bit(rule: Any, master: Tensor) -> dict[str, Any]:
    """What bitsandbytes itself begins this master's state with."""
    for group_index, group in enumerate(rule.param_groups):
        for index, parameter in enumerate(group["params"]):
            if parameter is master:
                rule.check_overrides()
                rule.init_state(group, master, group_index, index)
                return dict(rule.state[master])
    raise AssertionError("a master is in one of the groups")


def fitting(tensors: Mapping[str, Tensor], key: str, like: Tensor) -> Tensor:
    """A copy of the tensor on like's device, in its dtype; CheckpointError if it is not there."""
    if key not in tensors:
        raise CheckpointError(f"the optimizer's state has no '{key}'; the checkpoint is incomplete")
    if tensors[key].shape != like.shape:
        raise CheckpointError(
            f"the optimizer's state '{key}' has the shape {list(tensors[key].shape)},"
            f" this model needs {list(like.shape)}"
        )
    return tensors[key].to(device=like.device, dtype=like.dtype, copy=True)
