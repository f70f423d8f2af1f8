"""Shared-prompt attention by kernels against float64; see test_triton.py for how it is run."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
import torch

from sparring.kernels import capability_of
from sparring.kernels.attention import shared_attention_reference, shared_attention_triton
from sparring.kernels.attention_plan import SharedPlan
from tests.kernels.test_triton import (
    DEVICE,
    HALVES,
    LIMIT,
    _poisoned,
    check,
    error,
    pytestmark,
    random,
)

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


@pytest.mark.parametrize("dtype", [HALVES[0], pytest.param(HALVES[1], marks=SLOW)])
def test_a_shared_prompt_is_as_exact_as_one_that_is_repeated(dtype):
    """Errors against float64 are at most 1.2 times those of a prompt laid down for each child."""
    heads, kv_heads, size = 2, 1, 64
    prompt, children = 70, (33, 1)
    starts = [*accumulate((prompt, *children))]
    shared = SharedPlan((0, *starts), (-1, 0, 0), device=DEVICE, capability=capability_of(DEVICE))
    rows = [torch.cat([torch.arange(prompt), torch.arange(a, b)]) for a, b in pairwise(starts)]
    sizes = [0, *accumulate(map(len, rows))]
    repeated = SharedPlan(sizes, (-1, -1), device=DEVICE, capability=capability_of(DEVICE))
    places = torch.cat(rows).to(DEVICE)
    is_used = torch.ones(len(places), 1, 1, dtype=dtype, device=DEVICE)
    for start in sizes[1:-1]:  # the prompt's own outputs count once
        is_used[start : start + prompt] = 0
    inputs = [
        random(starts[-1], n, size, dtype=dtype, seed=i)
        for i, n in enumerate((heads, kv_heads, kv_heads))
    ]
    dout = random(starts[-1], heads, size, dtype=dtype, seed=9)

    def together(x):
        total = torch.zeros(starts[-1], *x.shape[1:], dtype=torch.float64, device=DEVICE)
        return total.index_add_(0, places, x.double())

    def computed(function, tensors, plan, gradient):
        leaves = [x.detach().clone().requires_grad_() for x in tensors]
        out = function(*leaves, plan)
        return [out, *torch.autograd.grad(out, leaves, gradient)]

    want = computed(shared_attention_reference, [x.double() for x in inputs], shared, dout.double())
    once = computed(shared_attention_triton, inputs, shared, dout)
    out, *gradients = computed(
        shared_attention_triton, [x[places] for x in inputs], repeated, dout[places] * is_used
    )
    each = [together(out * is_used), *map(together, gradients)]
    for name, ours, theirs, exact in zip(("out", "dq", "dk", "dv"), once, each, want, strict=True):
        assert error(ours, exact) <= 1.2 * error(theirs, exact), name
