"""Attention over blocks by kernels against float64; see test_triton.py for how it is run."""

from __future__ import annotations

import pytest
import torch

from sparring.kernels import capability_for, capability_of, paged_attention
from sparring.kernels.column_order import AS_THEY_ARE, Written, in_kernel_order
from sparring.kernels.norm import rms_norm_triton
from sparring.kernels.paged_attention import (
    paged_decode_reference,
    paged_decode_triton,
    read_slots,
    rotate_decode_triton,
)
from sparring.kernels.paged_plan import DecodeWorkspace, PrefillTiles, split_of, swaps_splits
from sparring.kernels.paged_prefill import paged_prefill_reference, paged_prefill_triton
from sparring.kernels.rope import rope_reference, rope_triton
from sparring.kernels.rotate_write import rotate_write_reference, rotate_write_triton
from sparring.layout import KVPool, PagedLayout
from sparring.models.attention_paged_kernel import PagedKernelPlan
from tests.kernels.test_triton import (
    DEVICE,
    HALVES,
    INTERPRETED,
    LIMIT,
    _poisoned,
    error,
    pytestmark,
    random,
)

__all__ = ["_poisoned", "pytestmark"]

CAN_RUN = DEVICE.type == "cpu" or torch.cuda.is_available()
CAPABILITY = capability_of(DEVICE) if CAN_RUN else capability_for(90)
SPLIT = split_of(CAPABILITY, 128)["SPLIT"]
SLOW = pytest.mark.slow


