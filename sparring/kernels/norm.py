"""RMSNorm: y = x / sqrt(mean(x^2) + eps), rounded to x's dtype, then times the weight.

Shapes: x [..., D], weight [D] -> [..., D]. Arithmetic in float32 (float64 for float64 input), one
rounding before the weight, as the checkpoints of the Llama and Qwen families were trained with.
Bytes per row of D 16-bit values: forward reads 2D and writes 2D; backward reads 4D and writes 2D.

With a residual: s = x + residual, rounded to x's dtype, and y = the norm of that rounded s; both
are returned. Forward reads 4D and writes 4D; backward reads 6D and writes 2D.

Backward, with n = x / rms(x) and g = dy weight: dx = (g - n mean(g n)) / rms(x) (plus ds), d weight
= the sum over rows of dy n, in fixed partitions of rows. The norm is computed again from x, nothing
but x is kept. arXiv 1910.07467.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparring.kernels import jit, rounded, tl, triton, uses_triton
from sparring.kernels.column_order import AS_THEY_ARE, Written, place_of

__all__ = [
    "rms_norm",
    "rms_norm_reference",
    "rms_norm_triton",
    "add_rms_norm",
    "add_rms_norm_reference",
    "add_rms_norm_triton",
]

WEIGHT_WARPS, SHORT_WEIGHT_WARPS = 2112, 3168
"""Warps that share the rows where the weight is trained: 16 on each multiprocessor of the largest
cards, 24 where rows have at most 256 numbers and so programs fewer registers. All programs run at
once, and each sums its rows' part of the weight's gradient in registers. Constants, not a card's
properties: the order of the sums depends on shapes alone.
"""

PART_TILE = {"BLOCK_P": 64, "BLOCK_D": 32, "num_warps": 4}
"""Parts and columns that one program of the second pass adds up at a time."""


def _normed(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / rms(x) in at least float32, and 1 / rms(x)."""
    wide = x if x.dtype == torch.float64 else x.float()
    scale = torch.linalg.vecdot(wide, wide).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)
    return wide * scale, scale


