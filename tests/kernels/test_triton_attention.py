"""Shared-prompt attention by kernels against float64; see test_triton.py for how it is run."""

from __future__ import annotations

import pytest
import torch

from sparring.kernels import capability_of
from sparring.kernels.attention import shared_attention_reference, shared_attention_triton
from sparring.kernels.attention_plan import SharedPlan
from tests.kernels.test_triton import DEVICE, HALVES, LIMIT, _poisoned, check, pytestmark, random

__all__ = ["_poisoned", "pytestmark"]

# prompt of 37 with three children (one of a single token), two without a parent, another group
CU_SEQLENS = (0, 37, 57, 58, 98, 131, 132, 148, 150, 200)
PARENTS = (-1, 0, 0, 0, -1, -1, -1, 6, 6)


def run(heads, kv_heads, size, dtype, window=0, cu_seqlens=CU_SEQLENS, parents=PARENTS, limit=2.0):
    plan = SharedPlan(cu_seqlens, parents, device=DEVICE, capability=capability_of(DEVICE))
    num_tokens = cu_seqlens[-1]
    inputs = {
        "q": random(num_tokens, heads, size, dtype=dtype),
        "k": random(num_tokens, kv_heads, size, dtype=dtype, seed=1),
        "v": random(num_tokens, kv_heads, size, dtype=dtype, seed=2),
    }
    check(
        lambda q, k, v: shared_attention_triton(q, k, v, plan, window=window),
        lambda q, k, v: shared_attention_reference(q, k, v, plan, window=window),
        inputs,
        limit * LIMIT[dtype],
    )


SLOW = pytest.mark.slow


@pytest.mark.parametrize("dtype", [HALVES[0], pytest.param(HALVES[1], marks=SLOW)])
@pytest.mark.parametrize("size", [pytest.param(n, marks=SLOW) for n in (64, 128, 256)] + [80])
def test_head_sizes(size, dtype):
    run(2, 1, size, dtype)


@pytest.mark.parametrize("group", [pytest.param(n, marks=SLOW) for n in (1, 6, 7, 8)])
def test_query_heads_per_key_head(group):
    run(2 * group if group == 1 else group, 2 if group == 1 else 1, 64, torch.bfloat16)


@pytest.mark.parametrize("window", [33, *(pytest.param(n, marks=SLOW) for n in (2, 5, 60, 500))])
def test_windows(window):
    run(2, 1, 64, torch.float16, window=window, limit=2.5)


@pytest.mark.parametrize(
    ("cu_seqlens", "parents"),
    [((0, 1), (-1,)), ((0, 1, 2), (-1, 0)), ((0, 33, 33, 50), (-1, 0, 0)), ((0, 64, 128), (-1, 0))],
)
def test_small_and_empty_segments(cu_seqlens, parents):
    run(2, 2, 64, torch.bfloat16, cu_seqlens=cu_seqlens, parents=parents)


def test_views_of_a_fused_projection():
    plan = SharedPlan(CU_SEQLENS, PARENTS, device=DEVICE, capability=capability_of(DEVICE))
    fused = random(200, 8, 64, dtype=torch.bfloat16)
    q, k, v = fused.split([4, 2, 2], dim=1)
    out = shared_attention_triton(q, k, v, plan)
    copies = (x.contiguous() for x in (q, k, v))
    assert torch.equal(out, shared_attention_triton(*copies, plan))


@SLOW
def test_a_tokens_result_does_not_depend_on_other_groups():
    x = [random(200, h, 64, dtype=torch.bfloat16, seed=s) for s, h in enumerate((4, 2, 2))]
    whole = SharedPlan(CU_SEQLENS, PARENTS, device=DEVICE, capability=capability_of(DEVICE))
    alone = SharedPlan(CU_SEQLENS[:5], PARENTS[:4], device=DEVICE, capability=capability_of(DEVICE))
    part = shared_attention_triton(*(t[:98] for t in x), alone)
    assert torch.equal(shared_attention_triton(*x, whole)[:98], part)
