"""Bitwise mode's attention: decoding, prefill, chunks and the training forward agree to the bit.

See test_triton.py for how it is run; on a card the splits are larger, so prompts are longer there.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from sparring.kernels import capability_for, capability_of, paged_attention
from sparring.kernels.attention import (
    shared_attention_kept,
    shared_attention_reference,
    shared_attention_triton,
)
from sparring.kernels.attention_plan import SharedPlan
from sparring.kernels.column_order import BLOCK_K, Written, in_kernel_order
from sparring.kernels.paged_attention import paged_decode_triton, rotate_decode_triton
from sparring.kernels.paged_plan import DecodeWorkspace, PrefillTiles, split_of
from sparring.kernels.paged_prefill import paged_prefill_triton
from sparring.kernels.shared_decode import chunk_of, shared_splits
from sparring.kernels.split_attention import split_attention_paged
from sparring.layout import KVPool
from tests.kernels.test_triton import DEVICE, LIMIT, _poisoned, check, error, pytestmark, random

__all__ = ["_poisoned", "pytestmark"]

CAN_RUN = DEVICE.type == "cpu" or torch.cuda.is_available()
CAPABILITY = capability_of(DEVICE) if CAN_RUN else capability_for(90)
SPLIT, TILE = (split_of(CAPABILITY, 128)[name] for name in ("SPLIT", "BLOCK_N"))
BORDERS = [n + d for n in (TILE, SPLIT) for d in (-1, 0, 1)]
SLOW = pytest.mark.slow


def plan_of(cu_seqlens, parents):
    return SharedPlan(cu_seqlens, parents, device=DEVICE, capability=CAPABILITY, bitwise=True)


def packed(q, k, v, cu_seqlens, parents, window):
    out, lse = shared_attention_kept(q, k, v, plan_of(cu_seqlens, parents), window)
    assert not out.isnan().any()
    assert not lse.isnan().any()
    return out


def pool_of(rows, block_size, dtype):
    """A pool that holds the keys and values (k, v) of each row, NaN elsewhere, and its tables."""
    kv_heads, size = rows[0][0].shape[1:]
    counts = [-(-len(k) // block_size) for k, _ in rows]
    shape = (2, sum(counts) + 1, 2, kv_heads, block_size, size)
    data = torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)
    tables = torch.zeros(len(rows), max(counts), dtype=torch.int32, device=DEVICE)
    order = (torch.randperm(sum(counts), generator=torch.Generator().manual_seed(2)) + 1).tolist()
    for row, (k, v) in enumerate(rows):
        for i in range(counts[row]):
            block = tables[row, i] = order.pop()
            for which, x in enumerate((k, v)):
                piece = x[i * block_size : (i + 1) * block_size].transpose(0, 1)
                data[1, block, which, :, : piece.shape[1]] = piece
    return KVPool(data=data, address=torch.tensor([data.data_ptr()], device=DEVICE)), tables


def pieces_of(total, first):
    """Cuts of a row into chunks of growing size."""
    cuts = [0]
    while cuts[-1] < total:
        cuts.append(min(total, cuts[-1] + first + 12 * len(cuts)))
    return list(itertools.pairwise(cuts))


def agree(prompt, completions, heads, kv_heads, size, dtype, block_size=16, window=0):
    lengths = (prompt, *completions)
    starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    q = random(starts[-1], heads, size, dtype=dtype)
    k, v = (random(starts[-1], kv_heads, size, dtype=dtype, seed=s) for s in (1, 2))
    shared = packed(q, k, v, starts, (-1, *[0] * len(completions)), window)
    members = [
        torch.tensor([*range(prompt), *range(starts[i], starts[i + 1])], device=DEVICE)
        for i in range(1, len(lengths))
    ]
    rows = torch.cat(members)
    bounds = [0, *torch.tensor([len(m) for m in members]).cumsum(0).tolist()]
    unshared = packed(q[rows], k[rows], v[rows], bounds, [-1] * len(members), window)
    assert torch.equal(unshared, shared[rows]), "a prompt of its own"
    pool, tables = pool_of([(k[m], v[m]) for m in members], block_size, dtype)
    totals = [len(m) for m in members]
    whole = split_attention_paged(
        q[rows], pool, 1, tables, PrefillTiles(bounds, totals, DEVICE), capability=CAPABILITY,
        window=window,
    )  # fmt: skip
    assert torch.equal(whole, unshared), "prefill"
    for row, m in enumerate(members):
        for start, stop in pieces_of(totals[row], 3):
            chunk = split_attention_paged(
                q[m[start:stop]], pool, 1, tables[row : row + 1],
                PrefillTiles([0, stop - start], [stop], DEVICE), capability=CAPABILITY,
                window=window,
            )  # fmt: skip
            assert torch.equal(chunk, shared[m[start:stop]]), f"chunk {start} to {stop}"
        places = torch.arange(prompt, totals[row], device=DEVICE)
        decoded = paged_decode_triton(
            q[m[prompt:]], pool, 1, tables[[row] * len(places)], (places + 1).int(),
            max_splits=-(-totals[row] // SPLIT), capability=CAPABILITY, window=window,
        )  # fmt: skip
        assert torch.equal(decoded, shared[m[prompt:]]), "decoding"
    want = shared_attention_reference(
        q.double(), k.double(), v.double(), plan_of(starts, (-1, *[0] * len(completions))),
        window=window,
    )  # fmt: skip
    assert error(shared, want) < LIMIT[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_default_kernels_round_where_decoding_does(dtype):
    """Their tiles begin elsewhere, so running maxima differ; the rounded probabilities must not."""
    prompt, own = TILE // 2 + 5, TILE + 9
    total = prompt + own
    q = random(total, 2, 64, dtype=dtype) * 4
    k, v = (random(total, 1, 64, dtype=dtype, seed=s) for s in (1, 2))
    plan = SharedPlan((0, prompt, total), (-1, 0), device=DEVICE, capability=CAPABILITY)
    trained = shared_attention_triton(q, k, v, plan)
    pool, tables = pool_of([(k, v)], 16, dtype)
    places = torch.arange(total, device=DEVICE)
    decoded = paged_decode_triton(
        q, pool, 1, tables[[0] * total], (places + 1).int(), max_splits=-(-total // SPLIT),
        capability=CAPABILITY,
    )  # fmt: skip
    filled = paged_prefill_triton(
        q, pool, 1, tables, PrefillTiles([0, total], [total], DEVICE), capability=CAPABILITY
    )
    for name, out in (("training", trained), ("prefill", filled)):
        share = (out != decoded).float().mean().item()
        assert share < 0.005, f"{share:.2%} of {name}'s numbers differ from decoding's"


@pytest.mark.parametrize("prompt", [SPLIT - 1, *(pytest.param(n, marks=SLOW) for n in BORDERS)])
def test_prompts_around_tiles_and_splits(prompt):
    agree(prompt, (1, 3), 2, 1, 64, torch.bfloat16)


@SLOW
@pytest.mark.parametrize("size", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_head_sizes(size, dtype):
    agree(SPLIT + 3, (1, TILE + 1), 2, 1, size, dtype)


@SLOW
@pytest.mark.parametrize("group", [1, 6, 7, 8])
@pytest.mark.parametrize("block_size", [16, 64])
def test_query_heads_per_key_head(group, block_size):
    agree(TILE + 1, (1, SPLIT), 2 * group, 2, 128, torch.bfloat16, block_size=block_size)


@pytest.mark.parametrize("window", [TILE + 2, *(pytest.param(n, marks=SLOW) for n in (1, SPLIT))])
def test_windows(window):
    agree(SPLIT + 2, (1, 2), 1, 1, 64, torch.bfloat16, window=window)


def test_gradients_of_the_bitwise_forward():
    cu_seqlens, parents = (0, 17, 27, 28, 33), (-1, 0, 0, -1)
    plan = plan_of(cu_seqlens, parents)
    inputs = {
        "q": random(33, 2, 64, dtype=torch.bfloat16),
        "k": random(33, 1, 64, dtype=torch.bfloat16, seed=1),
        "v": random(33, 1, 64, dtype=torch.bfloat16, seed=2),
    }
    check(
        lambda q, k, v: shared_attention_triton(q, k, v, plan),
        lambda q, k, v: shared_attention_reference(q, k, v, plan),
        inputs,
        2 * LIMIT[torch.bfloat16],
    )


def run_shared(monkeypatch, heads, kv_heads, size, lengths, shared, block_size=16):
    """Rows of which row r holds the first shared[r][1] blocks of row shared[r][0]."""
    keys = [
        tuple(random(max(1, n), kv_heads, size, dtype=torch.bfloat16, seed=2 * r + i)
              for i in (0, 1))
        for r, n in enumerate(lengths)
    ]  # fmt: skip
    pool, tables = pool_of(keys, block_size, torch.bfloat16)
    for row, (leader, blocks) in shared.items():
        tables[row, :blocks] = tables[leader, :blocks]
    q = random(len(lengths), heads, size, dtype=torch.bfloat16, seed=99)
    lengths_R = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    most = -(-max(lengths) // SPLIT) + 1
    workspace = DecodeWorkspace.new(len(lengths), heads, kv_heads, size, most, DEVICE)
    counted = shared_splits(
        tables, lengths_R, chunk=chunk_of(heads // kv_heads), block_size=block_size, split=SPLIT,
        max_splits=most,
    )  # fmt: skip
    qkv = random(len(lengths), (heads + 2 * kv_heads) * size, dtype=torch.bfloat16, seed=98)
    angles = random(len(lengths), size // 2, dtype=torch.float32, seed=1)
    norms = [random(size, dtype=torch.bfloat16, seed=n) for n in (2, 3)]
    last = (lengths_R.long() - 1).clamp_min(0)
    slots = tables.gather(1, last[:, None] // block_size).long()[:, 0] * block_size
    slots += last % block_size
    for row, (_, blocks) in shared.items():
        if lengths[row] <= blocks * block_size:
            slots[row] = 0  # what several rows read is not written; block 0 is nobody's
    rotation = (angles.cos(), angles.sin(), *norms, 1e-6, slots)
    how = {"max_splits": most, "capability": CAPABILITY, "workspace": workspace}
    rotate_decode_triton(qkv, *rotation, pool, 1, tables, lengths_R, **how)  # it writes
    outputs = []
    for span, shared_R in ((1, None), (2, None), (1, counted), (2, counted)):
        monkeypatch.setattr(paged_attention, "span_of", lambda *_, n=span: n)
        workspace.partial.fill_(float("nan"))
        workspace.states.fill_(float("nan"))
        plain = paged_decode_triton(q, pool, 1, tables, lengths_R, shared_R=shared_R, **how)
        rotated = rotate_decode_triton(
            qkv, *rotation, pool, 1, tables, lengths_R, shared_R=shared_R, **how
        )
        outputs.append((plain, rotated))
        assert not workspace.tickets.any(), "every ticket is given back"
        if rotated[0].numel() % BLOCK_K == 0:
            ordered = rotate_decode_triton(
                qkv, *rotation, pool, 1, tables, lengths_R, shared_R=shared_R,
                written=Written(in_order=True), **how,
            )  # fmt: skip
            assert torch.equal(ordered.flatten(1), in_kernel_order(rotated.flatten(1)))
    assert not outputs[0][0].isnan().any()
    assert not outputs[0][1].isnan().any()
    for plain, rotated in outputs[1:]:
        assert torch.equal(plain, outputs[0][0]), "a prompt computed once changes no bit"
        assert torch.equal(rotated, outputs[0][1])
    return counted.tolist()


def test_prompts_computed_once_for_their_group(monkeypatch):
    s, b = SPLIT, 16
    lengths = (2 * s + 3, s + 1, 0, 2 * s + 20, s, 3, s + 9, 2 * s)
    # rows 1 to 4 hold row 0's prompt of one split and a block; rows 6 and 7 share only each other's
    shared = {1: (0, s // b), 3: (0, s // b + 1), 4: (0, s // b), 7: (6, s // b)}
    # row 4 has no split but its last; rows 6 and 7 begin no chunk of four
    assert run_shared(monkeypatch, 7, 1, 64, lengths, shared) == [1, 1, 0, 1, 0, 0, 0, 0]


@SLOW
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(28, 4, 128), (14, 2, 64), (16, 8, 128)])
def test_groups_of_rows(heads, kv_heads, size, monkeypatch):
    s = SPLIT
    lengths = [2 * s + 5 + i for i in range(5)] + [s - 1] * 2 + [3 * s + i for i in range(4)]
    shared = dict.fromkeys(range(1, 5), (0, 2 * s // 16))
    shared |= dict.fromkeys(range(8, 11), (7, 2 * s // 16))
    assert sum(run_shared(monkeypatch, heads, kv_heads, size, lengths, shared)) > 6
    moved = {row + 1: (leader + 1, n) for row, (leader, n) in shared.items()}
    run_shared(monkeypatch, heads, kv_heads, size, [0, *lengths], moved)
