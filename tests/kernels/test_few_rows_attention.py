"""Attention of few rows whose keys come before their turn, on an sm_90 card."""

from __future__ import annotations

import pytest
import torch

from sparring.kernels import capability_for, few_rows_attention
from sparring.kernels.few_rows_attention import attend
from sparring.kernels.paged_attention import paged_decode_reference, rotate_decode_triton
from sparring.kernels.rotate_write import rotate_write_reference
from sparring.layout import KVPool
from tests.kernels.test_few_rows_hopper import on_card
from tests.kernels.test_triton import _poisoned, error, random
from tests.kernels.test_triton_paged import paged

__all__ = ["_poisoned"]


CASES = [
    (12, 2, 64, 512, torch.bfloat16),
    (12, 2, 64, 768, torch.bfloat16),
    (12, 2, 64, 1024, torch.bfloat16),
    (28, 4, 64, 2048, torch.bfloat16),
    (2, 1, 16, 1024, torch.float16),
    (12, 2, 64, 4096, torch.float16),
    (12, 2, 64, 64, torch.bfloat16),
]


@on_card
@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_few_rows_of_a_chain(case, overlaps):
    heads, kv_heads, block_size, max_keys, dtype = CASES[case]
    lengths = [1, 0, 17, 64, 65, 129, 256, 257, 512, 513, 700, 1024, 2000, 4096]
    lengths = [n for n in lengths if n <= max_keys]
    pool, tables = paged(lengths, kv_heads, 128, block_size, dtype)
    rows = len(lengths)
    lengths_R = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    qkv = random(rows, (heads + 2 * kv_heads) * 128, dtype=dtype, seed=1)
    angles = random(rows, 64, dtype=torch.float32, seed=2)
    last = (lengths_R.long() - 1).clamp_min(0)
    slots = tables.gather(1, (last // block_size)[:, None]).long()[:, 0] * block_size
    slots += last % block_size
    given = (qkv, angles.cos(), angles.sin())

    clean = KVPool(data=pool.data.double().nan_to_num())
    wide = [x.double() for x in given]
    q = rotate_write_reference(*wide, None, None, 1e-6, slots, clean, 1)
    want = paged_decode_reference(q, clean, 1, tables, lengths_R)
    before = pool.data.clone()
    outs = []
    for _ in range(2):
        pool.data.copy_(before)
        outs.append(
            attend(*given, slots, pool, 1, tables, lengths_R, max_keys=max_keys, overlaps=overlaps)
        )
    assert error(outs[0], want) < (6e-3 if dtype == torch.bfloat16 else 1e-3)
    assert torch.equal(outs[0], outs[1])
    assert not outs[0][1].any(), "a row of length 0 gives zeros"
    written = pool.data.clone()
    pool.data.copy_(before)
    old = rotate_decode_triton(
        *given, None, None, 1e-6, slots, pool, 1, tables, lengths_R,
        max_splits=max(1, max_keys // 256), capability=capability_for(90),
    )  # fmt: skip
    assert error(outs[0], old) < (6e-3 if dtype == torch.bfloat16 else 1e-3)
    has_token = [i for i, n in enumerate(lengths) if n]
    blocks, places = slots[has_token] // block_size, slots[has_token] % block_size
    new, same = written[1][blocks, :, :, places], pool.data[1][blocks, :, :, places]
    assert torch.equal(new, same), "the new keys and values, to the bit"
    written[1][blocks, :, :, places] = before[1][blocks, :, :, places]
    assert torch.equal(written.nan_to_num(), before.nan_to_num()), "and nothing else"


def test_which_rows_are_served(monkeypatch):
    pool = KVPool(data=torch.empty(1, 4, 2, 2, 64, 128, dtype=torch.bfloat16))
    qkv = torch.empty(8, 16 * 128, dtype=torch.bfloat16)
    monkeypatch.setattr(few_rows_attention, "MAX_PAIRS", 16)
    plain = {"has_norm": False, "window": 0}

    def serves(x=qkv, arch=90, keys=1024, **changed):
        return few_rows_attention.serves(x, pool, arch, keys, **(plain | changed))

    assert serves()
    assert not serves(arch=100)
    assert not serves(has_norm=True)
    assert not serves(window=64)
    assert not serves(keys=5000)
    assert not serves(qkv.repeat(2, 1))
    assert not serves(qkv.half())
