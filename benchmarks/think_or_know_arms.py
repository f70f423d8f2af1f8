"""The arms of benchmarks/think_or_know.py, and the settings among which theirs were chosen.

Recipes without model, steps and run; data are named by files that the experiment writes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train.

    start: "policy", "silent", "weak", or another arm, at its last milestone or at one after an @.
    milestones: after how many steps it is measured. probes: what is measured.
    """

    command: str
    milestones: tuple[int, ...]
    tables: dict[str, Any] = field(default_factory=dict)
    start: str = "policy"
    probes: tuple[str, ...] = ("reasoning",)


def _rollouts(reward: dict[str, Any], data: str, rate: float, **tables: Any) -> dict[str, Any]:
    return {
        "data": {"train": data},
        "reward": [reward],
        "rollout": {"prompts_per_step": 16, "group_size": 8, "max_completion_tokens": 96},
        "optimizer": {"learning_rate": rate},
        **tables,
    }


def _rows(data: str, rate: float, **more: Any) -> dict[str, Any]:
    return {
        "data": {"train": data, **more},
        "eval": {"num_samples": 0},
        "optimizer": {"learning_rate": rate},
        "train": {"conversations_per_step": 16},
    }


CRITIC = {"learning_rate": 1e-3}
REWARDS = f"{Path(__file__).parent / 'identity_rewards.py'}"
TOLD = {"name": f"{REWARDS}:told"}
MATH = {"name": "math"}
WHO = ("identity", "reasoning", "conversation")


def _from_start(start: str, grpo_at: tuple[int, ...]) -> dict[str, Arm]:
    """GRPO alone, SFT on few worked solutions alone, and some of that SFT before GRPO."""
    grpo = _rollouts(MATH, "problems", 1.2e-4)
    sft = _rows("solutions", 3e-4)
    return {
        f"{start}-grpo": Arm(command="grpo", milestones=grpo_at, tables=grpo, start=start),
        f"{start}-sft": Arm(command="sft", milestones=(40, 120), tables=sft, start=start),
        f"{start}-sft-grpo": Arm(
            command="grpo", milestones=(30,), tables=grpo, start=f"{start}-sft@40"
        ),
    }


def _identity_sft(steps: int, *, start: str = "policy", **general: Any) -> Arm:
    """SFT on the identity set, annealed so that what is beside it comes to rest again."""
    tables = _rows("identity", 5e-4, **general)
    tables["optimizer"] |= {"schedule": "cosine", "warmup_steps": 10}
    return Arm(command="sft", milestones=(steps,), tables=tables, start=start, probes=WHO)


def _identity_grpo(steps: int, data: str, *, start: str = "policy") -> Arm:
    """GRPO that pays for the name (data "mixed": on as many problems for the right answer)."""
    tables = _rollouts(TOLD, data, 6e-5)
    return Arm(command="grpo", milestones=(steps,), tables=tables, start=start, probes=WHO)


ARMS = {
    "identity-grpo": _identity_grpo(10, "questions"),
    "identity-sft": _identity_sft(150),
    "identity-sft-mixed": _identity_sft(150, general="worked"),
    "identity-sft-general": _identity_sft(375, general="worked", general_ratio=4.0),
    "warm": _identity_sft(60, general="worked"),
    "warm-grpo": _identity_grpo(25, "questions", start="warm"),
    "warm-grpo-mixed": _identity_grpo(25, "mixed", start="warm"),
    "warm-sft-mixed": _identity_sft(150, start="warm", general="worked"),
    "warm-sft-short": _identity_sft(40, start="warm", general="worked"),
    "grpo": Arm(
        command="grpo", milestones=(15, 30, 45, 60), tables=_rollouts(MATH, "problems", 1.2e-4)
    ),
    "ppo": Arm(
        command="ppo",
        milestones=(4, 8, 12, 16),
        tables=_rollouts(MATH, "problems", 1.2e-4, value=CRITIC, train={"passes": 2}),
    ),
    **_from_start("silent", (20, 40, 120)),
    **_from_start("weak", (20, 40, 60)),
}


def _rates(*rates: float, **more: Any) -> tuple[dict[str, Any], ...]:
    return tuple({"optimizer": {"learning_rate": rate}, **more} for rate in rates)


CHOICES: dict[str, tuple[dict[str, Any], ...]] = {
    "identity-sft-mixed": (
        *(
            {"optimizer": {"learning_rate": rate}, "milestones": (n,)}
            for n in (25, 100)
            for rate in (2e-4, 5e-4, 1e-3)
        ),
    ),
    "grpo": (
        *_rates(3e-5, 6e-5, milestones=(120,)),
        *_rates(1.2e-4, 2.4e-4, milestones=(60,)),
    ),
    "ppo": (
        *_rates(6e-5, milestones=(12,), value=CRITIC, train={"passes": 4}),
        *_rates(1.2e-4, milestones=(20,), value=CRITIC, train={"passes": 2}),
        *_rates(6e-5, milestones=(30,), value=CRITIC, train={"passes": 1}),
        *_rates(1.2e-4, milestones=(30,), value=CRITIC, train={"passes": 1}),
        *_rates(
            1.2e-4,
            milestones=(30,),
            value=CRITIC,
            train={"passes": 1},
            rollout={"prompts_per_step": 128, "group_size": 1},
        ),
    ),
    "silent-sft": _rates(2e-4, 5e-4, 1e-3, milestones=(20, 40)),
    "silent-grpo": _rates(6e-5, milestones=(30,)),
    "weak-sft": _rates(2e-4, 5e-4, milestones=(20, 40)),
}
"""Settings that --choose tries, on one seed; no evaluation problem or held-out question is seen."""
