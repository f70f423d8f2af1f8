"""A matrix in 8 bits by rows: the form that the output head (and a table tied to it) may have.

Shapes: weight [N, K] -> values int8 [N, K], scale float32 [N]. scale = max |row| / 127, value =
round(weight / scale) to nearest even (0 for a row of zeros); decoded weight = round_dtype(value *
scale), one rounding from float32. This is the only definition: trainer and sampler read the same
decoded numbers. Bytes a weight: 1, decoding reads that and writes 2 (16-bit) or 4. Symmetric 8 bits
by row as in arXiv 2208.07339, section 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparring.kernels import jit, rounded, tl, triton

QUANTIZE_WEIGHTS = 1 << 24
"""Weights that are quantised at a time."""

SLICE_BYTES = 64 << 20
"""Bytes of decoded rows that exist at once where a product reads the whole matrix."""

BLOCK_K = 1024
NUM_WARPS = 4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Int8Matrix:
    """values int8 [N, K], scale float32 [N]; dtype: what it decodes to."""

    values: Tensor
    scale: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    def __len__(self) -> int:
        return len(self.values)


def quantize_int8(
    weight: Tensor, *, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> Int8Matrix:
    """A matrix [N, K] in 8 bits by rows, on `device` and to be decoded as `dtype` (its own by
    default); no whole copy of it is made.
    """
    device, dtype = device or weight.device, dtype or weight.dtype
    values = torch.empty(weight.shape, dtype=torch.int8, device=device)
    scale = torch.empty(len(weight), dtype=torch.float32, device=device)
    step = max(1, QUANTIZE_WEIGHTS // max(1, weight.shape[1]))
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        part = weight[rows].to(device).to(dtype).float()
        scale[rows] = torch.linalg.vector_norm(part, ord=torch.inf, dim=1) / 127.0
        divisor = torch.where(scale[rows] > 0, scale[rows], torch.ones_like(scale[rows]))
        values[rows] = (part / divisor[:, None]).round_().clamp_(-127, 127).to(torch.int8)
    return Int8Matrix(values=values, scale=scale, dtype=dtype)


def dequantize_int8_reference(
    matrix: Int8Matrix, *, rows: slice = slice(None), out: Tensor | None = None
) -> Tensor:
    """Decoded rows (all by default) [n, K], into `out` where given."""
    decoded = matrix.values[rows].float().mul_(matrix.scale[rows, None]).to(matrix.dtype)
    return decoded if out is None else out.copy_(decoded)


@jit
def _dequantize_kernel(
    values_ptr, scale_ptr, out_ptr, first, K: tl.constexpr, BLOCK_K: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = columns < K
    source = row + first
    values = tl.load(values_ptr + source * K + columns, mask=inside, other=0).to(tl.float32)
    weights = values * tl.load(scale_ptr + source)
    to = out_ptr + row * K + columns
    tl.store(to, rounded(weights, out_ptr.dtype.element_ty), mask=inside)


def dequantize_int8_triton(
    matrix: Int8Matrix, *, rows: slice = slice(None), out: Tensor | None = None
) -> Tensor:
    """`dequantize_int8_reference` in one launch."""
    first, last, _ = rows.indices(len(matrix))
    columns = matrix.shape[1]
    if out is None:
        out = torch.empty(last - first, columns, dtype=matrix.dtype, device=matrix.values.device)
    if last > first:
        _dequantize_kernel[(last - first, triton.cdiv(columns, BLOCK_K))](
            matrix.values, matrix.scale, out, first,
            K=columns, BLOCK_K=BLOCK_K, num_warps=NUM_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def dequantize_int8(
    matrix: Int8Matrix, *, rows: slice = slice(None), out: Tensor | None = None
) -> Tensor:
    """Decoded rows (all by default) [n, K] of a matrix in 8 bits, into `out` where given."""
    is_card = matrix.values.is_cuda and triton is not None
    chosen = dequantize_int8_triton if is_card else dequantize_int8_reference
    return chosen(matrix, rows=rows, out=out)


def decoded_slices(weight: Tensor | Int8Matrix) -> Iterator[tuple[slice, Tensor]]:
    """(rows, those rows as an ordinary tensor) over the whole matrix; a plain tensor in one piece,
    8 bits through one buffer of at most SLICE_BYTES, which the next piece overwrites.
    """
    if isinstance(weight, Tensor):
        yield slice(0, len(weight)), weight
        return
    num_rows, columns = weight.shape
    step = min(num_rows, max(16, SLICE_BYTES // (columns * weight.dtype.itemsize) // 16 * 16))
    buffer = torch.empty(step, columns, dtype=weight.dtype, device=weight.values.device)
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        yield rows, dequantize_int8(weight, rows=rows, out=buffer[: rows.stop - start])
