"""The small launches between a decode step's products, in a chain that overlaps.

Norm (with what is added before it) and SwiGLU of kernels/norm.py and kernels/swiglu.py, the same
bits, in launches that may begin while the product before them runs (programmatic dependent launch,
sm_90 and later). They need little of a multiprocessor, so they are there early, and what they do
with the time is to ask for weights of the next product to come to the L2 cache: `Ahead` says
which. Then every program waits for the launch before, reads, computes and writes. Weights do not
change during a step, so asking early is safe, and asking in vain costs a request.

Shapes: x and residual [T, D], gate_up [T, 2F]. Bytes: those of norm.py and swiglu.py; what is asked
for goes to the L2 cache once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparring.kernels import jit, tl, triton
from sparring.kernels.norm import _forward_kernel as norm_rows
from sparring.kernels.norm import tile_of
from sparring.kernels.splits import prefetch
from sparring.kernels.swiglu import BLOCK_F, NUM_WARPS
from sparring.kernels.swiglu import _forward_kernel as swiglu_rows

__all__ = ["Ahead", "add_norm_ahead", "ahead_of", "swiglu_ahead"]

LINE = 64
"""Numbers of 16 bits in a line of the cache."""
PROGRAMS = 96
"""Programs that ask, at least: one would take as long as the product."""


@dataclass(frozen=True, slots=True, eq=False)
class Ahead:
    """Weights to be asked for: so many lines of a matrix, every `stride`-th from `first` on."""

    weight: Tensor
    lines: int
    stride: int
    first: int


def ahead_of(weight: Tensor, num_bytes: int, *, turn: int = 0) -> Ahead:
    """Lines evenly spread over a weight, of num_bytes together or all; turn: other ones, as two
    launches ask for the same weight.
    """
    total = weight.numel() // LINE
    if num_bytes < LINE * 2:
        return Ahead(weight, 0, 1, 0)
    stride = max(1, -(-total * LINE * 2 // num_bytes))
    first = turn % stride
    if turn and not first:
        return Ahead(weight, 0, stride, 0)
    return Ahead(weight, (total - first + stride - 1) // stride, stride, first)


@jit
def ask(at_ptr, lines, stride, first, program, programs):
    """This program's share of the lines."""
    lanes = tl.arange(0, 256)
    for i in tl.range(program * 256, lines, programs * 256):
        line = tl.minimum(i + lanes, lines - 1) * stride + first
        prefetch(at_ptr + line.to(tl.int64) * 64)


@jit(do_not_specialize=["num_rows", "lines", "line_stride", "first", "row_programs"])
def _norm_ahead_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, ahead_ptr, num_rows, lines, line_stride, first,
    row_programs, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    if OVERLAPS:
        ask(ahead_ptr, lines, line_stride, first, tl.program_id(0), tl.num_programs(0))
        tl.extra.cuda.gdc_launch_dependents()  # which all wait for this launch's end
        tl.extra.cuda.gdc_wait()
    if tl.program_id(0) < row_programs:
        norm_rows(
            x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, num_rows, 1, D, 0, eps, D, BLOCK_D,
            ROWS, HAS_RESIDUAL,
        )  # fmt: skip


@jit(do_not_specialize=["lines", "line_stride", "first", "rows"])
def _swiglu_ahead_kernel(
    x_ptr, h_ptr, ahead_ptr, stride_xt, lines, line_stride, first, rows,
    F: tl.constexpr, BLOCK_F: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    if OVERLAPS:
        program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        programs = tl.num_programs(0) * tl.num_programs(1)
        ask(ahead_ptr, lines, line_stride, first, program, programs)
        tl.extra.cuda.gdc_launch_dependents()  # which all wait for this launch's end
        tl.extra.cuda.gdc_wait()
    if tl.program_id(0) < rows:
        swiglu_rows(x_ptr, h_ptr, stride_xt, F, BLOCK_F)


def add_norm_ahead(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    ahead: Ahead,
    *,
    overlaps: bool = True,
) -> tuple[Tensor, Tensor]:
    """(RMSNorm of x + residual, x + residual) for x [T, D], as `add_rms_norm`; without a residual
    (RMSNorm of x, x). overlaps: asks and is launched early, which needs sm_90.
    """
    x = x.contiguous()
    rows, width = x.shape
    y, tile = torch.empty_like(x), tile_of(width)
    summed = x if residual is None else torch.empty_like(x)
    row_programs = triton.cdiv(rows, tile["ROWS"])
    _norm_ahead_kernel[(max(row_programs, PROGRAMS),)](
        x, x if residual is None else residual, weight, y, summed, ahead.weight, rows, ahead.lines,
        ahead.stride, ahead.first, row_programs, eps, D=width, HAS_RESIDUAL=residual is not None,
        enable_fp_fusion=True, OVERLAPS=overlaps, **tile, **_early(overlaps),
    )  # fmt: skip
    return y, summed


def _early(overlaps: bool) -> dict[str, bool]:
    return {"launch_pdl": True} if overlaps else {}


def swiglu_ahead(gate_up: Tensor, ahead: Ahead, *, overlaps: bool = True) -> Tensor:
    """silu(gate) * up for gate_up [T, 2F], as `swiglu`; overlaps: as above."""
    rows, half = gate_up.shape[0], gate_up.shape[1] // 2
    h = torch.empty(rows, half, dtype=gate_up.dtype, device=gate_up.device)
    blocks = triton.cdiv(half, BLOCK_F)
    _swiglu_ahead_kernel[(max(rows, triton.cdiv(PROGRAMS, blocks)), blocks)](
        gate_up, h, ahead.weight, gate_up.stride(0), ahead.lines, ahead.stride, ahead.first, rows,
        F=half, BLOCK_F=BLOCK_F, OVERLAPS=overlaps, num_warps=NUM_WARPS, enable_fp_fusion=True,
        **_early(overlaps),
    )  # fmt: skip
    return h