def paged(lengths, kv_heads, size, block_size, dtype, layers=2, spare=3):
    """A pool whose unused slots are NaN, and int32 tables of rows of the given lengths."""
    counts = [-(-length // block_size) for length in lengths]
    num_blocks = 1 + sum(counts) + spare
    shape = (layers, num_blocks, 2, kv_heads, block_size, size)
    data = random(*shape, dtype=dtype, seed=5)
    generator = torch.Generator().manual_seed(6)
    free = iter((torch.randperm(num_blocks - 1, generator=generator) + 1).tolist())
    tables = torch.zeros(len(lengths), max(1, *counts) + 1, dtype=torch.int32)
    used = torch.zeros(num_blocks, block_size, dtype=torch.bool)
    for row, length in enumerate(lengths):
        for i in range(counts[row]):
            tables[row, i] = block = next(free)
            used[block, : min(block_size, length - i * block_size)] = True
    unused = ~used[None, :, None, None, :, None].to(DEVICE)
    data.masked_fill_(unused, float("nan"))
    address = torch.tensor([data.data_ptr()], device=DEVICE)
    return KVPool(data=data, address=address), tables.to(DEVICE)


def wide(pool: KVPool) -> KVPool:
    return KVPool(data=pool.data.double())


LENGTHS = (1, 0, 17, SPLIT, SPLIT + 1, 4 * SPLIT + 1)


def run_decode(heads, kv_heads, size, dtype, block_size=16, window=0, lengths=LENGTHS):
    pool, tables = paged(lengths, kv_heads, size, block_size, dtype)
    q = random(len(lengths), heads, size, dtype=dtype)
    lengths_R = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    most = -(-max(lengths) // SPLIT) + 1
    workspace = DecodeWorkspace.new(len(lengths), heads, kv_heads, size, most, DEVICE)

    def decode(x, tables, lengths_R):
        return paged_decode_triton(
            x, pool, 1, tables, lengths_R, max_splits=most, capability=CAPABILITY, window=window,
            workspace=workspace,
        )  # fmt: skip

    out = decode(q, tables, lengths_R)
    want = paged_decode_reference(q.double(), wide(pool), 1, tables, lengths_R, window=window)
    assert error(out, want) < LIMIT[dtype]
    assert torch.equal(out[1], torch.zeros_like(out[1])), "a row of length 0 gives zeros"
    assert torch.equal(decode(q, tables, lengths_R), out), "the same call, the same bits"
    assert not workspace.tickets.any(), "every ticket is given back"
    some = [5, 2, 4]
    alone = decode(q[some], tables[some], lengths_R[some])
    assert torch.equal(alone, out[some]), "a row's bits do not depend on its neighbours"


@pytest.mark.parametrize("dtype", [HALVES[0], pytest.param(HALVES[1], marks=SLOW)])
@pytest.mark.parametrize("size", [80, *(pytest.param(n, marks=SLOW) for n in (64, 128, 256))])
def test_decode_head_sizes(size, dtype):
    run_decode(2, 1, size, dtype)


@pytest.mark.parametrize("group", [7, *(pytest.param(n, marks=SLOW) for n in (1, 6, 8))])
def test_decode_query_heads_per_key_head(group):
    run_decode(2 * group, 2, 64, torch.float16, lengths=(3, 0, 9, 1, 65, 140))


@pytest.mark.parametrize("block_size", [64, *(pytest.param(n, marks=SLOW) for n in (24, 32, 128))])
def test_decode_block_sizes(block_size):
    run_decode(2, 1, 64, torch.bfloat16, block_size=block_size)


@pytest.mark.parametrize("window", [33, *(pytest.param(n, marks=SLOW) for n in (1, 64, 65, 5000))])
def test_decode_windows(window):
    run_decode(2, 1, 64, torch.float16, window=window)


def run_prefill(heads, kv_heads, size, dtype, block_size=16, window=0):
    new, lengths = (5, 1, 33, 0, 16), (5, 30, 70, 9, 81)
    pool, tables = paged(lengths, kv_heads, size, block_size, dtype)
    bounds = torch.tensor([0, *new]).cumsum(0).tolist()
    q = random(bounds[-1], heads, size, dtype=dtype)
    tiles = PrefillTiles(bounds, lengths, DEVICE)
    out = paged_prefill_triton(q, pool, 1, tables, tiles, capability=CAPABILITY, window=window)
    clean = KVPool(data=pool.data.double().nan_to_num())
    want = paged_prefill_reference(q.double(), clean, 1, tables, bounds, lengths, window=window)
    assert error(out, want) < LIMIT[dtype]
    again = paged_prefill_triton(q, pool, 1, tables, tiles, capability=CAPABILITY, window=window)
    assert torch.equal(out, again)


@pytest.mark.parametrize("dtype", [HALVES[0], pytest.param(HALVES[1], marks=SLOW)])
@pytest.mark.parametrize("size", [80, *(pytest.param(n, marks=SLOW) for n in (64, 128, 256))])
def test_prefill_head_sizes(size, dtype):
    run_prefill(2, 1, size, dtype)


@pytest.mark.parametrize("block_size", [64, pytest.param(24, marks=SLOW)])
@pytest.mark.parametrize("window", [0, 20, pytest.param(1, marks=SLOW)])
def test_prefill_windows_and_blocks(window, block_size):
    run_prefill(2, 1, 64, torch.float16, window=window, block_size=block_size)


@pytest.mark.parametrize("has_norm", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(7, 1, 128), (4, 2, 64), (2, 1, 80)])
@pytest.mark.parametrize("dtype", HALVES)
def test_rotate_write_equals_norm_and_rotation_to_the_bit(dtype, heads, kv_heads, size, has_norm):
    num_tokens, block_size = 5, 16
    fused = random(num_tokens, (heads + 2 * kv_heads) * size + 16, dtype=dtype)
    qkv = fused[:, : (heads + 2 * kv_heads) * size]  # rows with a stride
    angles = random(num_tokens, size // 2, dtype=torch.float32, seed=1)
    cos, sin = angles.cos(), angles.sin()
    q_norm, k_norm = (random(size, dtype=dtype, seed=s) if has_norm else None for s in (2, 3))
    slots = torch.tensor([17, 0, 95, 48, 33], device=DEVICE)
    pools = []
    for _ in range(2):
        data = torch.full((2, 6, 2, kv_heads, block_size, size), 7.0, dtype=dtype, device=DEVICE)
        pools.append(KVPool(data=data, address=torch.tensor([data.data_ptr()], device=DEVICE)))
    q = rotate_write_triton(qkv, cos, sin, q_norm, k_norm, 1e-6, slots, pools[0], 1)
    with torch.no_grad():
        wanted_q, k, v = qkv.view(num_tokens, -1, size).split([heads, kv_heads, kv_heads], 1)
        if has_norm:
            wanted_q, k = rms_norm_triton(wanted_q, q_norm, 1e-6), rms_norm_triton(k, k_norm, 1e-6)
        wanted_q, k = rope_triton(wanted_q, cos, sin), rope_triton(k, cos, sin)
    at = (slots // block_size, slots % block_size)
    pools[1].data[1][at[0], :, :, at[1]] = torch.stack((k, v), 1)
    assert torch.equal(q, wanted_q)
    assert torch.equal(pools[0].data, pools[1].data), "slots of these tokens and nothing else"
    reference = rotate_write_reference(
        qkv.double(), cos, sin, *(w if w is None else w.double() for w in (q_norm, k_norm)), 1e-6,
        slots, KVPool(data=pools[1].data.double()), 1,
    )  # fmt: skip
    assert error(q, reference) < LIMIT[dtype]


@pytest.mark.skipif(INTERPRETED, reason="a graph needs a card")
def test_a_captured_graph_follows_a_pool_that_moved():
    lengths = (70, 0, 300, 513)
    pool, tables = paged(lengths, 2, 128, 64, torch.bfloat16)
    lengths_R = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    q = random(4, 14, 128, dtype=torch.bfloat16)
    qkv = random(4, 18 * 128, dtype=torch.bfloat16, seed=4)
    angles = random(4, 64, dtype=torch.float32, seed=1)
    slots = torch.tensor([length - 1 if length else 0 for length in lengths], device=DEVICE)
    slots = tables.gather(1, slots[:, None] // 64).long()[:, 0] * 64 + slots % 64
    workspace = DecodeWorkspace.new(4, 14, 2, 128, 3, DEVICE)

    def step():
        rotated = rotate_write_triton(
            qkv, angles.cos(), angles.sin(), None, None, 1e-6, slots, pool, 1
        )
        return rotated, paged_decode_triton(
            q, pool, 1, tables, lengths_R, max_splits=3, capability=CAPABILITY,
            workspace=workspace,
        )  # fmt: skip

    first = [x.clone() for x in step()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(outputs, first, strict=True))
    old, before = pool.data, pool.data.data_ptr()
    moved = (old.float() * 0.5).to(old.dtype)
    old.fill_(float("nan"))
    pool.address.fill_(moved.data_ptr())
    assert moved.data_ptr() != before
    graph.replay()
    torch.cuda.synchronize()
    assert torch.isnan(old).all(), "nothing is written to the old place"
    want = paged_decode_reference(q.double(), KVPool(data=moved.double()), 1, tables, lengths_R)
    assert error(outputs[1], want) < LIMIT[torch.bfloat16]


@pytest.mark.parametrize(
    ("window", "size", "span"),
    [(0, 64, 4), (SPLIT + 9, 64, 2), pytest.param(0, 128, 2, marks=SLOW)],
)
def test_how_programs_share_the_splits_changes_no_bit(window, size, span, monkeypatch):
    heads, kv_heads, dtype = 6, 2, torch.bfloat16
    lengths = (1, 0, SPLIT, SPLIT + 1, 2 * SPLIT - 7, 3 * SPLIT, 5 * SPLIT + 5)
    rows, most = len(lengths), 6
    lengths_R = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    qkv = random(rows, (heads + 2 * kv_heads) * size, dtype=dtype)
    angles = random(rows, size // 2, dtype=torch.float32, seed=1)
    last = (lengths_R.long() - 1).clamp_min(0)
    workspace = DecodeWorkspace.new(rows, heads, kv_heads, size, most, DEVICE)
    found = []
    for splits in (1, span):
        monkeypatch.setattr(paged_attention, "span_of", lambda *_, n=splits: n)
        pool, tables = paged(lengths, kv_heads, size, 64, dtype)
        slots = tables.gather(1, last[:, None] // 64).long()[:, 0] * 64 + last % 64
        pool.data[:, slots // 64, :, :, slots % 64] = float("nan")
        for name in ("partial", "states"):
            getattr(workspace, name).fill_(float("nan"))
        how = {"max_splits": most, "capability": CAPABILITY, "window": window}
        out = rotate_decode_triton(
            qkv, angles.cos(), angles.sin(), None, None, 1e-6, slots, pool, 1, tables, lengths_R,
            workspace=workspace, **how,
        )  # fmt: skip
        assert not out.isnan().any()
        assert not workspace.tickets.any(), "every ticket is given back"
        q = rope_triton(
            qkv.view(rows, -1, size)[:, :heads].contiguous(), angles.cos(), angles.sin()
        )
        apart = paged_decode_triton(q, pool, 1, tables, lengths_R, workspace=workspace, **how)
        assert torch.equal(apart, out)
        want = paged_decode_reference(q.double(), wide(pool), 1, tables, lengths_R, window=window)
        assert error(out, want) < LIMIT[dtype]
        there = lengths_R > 0
        written = pool.data[1, slots[there] // 64, :, :, slots[there] % 64]
        assert not written.isnan().any()
        found.append((out, written))
    for out, written in found[1:]:
        assert torch.equal(out, found[0][0])
        assert torch.equal(written, found[0][1])


def test_rows_of_a_group_that_read_their_second_split_first(monkeypatch):
    """Rows 4 to 7 do: they share the first split alone. Rows 12 to 15 share two and do not."""
    heads, kv_heads, size, dtype = 2, 1, 128, torch.bfloat16
    own = (SPLIT, SPLIT + 1, 2 * SPLIT, 3, 1, SPLIT // 2 + 1, SPLIT - 1, 2 * SPLIT + 3)
    lengths = [SPLIT + n for n in own] + [2 * SPLIT + n for n in own]
    assert swaps_splits(4, size)
    pool, tables = paged(lengths, kv_heads, size, 16, dtype)
    whole = SPLIT // 16
    tables[:8, :whole], tables[8:, : 2 * whole] = tables[0, :whole], tables[8, : 2 * whole]
    lengths_R = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    q = random(16, heads, size, dtype=dtype)
    found = []
    for span, swaps in ((1, False), (4, False), (4, True)):
        monkeypatch.setattr(paged_attention, "span_of", lambda *_, n=span: n)
        monkeypatch.setattr(paged_attention, "swaps_splits", lambda *_, n=swaps: n)
        how = {"max_splits": 5, "capability": CAPABILITY}
        found.append(paged_decode_triton(q, pool, 1, tables, lengths_R, **how))
    want = paged_decode_reference(q.double(), wide(pool), 1, tables, lengths_R)
    assert error(found[0], want) < LIMIT[dtype]
    assert torch.equal(found[1], found[0])
    assert torch.equal(found[2], found[0])


@pytest.mark.parametrize("has_norm", [True, False])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"),
    [
        (7, 1, 64),
        (4, 2, 32),
        *(
            pytest.param(*n, marks=SLOW)
            for n in ((28, 4, 128), (4, 2, 80), (16, 8, 128), (4, 2, 16))
        ),
    ],
)
def test_one_launch_for_rotation_writing_and_decoding(heads, kv_heads, size, has_norm):
    lengths = (1, 0, 17, SPLIT, 2 * SPLIT + 5)
    dtype, rows = torch.bfloat16, len(lengths)
    qkv = random(rows, (heads + 2 * kv_heads) * size + 16, dtype=dtype)[:, :-16]
    angles = random(rows, size // 2, dtype=torch.float32, seed=1)
    norms = [random(size, dtype=dtype, seed=s) if has_norm else None for s in (2, 3)]
    lengths_R = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    pools = [paged(lengths, kv_heads, size, 16, dtype) for _ in range(2)]
    tables = pools[0][1]
    last = (lengths_R.long() - 1).clamp_min(0)
    slots = tables.gather(1, last[:, None] // 16).long()[:, 0] * 16 + last % 16
    for pool, _ in pools:  # what both have to write
        pool.data[:, slots // 16, :, :, slots % 16] = float("nan")
    rotation = (angles.cos(), angles.sin(), *norms, 1e-6, slots)
    how = {"max_splits": 4, "capability": CAPABILITY}
    q = rotate_write_triton(qkv, *rotation, pools[0][0], 1)
    want = paged_decode_triton(q, pools[0][0], 1, tables, lengths_R, **how)
    got = rotate_decode_triton(qkv, *rotation, pools[1][0], 1, tables, lengths_R, **how)
    assert torch.equal(got, want)
    assert not got.isnan().any()
    written, expected = (pool.data[1:, 1:].nan_to_num(7.0) for pool, _ in pools)
    assert torch.equal(written, expected)


@pytest.mark.parametrize("span", [1, 2])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(4, 2, 64), pytest.param(28, 4, 128, marks=SLOW)]
)
def test_rows_are_written_in_the_order_of_a_product(heads, kv_heads, size, span, monkeypatch):
    monkeypatch.setattr(paged_attention, "span_of", lambda *_: span)
    lengths, dtype = (1, 0, SPLIT + 3, 2 * SPLIT + 5), torch.bfloat16
    rows = len(lengths)
    qkv = random(rows, (heads + 2 * kv_heads) * size, dtype=dtype)
    angles = random(rows, size // 2, dtype=torch.float32, seed=1)
    lengths_R = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    pool, tables = paged(lengths, kv_heads, size, 16, dtype)
    last = (lengths_R.long() - 1).clamp_min(0)
    slots = tables.gather(1, last[:, None] // 16).long()[:, 0] * 16 + last % 16
    plain, ordered, both = (
        rotate_decode_triton(
            qkv, angles.cos(), angles.sin(), None, None, 1e-6, slots, pool, 1, tables, lengths_R,
            max_splits=3, capability=CAPABILITY, written=written,
        ).flatten(-2)
        for written in (AS_THEY_ARE, Written(in_order=True), Written(in_order=True, both=True))
    )  # fmt: skip
    assert not plain.isnan().any()
    assert torch.equal(ordered, in_kernel_order(plain))
    assert torch.equal(both, torch.stack([ordered, plain]))


@pytest.mark.parametrize("bitwise", [False, True])
def test_the_plan_of_a_step(bitwise):
    """Prefill and decoding through PagedKernelPlan, from the projection and from its parts."""
    heads, kv_heads, size, block_size, dtype = 2, 1, 64, 16, torch.bfloat16
    angles = random(80, size // 2, dtype=torch.float32, seed=1)
    cos, sin = angles.cos(), angles.sin()
    qkv = random(80, 4 * size, dtype=dtype)
    data = torch.full((1, 8, 2, kv_heads, block_size, size), float("nan"), device=DEVICE)
    pools = []
    for _ in range(2):
        copy = data.to(dtype)
        pools.append(KVPool(data=copy, address=torch.tensor([copy.data_ptr()], device=DEVICE)))
    tables = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0]], device=DEVICE)
    lengths, outputs = [0, 0], []
    for new in ((20, 5), (9, 10), (1, 1)):
        places = [(r, lengths[r] + i) for r in range(2) for i in range(new[r])]
        lengths = [n + m for n, m in zip(lengths, new, strict=True)]
        slots = torch.tensor([int(tables[r, p // 16]) * 16 + p % 16 for r, p in places])
        tokens = torch.tensor([40 * r + p for r, p in places], device=DEVICE)
        layout = PagedLayout(
            cu_seqlens=(0, new[0], sum(new)),
            kv_lengths=tuple(lengths),
            kv_lengths_R=torch.tensor(lengths, device=DEVICE),
            block_tables_RN=tables,
            slots_T=slots.to(DEVICE),
            block_size=block_size,
        )
        with torch.no_grad():
            plans = [
                PagedKernelPlan.of_layout(layout, pool, CAPABILITY, bitwise=bitwise)
                for pool in pools
            ]
            turned = (cos[tokens], sin[tokens])
            whole = plans[0].attend_rotated(qkv[tokens], *turned, None, None, 1e-6, 0, 0)
            q, k, v = qkv[tokens].view(-1, 4, size).split([heads, kv_heads, kv_heads], 1)
            q, k = rope_triton(q, *turned), rope_triton(k, *turned)
            parts = plans[1].attend(q, k, v, 0, 0)
        assert torch.equal(whole, parts)
        outputs.append((places, q, whole))
    pool = KVPool(data=pools[0].data.double().nan_to_num())
    for places, q, out in outputs:
        for i, (row, place) in enumerate(places):
            lengths_R = torch.tensor([place + 1])
            want = paged_decode_reference(
                q[i : i + 1].double(), pool, 0, tables[row : row + 1], lengths_R
            )
            assert error(out[i : i + 1], want) < LIMIT[dtype]


EIGHT_BITS = [torch.int8, pytest.param(torch.float8_e4m3fn, marks=[] if INTERPRETED else SLOW)]


@pytest.mark.parametrize("kv_dtype", EIGHT_BITS)
def test_keys_and_values_in_eight_bits(kv_dtype):
    """Written with a scale a token and head; decoding and prefill read them back."""
    heads, kv_heads, size, block_size, dtype = 4, 2, 64, 16, torch.bfloat16
    lengths = (1, SPLIT + 3)
    rows = len(lengths)
    counts = [-(-n // block_size) for n in lengths]
    shape = (2, 1 + sum(counts), 2, kv_heads, block_size)
    tables = torch.zeros(rows, max(counts), dtype=torch.int32, device=DEVICE)
    slots, blocks = [], iter(range(1, 1 + sum(counts)))
    for row, length in enumerate(lengths):
        for i in range(counts[row]):
            tables[row, i] = next(blocks)
        slots += [int(tables[row, p // 16]) * 16 + p % 16 for p in range(length)]
    slots_T = torch.tensor(slots, device=DEVICE)
    pools = []
    for _ in range(2):
        data = torch.zeros(*shape, size, dtype=torch.int8, device=DEVICE).view(kv_dtype)
        scales = torch.zeros(shape, dtype=torch.float32, device=DEVICE)
        address = torch.tensor([data.data_ptr(), scales.data_ptr()], device=DEVICE)
        pools.append(KVPool(data=data, scales=scales, address=address))
    qkv = random(len(slots), (heads + 2 * kv_heads) * size, dtype=dtype)
    qkv[5] = 0  # a key and a value of zeros
    angles = random(len(slots), size // 2, dtype=torch.float32, seed=1)
    rotation = (angles.cos(), angles.sin(), None, None, 1e-6)
    q = rotate_write_triton(qkv, *rotation, slots_T, pools[0], 1)
    rotate_write_reference(qkv, *rotation, slots_T, pools[1], 1)
    at = (slots_T // 16, slots_T % 16)
    got, want = (read_slots(pool, 1, *at) for pool in pools)
    k, v = qkv.view(-1, 8, size).split([heads, kv_heads, kv_heads], 1)[1:]
    exact = torch.stack((rope_reference(k, *rotation[:2]), v), 1)
    # the interpreter cuts to 8-bit floats instead of rounding
    coarse = 5e-3 if kv_dtype == torch.int8 else 6e-2 if INTERPRETED else 3e-2
    assert error(want, exact) < 2 * coarse
    assert error(got, exact) < 2 * coarse
    assert error(got, want) < coarse
    lengths_R = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    last = torch.tensor(lengths, device=DEVICE).cumsum(0) - 1
    how = {"max_splits": 3, "capability": CAPABILITY}
    decoded = paged_decode_triton(q[last], pools[0], 1, tables, lengths_R, **how)
    wanted = paged_decode_reference(q[last].double(), pools[0], 1, tables, lengths_R)
    assert error(decoded, wanted) < LIMIT[dtype]
    turned = (angles[last].cos(), angles[last].sin(), None, None, 1e-6)
    once = rotate_decode_triton(
        qkv[last], *turned, slots_T[last], pools[0], 1, tables, lengths_R, **how
    )
    assert torch.equal(once, decoded)
    bounds = [0, *(last + 1).tolist()]
    tiles = PrefillTiles(bounds, lengths, DEVICE)
    filled = paged_prefill_triton(q, pools[0], 1, tables, tiles, capability=CAPABILITY)
    wanted = paged_prefill_reference(q.double(), pools[0], 1, tables, bounds, lengths)
    assert error(filled, wanted) < LIMIT[dtype]


def test_a_plan_that_computes_prompts_once():
    """The same bits through PagedKernelPlan; a layer with a window shares nothing."""
    heads, kv_heads, size, block_size, dtype = 4, 2, 64, 16, torch.bfloat16
    lengths = (SPLIT + 9, SPLIT + 1, 5, SPLIT + 20)
    _, tables = paged(lengths, kv_heads, size, block_size, dtype)
    for row in (1, 3):
        tables[row, : SPLIT // block_size] = tables[0, : SPLIT // block_size]
    data = random(1, int(tables.max()) + 1, 2, kv_heads, block_size, size, dtype=dtype)
    pool = KVPool(data=data, address=torch.tensor([data.data_ptr()], device=DEVICE))
    lengths_R = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    last = lengths_R.long() - 1
    slots = tables.gather(1, last[:, None] // block_size).long()[:, 0] * block_size
    qkv = random(4, (heads + 2 * kv_heads) * size, dtype=dtype)
    angles = random(4, size // 2, dtype=torch.float32, seed=1)
    turned = (angles.cos(), angles.sin(), None, None, 1e-6, 0)
    outputs = []
    for shares_prompts in (False, True):
        with torch.no_grad():
            plan = PagedKernelPlan(
                pool, tables_RN=tables, lengths_R=lengths_R, slots_T=slots + last % block_size,
                max_splits=2, capability=CAPABILITY, shares_prompts=shares_prompts,
            )  # fmt: skip
            outputs.append([plan.attend_rotated(qkv, *turned, window) for window in (0, 7)])
        assert (plan._shared_R is not None) == shares_prompts
    assert plan._shared_R.tolist() == [1, 1, 0, 1]
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
