"""The small launches between a decode step's products, in a chain that overlaps.

Norm (with what is added before it) and SwiGLU of kernels/norm.py and kernels/swiglu.py, the same
bits, in launches that may begin while the product before them runs (programmatic dependent launch,
sm_90 and later), and that let the next one begin at once: it brings its weights to shared memory
(few_rows_hopper.py) while these wait for their turn.

A norm may add up a product's pieces (kernels/few_rows_tiles.py) before: in order, in float32, then
rounded as the product would have been.

Shapes: x and residual [T, D], pieces [S, T, D] float32, gate_up [T, 2F]. Bytes: those of norm.py
and swiglu.py; 4 S T D of pieces.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparring.kernels import jit, rounded, tl, triton
from sparring.kernels.norm import _forward_kernel as norm_rows
from sparring.kernels.norm import normed_rows, tile_of
from sparring.kernels.swiglu import BLOCK_F, NUM_WARPS
from sparring.kernels.swiglu import _forward_kernel as swiglu_rows

__all__ = ["add_norm_early", "pieces_norm_early", "swiglu_early"]


@jit
def take_turn(OVERLAPS: tl.constexpr):
    """Lets the next launch begin, which waits for this one's end, and waits for the one before."""
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@jit(do_not_specialize=["num_rows"])
def _pieces_norm_kernel(
    pieces_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, num_rows, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, PIECES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    inside = (rows < num_rows)[:, None] & (columns < D)[None, :]
    dtype = y_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    take_turn(OVERLAPS)
    flat = rows[:, None] * D + columns[None, :]
    before = tl.load(residual_ptr + flat, mask=inside, other=0.0)
    x = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for piece in tl.static_range(PIECES):
        x += tl.load(pieces_ptr + piece * num_rows.to(tl.int64) * D + flat, mask=inside, other=0.0)
    x = rounded(x, dtype).to(tl.float32) + before.to(tl.float32)
    kept = rounded(x, dtype)
    tl.store(sum_ptr + flat, kept, mask=inside)
    x = kept.to(tl.float32)
    tl.store(y_ptr + flat, normed_rows(x, weight, eps, D, dtype), mask=inside)


@jit(do_not_specialize=["num_rows"])
def _norm_early_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, num_rows, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    norm_rows(
        x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, num_rows, 1, D, 0, eps, D, BLOCK_D, ROWS,
        HAS_RESIDUAL, EARLY=OVERLAPS,
    )  # fmt: skip


@jit
def _swiglu_early_kernel(
    x_ptr, h_ptr, stride_xt, F: tl.constexpr, BLOCK_F: tl.constexpr, OVERLAPS: tl.constexpr
):
    take_turn(OVERLAPS)
    swiglu_rows(x_ptr, h_ptr, stride_xt, F, BLOCK_F)


def add_norm_early(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, *, overlaps: bool = True
) -> tuple[Tensor, Tensor]:
    """(RMSNorm of x + residual, x + residual) for x [T, D], as `add_rms_norm`; without a residual
    (RMSNorm of x, x). overlaps: is launched early, which needs sm_90.
    """
    x = x.contiguous()
    rows, width = x.shape
    y, tile = torch.empty_like(x), tile_of(width)
    summed = x if residual is None else torch.empty_like(x)
    _norm_early_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
        x, x if residual is None else residual, weight, y, summed, rows, eps, D=width,
        HAS_RESIDUAL=residual is not None, enable_fp_fusion=True, OVERLAPS=overlaps, **tile,
        **_early(overlaps),
    )  # fmt: skip
    return y, summed


def pieces_norm_early(
    pieces: Tensor, residual: Tensor, weight: Tensor, eps: float, *, overlaps: bool = True
) -> tuple[Tensor, Tensor]:
    """(RMSNorm of s, s) for s = a product [T, D] that is there in pieces [S, T, D], added up in
    order and rounded, and a residual; overlaps: as above.
    """
    num_pieces, rows, width = pieces.shape
    y, summed = torch.empty_like(residual), torch.empty_like(residual)
    tile = tile_of(width)
    # more loads on their way, and few registers: it waits beside the product that it reads
    tile["num_warps"] = max(tile["num_warps"], min(16, tile["BLOCK_D"] // 256))
    _pieces_norm_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
        pieces, residual, weight, y, summed, rows, eps, D=width, PIECES=num_pieces,
        enable_fp_fusion=True, OVERLAPS=overlaps, **tile, **_early(overlaps),
    )  # fmt: skip
    return y, summed


def _early(overlaps: bool) -> dict[str, bool]:
    return {"launch_pdl": True} if overlaps else {}


def swiglu_early(gate_up: Tensor, *, overlaps: bool = True) -> Tensor:
    """silu(gate) * up for gate_up [T, 2F], as `swiglu`; overlaps: as above."""
    rows, half = gate_up.shape[0], gate_up.shape[1] // 2
    h = torch.empty(rows, half, dtype=gate_up.dtype, device=gate_up.device)
    _swiglu_early_kernel[(rows, triton.cdiv(half, BLOCK_F))](
        gate_up, h, gate_up.stride(0), F=half, BLOCK_F=BLOCK_F, OVERLAPS=overlaps,
        num_warps=NUM_WARPS, enable_fp_fusion=True, **_early(overlaps),
    )  # fmt: skip
    return h
