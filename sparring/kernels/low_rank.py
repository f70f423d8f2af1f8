"""An adapter's addition inside a product's kernel: acc += scale xa B^T, part by part.

The functions here are called by the kernels of matmul.py, nf4_matmul.py and lora.py, so that all
add in one order: the product of an xa and a B tile from zero, in float32, times the scale.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparring.kernels import dot, jit, tl, triton


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LowRank:
    """An adapter's addition to a product: y[:, rows] += scale xa[:, ranks] B[b_rows]^T a part.

    xa 16 bits [T, sum of ranks], b 16 bits [sum of adapted outputs, rank]. parts int32 [P, 4] on
    the device: first and last output of the part (exclusive), its first row in b, its first
    column in xa. granule: what all those outputs are multiples of; with tiles that divide it a
    program meets one part only. scratch: set where xa may still be being written (`launch`'s
    `lets_next_start`): the memory used for that, held until the product is under way.
    """

    xa: Tensor
    b: Tensor
    parts: Tensor
    scale: float
    granule: int = 1
    scratch: Tensor | None = None


@jit
def part_of(parts_ptr, n, NUM_PARTS: tl.constexpr):
    """The part that output n is in: its row of B (negative: in none) and first column of xa."""
    row = -1
    column = 0
    for part in tl.static_range(NUM_PARTS):
        first = tl.load(parts_ptr + 4 * part)
        here = (n >= first) & (n < tl.load(parts_ptr + 4 * part + 1))
        row = tl.where(here, tl.load(parts_ptr + 4 * part + 2) + n - first, row)
        column = tl.where(here, tl.load(parts_ptr + 4 * part + 3), column)
    return row, column


@jit
def rows_of_b(
    b_ptr, row, last_row, BLOCK_N: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr
):
    """B [N, R] from `row` on; zeros where that is negative, or from `last_row` on."""
    r = tl.arange(0, BLOCK_R)
    i = tl.arange(0, BLOCK_N)
    return tl.load(
        b_ptr + (row + i)[:, None] * RANK + r[None, :],
        mask=((row >= 0) & (i < last_row))[:, None] & (r < RANK)[None, :], other=0.0,
    )  # fmt: skip


@jit
def rows_of_xa(
    xa_ptr, row, column, t, num_rows, stride_xat, RANK: tl.constexpr, BLOCK_R: tl.constexpr
):
    """xa [T, R] from `column` on; zeros where `row` is negative."""
    r = tl.arange(0, BLOCK_R)
    return tl.load(
        xa_ptr + t[:, None] * stride_xat + (column + r)[None, :],
        mask=((row >= 0) & (t < num_rows))[:, None] & (r < RANK)[None, :], other=0.0,
    )  # fmt: skip


@jit
def add_low_rank(
    acc, xa_ptr, b_ptr, parts_ptr, scale, n, t, num_rows, stride_xat,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr, NUM_PARTS: tl.constexpr,
):  # fmt: skip
    """acc [N, T] + scale xa B^T part by part, for tiles that may meet several parts."""
    r = tl.arange(0, BLOCK_R)
    for part in tl.static_range(NUM_PARTS):
        first = tl.load(parts_ptr + 4 * part)
        row = tl.load(parts_ptr + 4 * part + 2) + n - first
        column = tl.load(parts_ptr + 4 * part + 3) + r
        here = (n >= first) & (n < tl.load(parts_ptr + 4 * part + 1))
        b = tl.load(
            b_ptr + row[:, None] * RANK + r[None, :],
            mask=here[:, None] & (r < RANK)[None, :], other=0.0,
        )  # fmt: skip
        xa = tl.load(
            xa_ptr + t[:, None] * stride_xat + column[None, :],
            mask=(t < num_rows)[:, None] & (r < RANK)[None, :], other=0.0,
        )  # fmt: skip
        acc += scale * dot(b, tl.trans(xa), tl.zeros(acc.shape, tl.float32))
    return acc


def low_rank_arguments(low_rank: LowRank | None, x: Tensor, block_n: int) -> dict[str, object]:
    """A kernel's arguments about the adapter, or about there being none."""
    if low_rank is None:
        return {
            "xa_ptr": x, "b_ptr": x, "parts_ptr": x, "scale": 0.0, "stride_xat": 0,
            "NUM_PARTS": 0, "ALIGNED": False, "RANK": 1, "BLOCK_R": 16,
        }  # fmt: skip
    rank = low_rank.b.shape[1]
    return {
        "xa_ptr": low_rank.xa, "b_ptr": low_rank.b, "parts_ptr": low_rank.parts,
        "scale": low_rank.scale, "stride_xat": low_rank.xa.stride(0),
        "NUM_PARTS": len(low_rank.parts), "ALIGNED": low_rank.granule % block_n == 0,
        "RANK": rank, "BLOCK_R": max(16, triton.next_power_of_2(rank)),
    }  # fmt: skip
