"""Products of few rows, NF4 and 16-bit, with adapters: on a GPU or in Triton's interpreter.

The interpreter's process is started by tests/kernels/test_processes.py.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sparring.kernels import capability_of, column_order, lora, matmul, nf4, nf4_matmul
from sparring.kernels import low_rank as adapters
from tests.kernels.test_triton import DEVICE, HALVES, INTERPRETED, _poisoned, pytestmark, random

__all__ = ["_poisoned", "pytestmark"]

LIMIT = {torch.bfloat16: 4e-3, torch.float16: 6e-4}


def error(got, want):
    got, want = got.double(), want.double()
    return ((got - want).norm() / want.norm()).item()


def same(got, want):
    """The same bits on a card; the interpreter sums a block at once, so blocks of 128 and of 256
    columns differ there.
    """
    return error(got, want) < LIMIT[got.dtype] if INTERPRETED else torch.equal(got, want)


def low_rank_of(x, num_outputs, rank, dtype):
    """An adapter on the first and the last part of three, B not zero."""
    first, last = num_outputs // 3, num_outputs - num_outputs // 4
    parts = [[0, first, 0, 0], [last, num_outputs, first, rank]]
    b = random(first + num_outputs - last, rank, dtype=dtype, seed=3, scale=0.3)
    a = random(2 * rank, x.shape[1], dtype=dtype, seed=4, scale=0.1)
    xa = lora.lora_shrink_triton(x, a)
    assert error(xa, lora.lora_shrink_reference(x, a)) < LIMIT[dtype]
    table = torch.tensor(parts, dtype=torch.int32, device=DEVICE)
    return adapters.LowRank(xa=xa, b=b, parts=table, scale=0.75)


CASES = [
    (1, 48, 64, True, torch.bfloat16),
    (3, 70, 192, False, torch.float16),
    (33, 40, 320, False, torch.bfloat16),
    (70, 24, 256, True, torch.float16),
]


@pytest.mark.parametrize(("num_rows", "num_outputs", "num_inputs", "double", "dtype"), CASES)
def test_nf4_product_with_adapter_and_bias(num_rows, num_outputs, num_inputs, double, dtype):
    weight = nf4.quantize_nf4(
        random(num_outputs, num_inputs, dtype=dtype, scale=0.1), double=double
    )
    x = random(num_rows, num_inputs, dtype=dtype, seed=1)
    bias = random(num_outputs, dtype=dtype, seed=2)
    low_rank = low_rank_of(x, num_outputs, 8 if double else 5, dtype)
    for given in ((bias, None), (None, low_rank), (bias, low_rank)):
        want = nf4_matmul.nf4_matmul_reference(x, weight, *given)
        got = nf4_matmul.nf4_matmul_triton(x, weight, *given)
        assert error(got, want) < LIMIT[dtype]
        assert torch.equal(got, nf4_matmul.nf4_matmul_triton(x, weight, *given)), "the same twice"
        dense = column_order.in_kernel_order(nf4.dequantize_nf4_reference(weight))
        dense = matmul.matmul_triton(column_order.in_kernel_order(x), dense, *given)
        assert same(got, dense), "decoded before or inside"


@pytest.mark.parametrize("dtype", HALVES)
def test_segments_are_summed_in_order_by_either_form(dtype):
    weight = nf4.quantize_nf4(random(40, 704, dtype=dtype, scale=0.1))
    dense = column_order.in_kernel_order(nf4.dequantize_nf4_reference(weight))
    x, bias = random(35, 704, dtype=dtype, seed=1), random(40, dtype=dtype, seed=2)
    ordered = column_order.in_kernel_order(x)
    low_rank = low_rank_of(x, 40, 8, dtype)
    want = nf4_matmul.nf4_matmul_reference(x, weight, bias, low_rank)
    for segments in (2, 5):
        split = nf4_matmul.launch(x, weight, bias, low_rank, segments=segments)
        assert error(split, want) < LIMIT[dtype]
        for is_chained in (False, True, False):
            other = matmul.launch(
                ordered, dense, bias, low_rank, segments=segments, is_chained=is_chained
            )
            assert same(split, other), "in any form; the counters were left at zero"


@pytest.mark.parametrize("dtype", HALVES)
def test_rows_that_come_in_the_order_of_the_sum(dtype):
    weight = nf4.quantize_nf4(random(40, 512, dtype=dtype, scale=0.1))
    x, bias = random(35, 512, dtype=dtype, seed=1), random(40, dtype=dtype, seed=2)
    ordered = column_order.in_kernel_order(x)
    assert not torch.equal(ordered, x)
    assert torch.equal(column_order.out_of_kernel_order(ordered), x)
    low_rank = low_rank_of(x, 40, 8, dtype)
    for given in ((bias, None), (bias, low_rank)):
        want = nf4_matmul.launch(x, weight, *given)
        assert torch.equal(nf4_matmul.launch(ordered, weight, *given, in_order=True), want)
        want = nf4_matmul.nf4_matmul(x, weight, *given)
        assert torch.equal(nf4_matmul.nf4_matmul(ordered, weight, *given, in_order=True), want)
    one = torch.eye(512, device=DEVICE, dtype=dtype)[300:301]
    row = nf4_matmul.launch(column_order.in_kernel_order(one), weight, in_order=True)
    assert torch.equal(row[0], nf4.dequantize_nf4_reference(weight)[:, 300])


@pytest.mark.parametrize("num_rows", [3] if INTERPRETED else [1, 8, 13, 32, 50, 70, 128])
@pytest.mark.parametrize(("rank", "columns"), [(8, 256)] if INTERPRETED else [(8, 256), (40, 2560)])
def test_rows_in_order_with_an_adapter_whose_parts_are_whole_tiles(num_rows, rank, columns):
    """On sm_90 by kernels/nf4_hopper.py: a part without adapter, a bias, several segments."""
    dtype = torch.bfloat16
    x = random(num_rows, columns, dtype=dtype, seed=1)
    weight = nf4.quantize_nf4(random(384, columns, dtype=dtype, scale=0.1))
    bias, b = random(384, dtype=dtype, seed=2), random(256, rank, dtype=dtype, seed=3, scale=0.3)
    a = random(2 * rank, columns, dtype=dtype, seed=4, scale=0.1)
    parts = torch.tensor([[0, 128, 0, 0], [256, 384, 128, rank]], dtype=torch.int32, device=DEVICE)
    capability = capability_of(DEVICE)

    def adapter(beside):
        xa, scratch = lora.lora_shrink_triton(x, a), None
        if beside:
            xa, scratch = lora.lora_shrink_beside(x, a, capability)
        return adapters.LowRank(xa=xa, b=b, parts=parts, scale=0.75, granule=128, scratch=scratch)

    segments = nf4_matmul.nf4_segments_of(capability, 384, columns)
    want = nf4_matmul.launch(x, weight, bias, adapter(False), segments=segments)
    ordered = column_order.in_kernel_order(x)
    plain = nf4_matmul.launch(x, weight, bias, segments=segments)
    for beside in (False,) if INTERPRETED else (False, True, True):
        low_rank = adapter(beside)
        got = nf4_matmul.nf4_matmul(ordered, weight, bias, low_rank, in_order=True)
        if INTERPRETED:
            assert error(got, want) < LIMIT[dtype]
        else:
            assert torch.equal(got, want)
            assert torch.equal(got[:, 128:256], plain[:, 128:256]), "no adapter there"


def test_tiles_within_one_part():
    x = random(5, 64, dtype=torch.bfloat16)
    weight = nf4.quantize_nf4(random(192, 64, dtype=torch.bfloat16, scale=0.1))
    parts = [[0, 64, 0, 0], [128, 192, 64, 8]]
    low_rank = adapters.LowRank(
        xa=random(5, 16, dtype=torch.bfloat16, seed=1),
        b=random(128, 8, dtype=torch.bfloat16, seed=2),
        parts=torch.tensor(parts, dtype=torch.int32, device=DEVICE),
        scale=0.5,
        granule=64,
    )
    want = nf4_matmul.nf4_matmul_reference(x, weight, None, low_rank)
    for granule in (64, 1):
        given = dataclasses.replace(low_rank, granule=granule)
        got = nf4_matmul.nf4_matmul_triton(x, weight, None, given)
        assert error(got, want) < LIMIT[torch.bfloat16]
        dense = nf4.dequantize_nf4_reference(weight)
        assert error(matmul.matmul_triton(x, dense, None, given), want) < LIMIT[torch.bfloat16]


@pytest.mark.parametrize("dtype", HALVES[:1] if INTERPRETED else HALVES)
def test_a_row_does_not_depend_on_the_others(dtype):
    weight = nf4.quantize_nf4(random(70, 128, dtype=dtype, scale=0.1))
    x = random(50, 128, dtype=dtype, seed=1)
    whole = nf4_matmul.nf4_matmul_triton(x, weight, None, low_rank_of(x, 70, 8, dtype))
    for rows in (slice(0, 1), slice(7, 24), slice(40, 50)):
        part = x[rows]
        got = nf4_matmul.nf4_matmul_triton(part, weight, None, low_rank_of(part, 70, 8, dtype))
        assert torch.equal(got, whole[rows])


def test_many_tiles_of_rows():
    """Enough tiles of x for programs to go through them in groups."""
    tile = matmul.Tile(16, 16, 4, 2)
    x, weight = random(300, 64, dtype=torch.bfloat16), random(40, 64, dtype=torch.bfloat16, seed=1)
    got = matmul.launch(x, weight, tile=tile)
    assert error(got, matmul.matmul_reference(x, weight)) < LIMIT[torch.bfloat16]
    assert same(got, matmul.launch(x, weight))


@pytest.mark.parametrize("dtype", HALVES)
def test_expand_adds_to_what_is_there(dtype):
    x = random(37, 128, dtype=dtype)
    low_rank = low_rank_of(x, 70, 8, dtype)
    y = random(37, 80, dtype=dtype, seed=6)[:, :70]
    want = lora.lora_expand_reference(y.clone(), low_rank)
    assert error(lora.lora_expand_triton(y, low_rank), want) < LIMIT[dtype]
    assert torch.equal(y[:, 24:52], want[:, 24:52]), "rows without an adapter"


def test_what_the_kernel_does_not_take():
    x = random(2, 64, dtype=torch.bfloat16)
    weight = random(4, 128, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="columns must be equal"):
        matmul.matmul_triton(x, weight)
    with pytest.raises(ValueError, match="both bfloat16 or float16"):
        matmul.matmul_triton(x, weight[:, :64].contiguous().half())
    assert matmul.matmul_triton(x[:0], weight[:, :64].contiguous()).shape == (0, 4)


LAYER = {"qkv": (4608, 3584), "down": (3584, 18944), "qwen3 o": (1024, 2048)}


@pytest.mark.skipif(INTERPRETED, reason="large")
@pytest.mark.parametrize("name", LAYER)
def test_bits_of_a_row_at_any_number_of_rows(name):
    """On a card: NF4 and decoded, 1 to 1,000 rows, with an adapter, all the same bits.

    In bfloat16: compiling is what takes time here, and the tests above have both dtypes.
    """
    dtype = torch.bfloat16
    num_outputs, num_inputs = LAYER[name]
    torch.manual_seed(0)

    def random(*shape, dtype, scale=1.0):  # on the card: these are large
        return (torch.randn(shape, device=DEVICE) * scale).to(dtype)

    weight = nf4.quantize_nf4(random(num_outputs, num_inputs, dtype=dtype, scale=0.02))
    dense = nf4.dequantize_nf4(weight)
    assert torch.equal(dense, nf4.dequantize_nf4_reference(weight))
    x, bias = random(1000, num_inputs, dtype=dtype), random(num_outputs, dtype=dtype)
    for product, weights in ((nf4_matmul.nf4_matmul, weight), (matmul.matmul, dense)):
        whole = product(x, weights, bias, low_rank_of(x, num_outputs, 16, dtype))
        reference = low_rank_of(x, num_outputs, 16, dtype)
        assert error(whole, matmul.matmul_reference(x, dense, bias, reference)) < LIMIT[dtype]
        for num_rows in (1, 8, 17, 64, 100, 256, 300, 1000):
            part = x[-num_rows:]
            got = product(part, weights, bias, low_rank_of(part, num_outputs, 16, dtype))
            assert torch.equal(got, whole[-num_rows:]), (num_rows, product)


@pytest.mark.skipif(INTERPRETED, reason="launches that overlap")
@pytest.mark.parametrize("num_rows", [1, 32, 200])
def test_a_shrink_beside_its_product(num_rows):
    """The product starts while x A^T is being made: in a graph, the same bits each time."""
    weight = nf4.quantize_nf4(random(4608, 3584, dtype=torch.bfloat16, scale=0.02))
    capability = capability_of(DEVICE)
    xs = [random(num_rows, 3584, dtype=torch.bfloat16, seed=i) for i in range(8)]
    a = random(48, 3584, dtype=torch.bfloat16, seed=20, scale=0.1)
    b = random(4608, 16, dtype=torch.bfloat16, seed=21, scale=0.3)
    parts = [[0, 3584, 0, 0], [3584, 4096, 3584, 16], [4096, 4608, 4096, 32]]
    given = {
        "b": b,
        "parts": torch.tensor(parts, dtype=torch.int32, device=DEVICE),
        "scale": 1.0,
        "granule": 512,
    }

    def product(x):
        xa, scratch = lora.lora_shrink_beside(x, a, capability)
        low_rank = adapters.LowRank(xa=xa, scratch=scratch, **given)
        return nf4_matmul.launch(x, weight, None, low_rank, capability)

    want = []
    for x in xs:
        low_rank = adapters.LowRank(xa=lora.lora_shrink(x, a, capability), **given)
        want.append(nf4_matmul.launch(x, weight, None, low_rank, capability))
        product(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = [product(x) for x in xs]
    for _ in range(5):
        for y in got:
            y.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(y, w) for y, w in zip(got, want, strict=True))
