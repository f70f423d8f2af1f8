"""How much of a budget keys and values may take beside a model that is loaded already.

For whatever samples without a plan of its own: evaluations, `sparring generate`, conversations. The
budget is `[run] memory`, or all that is free; what a rollout takes beside keys and values is the
plan's own calculation.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from sparring.errors import MemoryBudgetError
from sparring.models.memory import free_bytes
from sparring.models.transformer import Decoder, kv_bytes_per_token
from sparring.rollout.engine import find_kv_dtype, has_kernels
from sparring.train.plan import KV_SHARE, gib, rollout_phase
from sparring.train.plan_job import (
    ADAPTERS,
    CONTEXT_BYTES,
    OPTIMIZER,
    WEIGHTS,
    Job,
    Settings,
    Trained,
    Work,
    trained_as,
)
from sparring.train.plan_rollout import kv_tokens

Memory = int | Literal["auto"]
SHARE_WITHOUT_PLAN = 0.5
"""Of the memory that is left, where activations are not planned: on a CPU, and in float32."""
FEWEST, FEWEST_TOKENS = 0.25, 1024
"""Share of the rows that must fit at full length, otherwise fewer rows leave more for each; and
tokens that a last single row must have."""


def kv_budget(
    model: Decoder,
    *,
    num_rollouts: int,
    prompt_tokens: int,
    max_tokens: int,
    memory: Memory = "auto",
    kv_dtype: Literal["auto", "int8", "fp8"] = "auto",
) -> tuple[int, int]:
    """Bytes for keys and values of `num_rollouts` completions, and how many may run at once.

    prompt_tokens: of a prompt, on average. max_tokens: of the longest prompt with its completion.
    memory: bytes that the process may take, its context included; "auto": what is free now. Raises
    MemoryBudgetError where not even a short completion fits.
    """
    each = kv_bytes_per_token(model.config, find_kv_dtype(model, kv_dtype))
    left = _left(model.device, memory)
    if not has_kernels(model):
        useful = (num_rollouts * max_tokens + 4096) * each
        return min(useful, int(left * SHARE_WITHOUT_PLAN)), num_rollouts
    trained = replace(trained_as(model), kv_dtype=kv_dtype)
    running = num_rollouts
    while True:
        short = min(max(1, prompt_tokens), max_tokens - 1)
        beside = _beside(trained, _work(running, short, max_tokens), model.capability.arch)
        room = int((left - beside) * KV_SHARE)
        useful = kv_tokens(_work(running, max_tokens - 1, max_tokens), running) * each
        least = min(useful, FEWEST_TOKENS * each) if running == 1 else int(FEWEST * useful)
        if room >= least:
            return min(useful, room), running
        if running == 1:
            break
        running //= 2
    raise MemoryBudgetError(
        f"{gib(max(0, room))} are left for keys and values, and {least // each} tokens of one"
        f" completion need {gib(least)}; give more memory, shorten completions"
        " (max_completion_tokens) or take a smaller model"
    )


def _work(num_rollouts: int, prompt_tokens: int, max_tokens: int) -> Work:
    return Work(
        prompts=num_rollouts,
        group_size=1,
        prompt_tokens=prompt_tokens,
        completion_tokens=max_tokens - prompt_tokens,
    )


def _left(device: torch.device, memory: Memory) -> int:
    """Bytes of the budget that nothing is allocated in."""
    free = free_bytes(device)
    if device.type != "cuda":
        return free if memory == "auto" else min(free, memory)
    allocated = torch.cuda.memory_allocated(device)
    free += torch.cuda.memory_reserved(device) - allocated
    return free if memory == "auto" else min(free, memory - CONTEXT_BYTES - allocated)


def _beside(trained: Trained, work: Work, arch: int) -> int:
    """What a rollout takes beside what is there already, keys and values."""
    if trained.is_full:  # an adapter on nothing: no masters, no moments
        trained = replace(trained, rank=1, targets=frozenset())
    settings = Settings(kv_bytes=1, max_running=work.prompts, caches_weights=False)
    phase = rollout_phase(Job(policy=trained, work=work), settings, budget=None, arch=arch)
    there = (WEIGHTS, ADAPTERS, OPTIMIZER)
    return phase.reserved - sum(phase.parts.get(part, 0) for part in there)
