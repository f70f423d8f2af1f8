"""Every Triton kernel against float64, on a GPU or in Triton's interpreter.

In an ordinary process these tests are marked gpu; with TRITON_INTERPRET=1 they run on the CPU
(tests/kernels/test_processes.py starts that process).
"""

from __future__ import annotations

import os

import pytest
import torch

from sparring.kernels import capability_of, embedding, head, int8, nf4, norm, rope, swiglu
from sparring.kernels.column_order import Written, in_kernel_order
from sparring.kernels.few_rows import overlaps

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
pytestmark = (
    []
    if INTERPRETED
    else [
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU or the interpreter"),
    ]
)
HALVES = [torch.bfloat16, torch.float16]
LIMIT = {torch.bfloat16: 5e-3, torch.float16: 8e-4, torch.float32: 5e-6}


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """What kernels allocate starts as NaN, so that an element nobody wrote shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(
        torch, "empty_like", lambda x, **kw: poisoned(x.shape, dtype=x.dtype, device=x.device)
    )


def random(*shape, dtype, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(dtype).to(DEVICE)


def error(got, want):
    got, want = got.detach().double(), want.detach().double()
    return ((got - want).norm() / want.norm().clamp_min(1e-2)).item()  # some gradients are 0


def check(function, reference, inputs, limit, grads=None):
    """Outputs and the gradient of every floating input by name, and the same bits twice."""
    runs = []
    for _ in range(2):
        leaves = {n: x.detach().clone().requires_grad_() for n, x in inputs.items()}
        outputs = function(**leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        grads = grads or [
            random(*o.shape, dtype=o.dtype, seed=9 + i) for i, o in enumerate(outputs)
        ]
        used = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
        torch.autograd.backward([o for o, _ in used], [g for _, g in used])
        runs.append((outputs, {n: x.grad for n, x in leaves.items()}))
    wide = {n: x.detach().double().requires_grad_() for n, x in inputs.items()}
    wanted = reference(**wide)
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    used = [(o, g.double()) for o, g in zip(wanted, grads, strict=True) if o.requires_grad]
    torch.autograd.backward([o for o, _ in used], [g for _, g in used])
    for i, (got, again, want) in enumerate(zip(runs[0][0], runs[1][0], wanted, strict=True)):
        assert torch.equal(got, again), f"output {i} differs between two calls"
        assert error(got, want) < limit, f"output {i}: {error(got, want)}"
    for name, x in wide.items():
        assert torch.equal(runs[0][1][name], runs[1][1][name]), f"gradient of {name} differs"
        assert error(runs[0][1][name], x.grad) < limit, f"{name}: {error(runs[0][1][name], x.grad)}"


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("shape", [(3, 64), (130, 80), (5, 3, 128), (2, 1536), (1, 3584)])
def test_rms_norm(shape, dtype):
    inputs = {
        "x": random(*shape, dtype=dtype),
        "weight": random(shape[-1], dtype=dtype, seed=1),
    }
    check(
        lambda x, weight: norm.rms_norm_triton(x, weight, 1e-6),
        lambda x, weight: norm.rms_norm_reference(x, weight, 1e-6),
        inputs,
        LIMIT[dtype],
    )


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(3, 64), (33, 200)])
def test_add_rms_norm(shape, dtype):
    inputs = {
        "x": random(*shape, dtype=dtype),
        "residual": random(*shape, dtype=dtype, seed=2),
        "weight": random(shape[-1], dtype=dtype, seed=1),
    }
    check(
        lambda **kw: norm.add_rms_norm_triton(**kw, eps=1e-5),
        lambda **kw: norm.add_rms_norm_reference(**kw, eps=1e-5),
        inputs,
        LIMIT[dtype],
    )


def test_norm_of_a_view_with_a_frozen_weight():
    fused = random(6, 9, 64, dtype=torch.bfloat16)
    x = fused[:, 2:5].detach().requires_grad_()
    weight = random(64, dtype=torch.bfloat16, seed=1)
    y = norm.rms_norm_triton(x, weight, 1e-6)
    assert torch.equal(y, norm.rms_norm_triton(x.detach().contiguous(), weight, 1e-6))
    y.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("size", [64, 80, 128, 256])
@pytest.mark.parametrize("heads", [1, 7])
def test_rope(heads, size, dtype):
    angles = random(5, size // 2, dtype=torch.float32, seed=4)
    cos, sin = angles.cos(), angles.sin()
    check(
        lambda x: rope.rope_triton(x, cos, sin),
        lambda x: rope.rope_reference(x, cos, sin),
        {"x": random(5, heads, size, dtype=dtype)},
        LIMIT[dtype],
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (7, 1, 2)])
def test_heads_are_split_and_rotated_with_the_bits_of_two_steps(sizes, dtype):
    heads = random(5, sum(sizes), 80, dtype=dtype)
    angles = random(5, 40, dtype=torch.float32, seed=4)
    cos, sin = angles.cos(), angles.sin()
    grads = [random(5, n, 80, dtype=dtype, seed=n + i) for i, n in enumerate(sizes)]

    def both_ways(three, x):
        leaf = x.clone().requires_grad_()
        outputs = three(leaf.view_as(leaf))
        torch.autograd.backward(outputs, [g.to(x.dtype) for g in grads])
        return *outputs, leaf.grad

    def two_steps(x):
        q, k, v = torch.split(x, sizes, dim=1)
        return rope.rope_triton(q, cos, sin), rope.rope_triton(k, cos, sin), v

    got = both_ways(lambda x: rope.rotated_heads_triton(x, cos, sin, sizes[:2]), heads)
    for one, want in zip(got, both_ways(two_steps, heads), strict=True):
        assert torch.equal(one, want)
    wide = both_ways(lambda x: rope.rotated_heads_reference(x, cos, sin, sizes[:2]), heads.double())
    for one, want in zip(got, wide, strict=True):
        assert (one.double() - want).norm() < LIMIT[dtype] * want.norm()
    with torch.no_grad():
        without = rope.rotated_heads_triton(heads, cos, sin, sizes[:2])
        for one, want in zip(without, got[:3], strict=True):
            assert torch.equal(one, want)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("width", [16, 300, 2050])
def test_swiglu(width, dtype):
    check(
        lambda x: swiglu.swiglu_triton(x),
        lambda x: swiglu.swiglu_reference(x),
        {"x": random(3, 2 * width, dtype=dtype, scale=3.0)},
        LIMIT[dtype],
    )


def test_swiglu_writes_its_gradient_over_the_input():
    x = random(4, 600, dtype=torch.bfloat16)
    grad = random(4, 300, dtype=torch.bfloat16, seed=5)
    apart = x.clone().requires_grad_()
    swiglu.swiglu_triton(apart).backward(grad)
    leaf = x.clone().requires_grad_()
    over = leaf * 1
    swiglu.swiglu_triton(over, overwrite=True).backward(grad)
    assert torch.equal(leaf.grad, apart.grad)
    assert torch.equal(over.detach(), apart.grad)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("width", [24, 1500])
def test_swiglu_gradients_in_place(width, dtype):
    x, grad = random(5, 2 * width, dtype=dtype), random(5, width, dtype=dtype, seed=5)
    leaf = x.clone().requires_grad_()
    hidden = swiglu.swiglu_triton(leaf)
    hidden.backward(grad)
    over, place = x.clone(), grad.clone()
    assert torch.equal(swiglu.swiglu_gradients_triton(over, place), hidden)
    assert torch.equal(place, hidden)
    assert torch.equal(over, leaf.grad)
    over, place = x.double(), grad.double()
    assert error(hidden, swiglu.swiglu_gradients_reference(over, place)) < LIMIT[dtype]
    assert error(leaf.grad, over) < LIMIT[dtype]


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("vocabulary", [37, 4096, 5003])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_frozen_head(vocabulary, temperature, dtype):
    weight = random(vocabulary, 64, dtype=dtype, seed=1, scale=0.3)
    labels = torch.randint(vocabulary, (9,), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    knobs = {"labels_M": labels, "temperature": temperature, "chunk_rows": 4}
    check(
        lambda x: head.linear_logprob_triton(x, weight, **knobs),
        lambda x: head.linear_logprob_reference(x, weight.double(), **knobs),
        {"x": random(9, 64, dtype=dtype)},
        LIMIT[dtype],
    )


@pytest.mark.parametrize("vocabulary", [17, 4097])
def test_head_of_one_row_and_of_none(vocabulary):
    weight = random(vocabulary, 64, dtype=torch.bfloat16, seed=1, scale=0.3)
    labels = torch.tensor([vocabulary - 1], device=DEVICE)
    check(
        lambda x: head.linear_logprob_triton(x, weight, labels),
        lambda x: head.linear_logprob_reference(x, weight.double(), labels),
        {"x": random(1, 64, dtype=torch.bfloat16)},
        LIMIT[torch.bfloat16],
    )
    none = random(0, 64, dtype=torch.bfloat16).requires_grad_()
    logprobs, entropy = head.linear_logprob_triton(none, weight, labels[:0])
    logprobs.sum().backward()
    assert (logprobs.shape, entropy.shape, none.grad.shape) == ((0,), (0,), (0, 64))


@pytest.mark.parametrize(
    ("shape", "warps"), [((150, 3, 64), 4), ((150, 3, 64), 2112), ((70, 2048), 2112)]
)
def test_a_weight_of_norms_is_summed_over_few_and_many_programs(shape, warps, monkeypatch):
    for name in ("WEIGHT_WARPS", "SHORT_WEIGHT_WARPS"):
        monkeypatch.setattr(norm, name, warps)
    inputs = {
        "x": random(*shape, dtype=torch.bfloat16),
        "residual": random(*shape, dtype=torch.bfloat16, seed=2),
        "weight": random(shape[-1], dtype=torch.bfloat16, seed=1),
    }
    check(
        lambda **kw: norm.add_rms_norm_triton(**kw, eps=1e-6),
        lambda **kw: norm.add_rms_norm_reference(**kw, eps=1e-6),
        inputs,
        LIMIT[torch.bfloat16],
    )


def test_rows_of_norms_have_the_same_gradient_with_a_trained_and_a_frozen_weight():
    x = random(70, 3, 128, dtype=torch.bfloat16)[:, 1:].detach()
    grad = random(70, 2, 128, dtype=torch.bfloat16, seed=3)
    found = []
    for needs_weight in (False, True):
        weight = random(128, dtype=torch.bfloat16, seed=1).requires_grad_(needs_weight)
        leaf = x.requires_grad_()
        leaf.grad = None
        norm.rms_norm_triton(leaf, weight, 1e-6).backward(grad)
        found.append(leaf.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", HALVES)
def test_trained_head(dtype):
    labels = torch.tensor([0, 3, 500, 3, 77], device=DEVICE)
    check(
        lambda x, weight: head.linear_logprob_triton(x, weight, labels, chunk_rows=2),
        lambda x, weight: head.linear_logprob_reference(x, weight, labels, chunk_rows=2),
        {
            "x": random(5, 64, dtype=dtype),
            "weight": random(501, 64, dtype=dtype, seed=1, scale=0.3),
        },
        2 * LIMIT[dtype],
    )


def test_logits_of_minus_infinity_and_one_certain_token():
    x = torch.zeros(2, 16, device=DEVICE)
    x[:, 0] = 1.0
    weight = torch.zeros(40, 16, device=DEVICE)
    weight[:, 0] = -1000.0
    weight[3, 0] = 1000.0
    logprobs, entropy = head.linear_logprob_triton(x, weight, torch.tensor([3, 3], device=DEVICE))
    assert logprobs.tolist() == [0.0, 0.0]
    assert entropy.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("shape", [(3, 64), (70, 128), (130, 576)])
def test_dequantize_nf4_bits(shape, dtype, double):
    weight = random(*shape, dtype=dtype, scale=0.02)
    weight[1] = 0
    weight[2, 5] = 7
    matrix = nf4.quantize_nf4(weight, double=double)
    for out in (torch.bfloat16, torch.float16, torch.float32):
        want = nf4.dequantize_nf4_reference(matrix, dtype=out)
        assert torch.equal(nf4.dequantize_nf4_triton(matrix, dtype=out), want)
        rows = slice(1, shape[0] - 1)
        assert torch.equal(nf4.dequantize_nf4_triton(matrix, dtype=out, rows=rows), want[rows])
    columns = slice(64, 320) if shape[1] > 320 else slice(0, 64)
    part = nf4.dequantize_nf4_triton(matrix, dtype=out, rows=rows, columns=columns)
    assert torch.equal(part, want[rows, columns])


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("shape", [(3, 64), (70, 1100)])
def test_dequantize_int8_bits(shape, dtype):
    weight = random(*shape, dtype=dtype, scale=0.02)
    weight[1] = 0
    matrix = int8.quantize_int8(weight)
    want = int8.dequantize_int8_reference(matrix)
    assert torch.equal(int8.dequantize_int8_triton(matrix), want)
    rows = slice(1, shape[0] - 1)
    assert torch.equal(int8.dequantize_int8_triton(matrix, rows=rows), want[rows])
    assert not want[1].any()
    error_of_a_weight = (want.double() - weight.double()).abs().amax(dim=1)
    assert (error_of_a_weight <= 0.51 * matrix.scale.double() + 0.004 * want.abs().amax(1)).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_frozen_head_in_8_bits(dtype, monkeypatch):
    matrix = int8.quantize_int8(random(501, 64, dtype=dtype, seed=1, scale=0.3))
    monkeypatch.setattr(int8, "SLICE_BYTES", 64 * 2 * 160)  # several pieces
    decoded = int8.dequantize_int8_reference(matrix)
    labels = torch.tensor([0, 3, 500, 3, 77], device=DEVICE)
    check(
        lambda x: head.linear_logprob_triton(x, matrix, labels, chunk_rows=2),
        lambda x: head.linear_logprob_reference(x, decoded.double(), labels),
        {"x": random(5, 64, dtype=dtype)},
        LIMIT[dtype],
    )


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("width", [48, 1500])
def test_rows_of_a_table_on_the_host(width, dtype):
    table = random(9, width, dtype=dtype).cpu()
    table = table if INTERPRETED else table.pin_memory()
    ids = torch.tensor([8, 0, 3, 3, 7], device=DEVICE)
    assert torch.equal(
        embedding.host_rows_triton(table, ids), embedding.host_rows_reference(table, ids)
    )
    assert embedding.host_rows_triton(table, ids[:0]).shape == (0, width)


@pytest.mark.parametrize("width", [256, 768])
def test_norm_and_swiglu_in_the_order_of_an_nf4_product(width):
    x = random(5, width, dtype=torch.bfloat16)
    residual = random(5, width, dtype=torch.bfloat16, seed=1)
    weight = random(width, dtype=torch.bfloat16, seed=2)
    gate_up = torch.cat([x, residual], dim=1)
    early = overlaps(capability_of(DEVICE))
    with torch.no_grad():
        plain = norm.rms_norm_triton(x, weight, 1e-6)
        added, summed = norm.add_rms_norm_triton(x, residual, weight, 1e-6)
        gated = swiglu.swiglu_triton(gate_up)
        for both, begins in ((False, False), (True, False), (False, early), (True, early)):
            way = Written(in_order=True, both=both, early=begins)
            assert torch.equal(norm.rms_norm_triton(x, weight, 1e-6, written=way), way.of(plain))
            got, same = norm.add_rms_norm_triton(x, residual, weight, 1e-6, written=way)
            assert torch.equal(got, way.of(added))
            assert torch.equal(same, summed)
            assert torch.equal(swiglu.swiglu_triton(gate_up, written=way), way.of(gated))
            want = swiglu.swiglu(gate_up)
            assert torch.equal(swiglu.swiglu(gate_up, written=way), way.of(want))
    ordered = in_kernel_order(plain)
    assert torch.equal(Written(in_order=True).of(plain), ordered)
    assert torch.equal(Written(in_order=True, both=True).of(plain), torch.stack([ordered, plain]))
