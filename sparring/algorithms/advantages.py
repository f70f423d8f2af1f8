"""Advantages: how much better a completion did than its baseline. Pure functions of rewards.

`__all__` is the registry: each name is an `[advantage]` name of the recipe, and a function's
keyword-only parameters are its knobs. All take the groups of one optimizer step and return one
float32 [G] tensor a group; they compute in float64. A reward that is NaN or infinite was not
judged: it is left out of every mean and standard deviation and its advantage is 0. Where a
baseline needs others to compare with (all but `none`), a group with fewer than two judged samples
has advantage 0 throughout. Nothing here drops a group; `judged_counts` and `has_signal` tell the
caller which to drop and which to count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparring.types import Group

__all__ = ["batch", "group", "leave_one_out", "mean", "none"]


def group(groups: Sequence[Group], *, epsilon: float = 1e-4) -> list[Tensor]:
    """(R - mean) / (std + epsilon) within the group, std with n - 1 (GRPO, arXiv 2402.03300)."""
    return [_centred(one, scale=lambda rewards: float(rewards.std()) + epsilon) for one in groups]


def mean(groups: Sequence[Group]) -> list[Tensor]:
    """R - mean of the group (Dr. GRPO, arXiv 2503.20783).

    Without the division very easy and very hard prompts get no extra weight.
    """
    return [_centred(one, scale=lambda _: 1.0) for one in groups]


def batch(groups: Sequence[Group], *, epsilon: float = 1e-4) -> list[Tensor]:
    """(R - mean of the group) / (std of the step's judged samples + epsilon); arXiv 2508.08221."""
    judged = [one.rewards_G[is_judged(one)].double() for one in groups]
    everything = torch.cat(judged) if judged else torch.zeros(0, dtype=torch.float64)
    scale = (float(everything.std()) if everything.numel() > 1 else 0.0) + epsilon
    return [_centred(one, scale=lambda _: scale) for one in groups]


def leave_one_out(groups: Sequence[Group]) -> list[Tensor]:
    """R minus the mean of the group's other judged samples (RLOO's baseline, arXiv 2402.14740)."""
    return [_centred(one, scale=lambda rewards: 1.0 - 1.0 / rewards.numel()) for one in groups]


def none(groups: Sequence[Group]) -> list[Tensor]:
    """R itself, without a baseline; a single judged sample is enough."""
    return [torch.where(is_judged(one), one.rewards_G, 0.0).float() for one in groups]


def is_judged(one: Group) -> Tensor:
    """[G] bool: which samples have a finite reward."""
    return one.rewards_G.isfinite()


def judged_counts(groups: Sequence[Group]) -> list[int]:
    """Per group the number of judged samples."""
    return [int(is_judged(one).sum()) for one in groups]


def min_judged(advantage: Callable[..., list[Tensor]]) -> int:
    """How many judged samples a group needs under this advantage: 1 for `none`, else 2.

    Groups below it carry nothing to learn from and are to be dropped and counted.
    """
    return 1 if advantage is none else 2


def has_signal(one: Group) -> bool:
    """Whether the group has two judged samples with different rewards."""
    rewards = one.rewards_G[is_judged(one)]
    return bool(rewards.numel() > 1 and (rewards != rewards[0]).any())


def _centred(one: Group, *, scale: Callable[[Tensor], float]) -> Tensor:
    """(R - mean) / scale(judged rewards); exactly 0 where the judged rewards are all the same."""
    judged = is_judged(one)
    advantages = torch.zeros(one.rewards_G.shape, dtype=torch.float64)
    if has_signal(one):
        rewards = one.rewards_G[judged].double()
        advantages[judged] = (rewards - rewards.mean()) / scale(rewards)
    return advantages.float()
