"""Low-rank adapters in decode: two small products beside a weight's own.

    xa = round(x A^T)                     shrink, all parts of a fused weight in one launch
    y[:, rows of part] += scale xa B^T    expand, all parts in one launch

Products of 16-bit values are summed in float32; xa is rounded to x's dtype once, in the shrink, and
everything that uses it reads the rounded numbers. With NF4 weights or in bitwise mode the expand
is part of the big product (kernels/matmul.py), which rounds y before and after; here, after a
library product, y is read, added to in float32 and rounded again: the same rounding points.

Bytes: A, B, x and xa once; the expand reads and writes y, 4 N a row. r = 16 on q, k, v and o of a
7B model: 0.6 MB a layer, so launches count, not bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparring.kernels import Capability, jit, rounded, tl, triton
from sparring.kernels.low_rank import LowRank, add_low_rank
from sparring.kernels.matmul import (
    launch,
    launch_beside_next,
    matmul,
    matmul_reference,
)


def lora_shrink_reference(x: Tensor, a: Tensor) -> Tensor:
    """round(x A^T): [T, K] x [R, K] -> [T, R]."""
    return matmul_reference(x, a)


def lora_shrink_triton(x: Tensor, a: Tensor, capability: Capability | None = None) -> Tensor:
    """`lora_shrink_reference` in one launch, summed in float32 in a fixed order."""
    return launch(x, a, None, None, capability)


def lora_shrink(x: Tensor, a: Tensor, capability: Capability | None = None) -> Tensor:
    """round(x A^T), all parts' A stacked: [T, K] x [R, K] -> [T, R], no gradient.

    capability: the model's; left out, what the card can do.
    """
    return matmul(x, a, capability=capability)


def lora_shrink_beside(
    x: Tensor, a: Tensor, capability: Capability
) -> tuple[Tensor, Tensor | None]:
    """`lora_shrink`, and the scratch to hold where it still runs when the next product starts.

    Where the card can let a launch start before the last one is done, the product's long part and
    the shrink run side by side, and the shrink itself is launched while what writes x runs; None
    elsewhere.
    """
    if x.is_cuda and triton is not None and capability.arch in OVERLAPPING:
        return launch_beside_next(x, a, capability=capability, is_early=True)
    return lora_shrink(x, a, capability), None


OVERLAPPING = (90, 100, 120)
"""Architectures whose launches may overlap."""


@jit(do_not_specialize=["num_rows"])
def _expand_kernel(
    y_ptr, xa_ptr, b_ptr, parts_ptr, scale, num_rows, num_outputs, stride_yt, stride_xat,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, NUM_PARTS: tl.constexpr, RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = (n < num_outputs)[:, None] & (t < num_rows)[None, :]
    at = y_ptr + t.to(tl.int64)[None, :] * stride_yt + n[:, None]
    y = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    y = add_low_rank(
        y, xa_ptr, b_ptr, parts_ptr, scale, n, t, num_rows, stride_xat, RANK, BLOCK_R, NUM_PARTS
    )
    tl.store(at, rounded(y, y_ptr.dtype.element_ty), mask=inside)


EXPAND_TILE = {"BLOCK_N": 64, "num_warps": 4}


def lora_expand_reference(y: Tensor, low_rank: LowRank) -> Tensor:
    """y [T, N] + scale xa B^T in place, one rounding."""
    added = matmul_reference(
        torch.zeros(len(y), 1, dtype=torch.float64, device=y.device),
        torch.zeros(y.shape[1], 1, dtype=torch.float64, device=y.device),
        None,
        low_rank,
    )
    return y.copy_(y.double() + added)


def lora_expand_triton(y: Tensor, low_rank: LowRank) -> Tensor:
    """`lora_expand_reference` in one launch."""
    num_rows, num_outputs = y.shape
    if num_rows:
        block_t = 16 if num_rows <= 16 else 32 if num_rows <= 32 else 64
        grid = (triton.cdiv(num_rows, block_t), triton.cdiv(num_outputs, EXPAND_TILE["BLOCK_N"]))
        _expand_kernel[grid](
            y, low_rank.xa, low_rank.b, low_rank.parts, low_rank.scale, num_rows, num_outputs,
            y.stride(0), low_rank.xa.stride(0), BLOCK_T=block_t, NUM_PARTS=len(low_rank.parts),
            RANK=low_rank.b.shape[1],
            BLOCK_R=max(16, triton.next_power_of_2(low_rank.b.shape[1])),
            enable_fp_fusion=False, **EXPAND_TILE,
        )  # fmt: skip
    return y


def lora_expand(y: Tensor, low_rank: LowRank) -> Tensor:
    """y [T, N] + scale xa B^T in place, every part of a fused weight at once, no gradient.

    A LowRank is made only where the model's capability allows the kernel's dots.
    """
    if y.is_cuda and triton is not None:
        return lora_expand_triton(y, low_rank)
    return lora_expand_reference(y, low_rank)
