"""Adapters over many rows, alone and in SwiGLU: on a GPU or in Triton's interpreter.

The interpreter's process is started by tests/kernels/test_processes.py.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from sparring.kernels import INTERPRETER, capability_of, lora_rows, lora_swiglu, swiglu
from sparring.models import lora as adapters
from sparring.models.blocks import lora_mlp
from sparring.models.linear import Linear
from sparring.models.lora import LoraConfig
from tests.kernels.test_triton import DEVICE, HALVES, _poisoned, pytestmark, random
from tests.kernels.test_triton_matmul import error

__all__ = ["_poisoned", "pytestmark"]

LIMIT = {torch.bfloat16: 4e-3, torch.float16: 6e-4}
SIZES = [
    (1, (128, 128, 128), 16),
    (33, (256, 128, 384), 16),
    (150, (72, 40, 88), 8),
    (70, (64, 8, 200), 24),
    (65, (128, 256, 128), 64),
    (40, (128, 128, 256), 100),
]
"""Rows, columns of three matrices of which the first and the last are adapted, rank."""


def parts_of(sizes, rank):
    first, between, last = sizes
    total = first + between + last
    spans = ((0, first, 0, 0), (first + between, total, first, rank))
    granule = 128 if all(size % 128 == 0 for size in sizes) else 8
    table = torch.tensor(spans, dtype=torch.int32, device=DEVICE)
    return lora_rows.Parts(spans, table, granule, 2 * rank, first + last)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("num_rows", "sizes", "rank"), SIZES)
def test_shrink_and_addition_by_parts(num_rows, sizes, rank, dtype):
    parts, width = parts_of(sizes, rank), sum(sizes)
    wide = random(num_rows, width + 16, dtype=dtype)[:, :width]  # a view: rows lie further apart
    b = random(parts.num_rows, rank, dtype=dtype, seed=1, scale=rank**-0.5)
    u = lora_rows.shrink_rows_triton(wide, b, parts, 0.75)
    want = lora_rows.shrink_rows_reference(wide.double(), b.double(), parts, 0.75)
    assert error(u, want) < LIMIT[dtype]
    y = random(num_rows, width, dtype=dtype, seed=2)
    added = lora_rows.add_rows_reference(y.double(), u.double(), b.double(), parts, 1.5)
    got = lora_rows.add_rows_triton(y.clone(), u, b, parts, 1.5)
    assert error(got, added) < LIMIT[dtype]
    assert torch.equal(got[:, sizes[0] : -sizes[2]], y[:, sizes[0] : -sizes[2]])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("num_rows", "rank"), [(1, 16), (33, 8), (300, 16), (1100, 100)])
def test_outer_product_by_parts(num_rows, rank, dtype):
    parts = parts_of((128, 256, 384), rank)
    x, u = random(num_rows, 768, dtype=dtype), random(num_rows, 2 * rank, dtype=dtype, seed=1)
    got = lora_rows.outer_rows_triton(x, u, parts, 0.75)
    assert got.dtype == torch.float32
    want = lora_rows.outer_rows_reference(x.double(), u.double(), parts, 0.75)
    assert error(got, want) < 1e-6


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("num_rows", "half", "rank"), [(3, 128, 16), (70, 200, 16), (33, 72, 8)])
def test_swiglu_adds_adapters_with_the_bits_of_separate_additions(num_rows, half, rank, dtype):
    gate_up = random(num_rows, 2 * half, dtype=dtype)
    xa = random(num_rows, 2 * rank, dtype=dtype, seed=1)
    b = random(2 * half, rank, dtype=dtype, seed=2, scale=rank**-0.5)
    t, a = random(num_rows, 32, dtype=dtype, seed=3), random(32, half, dtype=dtype, seed=4)
    dh = random(num_rows, half, dtype=dtype, seed=5)
    spans = ((0, half, 0, 0), (half, 2 * half, half, rank))
    table = torch.tensor(spans, dtype=torch.int32, device=DEVICE)
    whole = lora_rows.add_rows_triton(
        gate_up.clone(), xa, b, lora_rows.Parts(spans, table, half, 2 * rank, 2 * half), 0.7
    )
    h = lora_swiglu.lora_swiglu_triton(gate_up, xa, b, 0.7)
    assert torch.equal(h, swiglu.swiglu_triton(whole))
    wide = [one.double() for one in (gate_up, xa, b)]
    assert error(h, lora_swiglu.lora_swiglu_reference(*wide, 0.7)) < 2 * LIMIT[dtype]

    one = ((0, half, 0, 0),)
    table = torch.tensor(one, dtype=torch.int32, device=DEVICE)
    d_whole = lora_rows.add_rows_triton(
        dh.clone(), t, a.T.contiguous(), lora_rows.Parts(one, table, half, 32, half), 1.0
    )
    swiglu.swiglu_gradients_triton(whole, d_whole)
    grad, hidden = gate_up.clone(), dh.clone()
    lora_swiglu.lora_swiglu_gradients_triton(grad, hidden, xa, b, 0.7, t, a)
    assert torch.equal(hidden, d_whole)
    assert torch.equal(grad, whole)
    wide = [one.double() for one in (gate_up, dh, xa, b)]
    wide_t = t.double(), a.double()
    wide_h = lora_swiglu.lora_swiglu_gradients_reference(*wide, 0.7, *wide_t)
    assert error(hidden, wide_h) < 2 * LIMIT[dtype]
    assert error(grad, wide[0]) < 2 * LIMIT[dtype]


def layer_of(inputs, parts, targets, dtype, seed):
    made = Linear(inputs, parts, bias=False, device=DEVICE, dtype=dtype)
    made.base.weight.data = random(*made.base.shape, dtype=dtype, seed=seed, scale=inputs**-0.5)
    made.requires_grad_(False)
    config = LoraConfig(rank=16, target_modules=targets)
    made.add_adapter("policy", config, config.targets(), torch.Generator().manual_seed(seed))
    for adapter in made.adapters.values():
        adapter.b.data = random(*adapter.b.shape, dtype=torch.float32, seed=seed + 1, scale=0.1)
        adapter.refresh_shadow()
    return made


def merged(layer, leaves):
    weight = layer.base.dense().double()
    if "policy" in layer.adapters:
        lora = layer.adapters["policy"]
        a, b = (matrix.detach().double().requires_grad_() for matrix in lora.matrices_used())
        leaves += [(lora.a, a), (lora.b, b)]
        rows = [torch.zeros_like(weight)]
        for part in lora.parts.values():
            placed = torch.zeros(len(weight), lora.rank, dtype=torch.float64, device=DEVICE)
            placed[part.output_rows] = b[part.b_rows]
            rows.append(lora.scale * placed @ a[part.ranks])
        weight = torch.stack(rows).sum(0) + weight
    return weight


@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")  # autograd's thread, its first call
@pytest.mark.parametrize(
    ("targets", "kernels"),
    [
        (
            ("gate_proj", "up_proj", "down_proj"),
            {"add_rows", "shrink_rows", "outer_rows", "lora_swiglu", "lora_swiglu_gradients"},
        ),
        (("gate_proj", "up_proj"), {"add_rows", "shrink_rows", "outer_rows", "lora_swiglu"}),
        (("up_proj", "down_proj"), {"add_rows"}),
    ],
)
def test_the_feed_forward_runs_through_the_kernels(targets, kernels, monkeypatch):
    """Every gradient against float64, and the same result with and without gradient."""
    launched = set()

    def record(module, name):
        kernel = getattr(module, f"{name}_triton")
        monkeypatch.setattr(
            module, f"{name}_triton", lambda *args: launched.add(name) or kernel(*args)
        )
        monkeypatch.setattr(module, "takes_rows", lambda *_: True)

    for name in ("add_rows", "shrink_rows", "outer_rows"):
        record(lora_rows, name)
    for name in ("lora_swiglu", "lora_swiglu_gradients"):
        record(lora_swiglu, name)
    monkeypatch.setattr(adapters, "takes_rows", lambda *_: True)
    dtype = torch.bfloat16
    gate_up = layer_of(64, {"gate_proj": 256, "up_proj": 256}, targets, dtype, 1)
    down = layer_of(256, {"down_proj": 128}, targets, dtype, 3)
    x = random(37, 64, dtype=dtype, seed=9).requires_grad_()
    grad = random(37, 128, dtype=dtype, seed=8)
    blocks = gate_up.frozen("policy"), down.frozen("policy")
    y = lora_mlp(x, *blocks)
    y.backward(grad)
    with torch.no_grad():
        assert torch.equal(lora_mlp(x, *blocks), y)
    leaves = [(x, x.detach().double().requires_grad_())]
    first, last = merged(gate_up, leaves), merged(down, leaves)
    gate, up = (leaves[0][1] @ first.T).chunk(2, dim=1)
    want = (F.silu(gate) * up) @ last.T
    want.backward(grad.double())
    assert error(y, want) < 1e-2
    for got, wide in leaves:
        assert error(got.grad, wide.grad) < 1.5e-2
    assert launched == kernels


def test_cards_without_dots_and_high_ranks_take_the_library():
    x, capability = random(8, 16, dtype=torch.float16), capability_of(DEVICE)
    assert not lora_rows.takes_rows(x, 16, INTERPRETER)
    assert lora_rows.takes_rows(x, 128, capability) == x.is_cuda
    assert not lora_rows.takes_rows(x, 129, capability)
    assert not lora_rows.takes_rows(x.float(), 16, capability)