def _weighted(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _normed(x, eps)[0].to(x.dtype).mul_(weight)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _weighted(x, weight, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        normed, scale = _normed(x, ctx.eps)
        grad = grads[0].to(normed.dtype)
        grad_weight = grad_x = None
        if ctx.needs_input_grad[1]:
            used = normed.to(x.dtype).to(normed.dtype)
            grad_weight = (grad * used).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            inner = grad * weight
            along = torch.linalg.vecdot(inner, normed).div_(x.shape[-1]).unsqueeze(-1)
            grad_x = inner.addcmul_(normed, along, value=-1).mul_(scale).to(x.dtype)
        return grad_x, grad_weight, None


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension of x [..., D] with weight [D]; differentiable in both."""
    if not torch.is_grad_enabled():
        return _weighted(x, weight, eps)
    normed: Tensor = _RmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return normed


def add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(RMSNorm of x + residual, x + residual), all [..., D]; differentiable in all three."""
    summed = x + residual
    return rms_norm_reference(summed, weight, eps), summed


@jit
def normed_rows(x, weight, eps, D: tl.constexpr, dtype: tl.constexpr):
    """The norm of rows x [ROWS, BLOCK_D] in float32, zeros past D, in dtype, as every kernel rounds
    it: before the weight [BLOCK_D] and after.
    """
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / D + eps)
    normed = rounded(x * scale[:, None], dtype).to(tl.float32)
    return rounded(normed * weight.to(tl.float32)[None, :], dtype)


@jit
def _forward_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr,
    num_rows, inner, stride_outer, stride_inner, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    IN_ORDER: tl.constexpr = False, BOTH: tl.constexpr = False, EARLY: tl.constexpr = False,
):  # fmt: skip
    """IN_ORDER: y is written in the order of kernels/column_order.py; BOTH: as it is too, behind
    those rows. EARLY: begins while the launch before it runs, and lets the next begin at once.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    # first of all: while decoding no cache holds it, and no launch of a step writes it
    weight = tl.load(weight_ptr + columns, mask=columns < D, other=0.0)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    inside = (rows < num_rows)[:, None] & (columns < D)[None, :]
    starts = (rows // inner) * stride_outer + (rows % inner) * stride_inner
    x = tl.load(x_ptr + starts[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    flat = rows[:, None] * D + columns[None, :]
    dtype = y_ptr.dtype.element_ty
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + flat, mask=inside, other=0.0).to(tl.float32)
        kept = rounded(x, dtype)
        tl.store(sum_ptr + flat, kept, mask=inside)
        x = kept.to(tl.float32)
    y = normed_rows(x, weight, eps, D, dtype)
    if BOTH:
        tl.store(y_ptr + num_rows * D + flat, y, mask=inside)
    if IN_ORDER:
        flat = rows[:, None] * D + place_of(columns)[None, :]
    tl.store(y_ptr + flat, y, mask=inside)


@jit
def _row_gradients(x, dy, weight, eps, D: tl.constexpr):
    """(gradient by x, x / rms(x)) of a tile of rows, all in float32."""
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / D + eps)
    normed = x * scale[:, None]
    inner = dy * weight
    along = tl.sum(inner * normed, axis=1) / D
    return (inner - normed * along[:, None]) * scale[:, None], normed


@jit
def _backward_kernel(
    dy_ptr, ds_ptr, x_ptr, weight_ptr, dx_ptr,
    num_rows, inner, stride_outer, stride_inner, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK_D)
    weight = tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (rows < num_rows)[:, None] & (columns < D)[None, :]
    starts = (rows // inner) * stride_outer + (rows % inner) * stride_inner
    at = x_ptr + starts[:, None] + columns[None, :]
    x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    flat = rows[:, None] * D + columns[None, :]
    dy = tl.load(dy_ptr + flat, mask=inside, other=0.0).to(tl.float32)
    dx, _ = _row_gradients(x, dy, weight[None, :], eps, D)
    if HAS_RESIDUAL:
        dx += tl.load(ds_ptr + flat, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx_ptr + flat, rounded(dx, dx_ptr.dtype.element_ty), mask=inside)


@jit(do_not_specialize=["num_tiles"])
def _backward_weight_kernel(
    dy_ptr, ds_ptr, x_ptr, weight_ptr, dx_ptr, parts_ptr,
    num_rows, inner, stride_outer, stride_inner, eps, num_tiles,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """The same with the weight's gradient: a program takes every num_programs-th tile of rows and
    reads the next one while it computes one.
    """
    columns = tl.arange(0, BLOCK_D)
    weight = tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    d_weight = tl.zeros([ROWS, BLOCK_D], tl.float32)
    dtype = dx_ptr.dtype.element_ty
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (rows < num_rows)[:, None] & (columns < D)[None, :]
    flat = rows.to(tl.int64)[:, None] * D + columns[None, :]
    starts = (rows // inner).to(tl.int64) * stride_outer + (rows % inner) * stride_inner
    x_read = tl.load(x_ptr + starts[:, None] + columns[None, :], mask=inside, other=0.0)
    dy_read = tl.load(dy_ptr + flat, mask=inside, other=0.0)
    for _ in range(num_tiles):
        x, dy = x_read.to(tl.float32), dy_read.to(tl.float32)
        here, to = inside, flat
        rows += tl.num_programs(0) * ROWS
        inside = (rows < num_rows)[:, None] & (columns < D)[None, :]
        flat = rows.to(tl.int64)[:, None] * D + columns[None, :]
        starts = (rows // inner).to(tl.int64) * stride_outer + (rows % inner) * stride_inner
        x_read = tl.load(x_ptr + starts[:, None] + columns[None, :], mask=inside, other=0.0)
        dy_read = tl.load(dy_ptr + flat, mask=inside, other=0.0)
        dx, normed = _row_gradients(x, dy, weight[None, :], eps, D)
        d_weight += dy * rounded(normed, dtype).to(tl.float32)
        if HAS_RESIDUAL:
            dx += tl.load(ds_ptr + to, mask=here, other=0.0).to(tl.float32)
        tl.store(dx_ptr + to, rounded(dx, dtype), mask=here)
    at = parts_ptr + tl.program_id(0) * D + columns
    tl.store(at, tl.sum(d_weight, axis=0), mask=columns < D)


@jit(do_not_specialize=["num_parts"])
def _sum_parts_kernel(
    parts_ptr, out_ptr, num_parts, D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr
):
    """out [D] = the sum over parts [P, D] in one order, rounded once."""
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for first in range(0, num_parts, BLOCK_P):
        parts = first + tl.arange(0, BLOCK_P)
        inside = (parts < num_parts)[:, None] & (columns < D)[None, :]
        at = parts_ptr + parts[:, None] * D + columns[None, :]
        total += tl.load(at, mask=inside, other=0.0)
    summed = rounded(tl.sum(total, axis=0), out_ptr.dtype.element_ty)
    tl.store(out_ptr + columns, summed, mask=columns < D)


def tile_of(width: int) -> dict[str, int]:
    """Launch table: it depends on the row's width alone, so a row's sum has one order."""
    block = max(16, triton.next_power_of_2(width))
    return {
        "BLOCK_D": block,
        "ROWS": max(1, 2048 // block),
        "num_warps": 4 if block <= 2048 else 8 if block <= 8192 else 16,
    }


def backward_tile_of(width: int) -> dict[str, int]:
    """The same of the backward pass for a frozen weight: half the warps hold a row up to 4,096
    numbers wide, so twice the programs read; 4 and 10 % faster on an H200 than with 8 warps.
    """
    tile = tile_of(width)
    return tile | {"num_warps": 4} if tile["BLOCK_D"] == 4096 else tile


def _rows_of(x: Tensor) -> tuple[Tensor, tuple[int, int, int, int]]:
    """x and (rows, rows an outer step has, stride of the outer and of the inner step)."""
    if x.dim() == 3 and x.stride(-1) == 1:
        return x, (x.shape[0] * x.shape[1], x.shape[1], x.stride(0), x.stride(1))
    x = x.contiguous()
    return x, (x.numel() // x.shape[-1], 1, x.shape[-1], 0)


def _forward_triton(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    written: Written = AS_THEY_ARE,
) -> tuple[Tensor, Tensor]:
    x, rows = _rows_of(x)
    shape = (2, *x.shape) if written.both else x.shape
    y = torch.empty(shape, dtype=x.dtype, device=x.device)
    summed = y if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tile = tile_of(x.shape[-1])
    if rows[0]:
        _forward_kernel[(triton.cdiv(rows[0], tile["ROWS"]),)](
            x, x if residual is None else residual.contiguous(), weight, y, summed, *rows, eps,
            D=x.shape[-1], HAS_RESIDUAL=residual is not None, enable_fp_fusion=True, **tile,
            **written.options(),
        )  # fmt: skip
    return y, (x if residual is None else summed)


def _backward_triton(
    dy: Tensor, ds: Tensor | None, x: Tensor, weight: Tensor, eps: float, needs_weight: bool
) -> tuple[Tensor, Tensor | None]:
    x, rows = _rows_of(x)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not rows[0]:
        return dx, torch.zeros_like(weight) if needs_weight else None
    width = x.shape[-1]
    tile = tile_of(width) if needs_weight else backward_tile_of(width)
    tiles = triton.cdiv(rows[0], tile["ROWS"])
    inputs = (dy.contiguous(), dx if ds is None else ds.contiguous(), x, weight, dx)
    constants = {"D": width, "HAS_RESIDUAL": ds is not None, "enable_fp_fusion": True, **tile}
    if not needs_weight:
        _backward_kernel[(tiles,)](*inputs, *rows, eps, **constants)
        return dx, None
    warps = SHORT_WEIGHT_WARPS if tile["BLOCK_D"] <= 256 else WEIGHT_WARPS
    programs = min(tiles, warps // tile["num_warps"])
    parts = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    d_weight = torch.empty(width, dtype=weight.dtype, device=x.device)
    _backward_weight_kernel[(programs,)](
        *inputs, parts, *rows, eps, triton.cdiv(tiles, programs), **constants
    )
    _sum_parts_kernel[(triton.cdiv(width, PART_TILE["BLOCK_D"]),)](
        parts, d_weight, programs, D=width, **PART_TILE
    )
    return dx, d_weight


class _RmsNormTriton(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        y, normed_of = _forward_triton(x, residual, weight, eps)
        ctx.save_for_backward(normed_of, weight)
        ctx.eps, ctx.has_residual = eps, residual is not None
        return y, normed_of if residual is not None else y.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        ds = grads[1] if ctx.has_residual else None
        dx, d_weight = _backward_triton(grads[0], ds, x, weight, ctx.eps, ctx.needs_input_grad[2])
        return dx, dx if ctx.has_residual else None, d_weight, None


def rms_norm_triton(
    x: Tensor, weight: Tensor, eps: float, *, written: Written = AS_THEY_ARE
) -> Tensor:
    """`rms_norm_reference` as one launch either way (two where the weight is trained)."""
    if not torch.is_grad_enabled():
        return _forward_triton(x, None, weight, eps, written)[0]
    assert written == AS_THEY_ARE, "other ways are for products without gradient"
    return _RmsNormTriton.apply(x, None, weight, eps)[0]


def add_rms_norm_triton(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, written: Written = AS_THEY_ARE
) -> tuple[Tensor, Tensor]:
    """`add_rms_norm_reference` as one launch either way (two where the weight is trained)."""
    if not torch.is_grad_enabled():
        return _forward_triton(x, residual, weight, eps, written)
    assert written == AS_THEY_ARE, "other ways are for products without gradient"
    pair: tuple[Tensor, Tensor] = _RmsNormTriton.apply(x, residual, weight, eps)
    return pair


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, written: Written = AS_THEY_ARE) -> Tensor:
    """RMSNorm over the last dimension of x [..., D] with weight [D]; differentiable in both.

    written: another way to write y, of x [T, D] without gradient.
    """
    if uses_triton(x):
        return rms_norm_triton(x, weight, eps, written=written)
    return written.of(rms_norm_reference(x, weight, eps))


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, written: Written = AS_THEY_ARE
) -> tuple[Tensor, Tensor]:
    """(RMSNorm of x + residual, x + residual), all [..., D]; differentiable in all three.

    written: see `rms_norm`; the sum stays as it is.
    """
    if uses_triton(x):
        return add_rms_norm_triton(x, residual, weight, eps, written=written)
    y, summed = add_rms_norm_reference(x, residual, weight, eps)
    return written.of(y), summed
