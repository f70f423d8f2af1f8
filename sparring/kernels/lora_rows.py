"""Low-rank adapters over many rows, as in training: two small products beside a big one.

    u[:, ranks of part] = round(scale x[:, columns of part] M_part)          `shrink_rows`
    y[:, columns of part] = round(y + scale u[:, ranks of part] M_part^T)    `add_rows`, in place

Both run all parts of a fused weight in one launch; M [rows of all parts, r] stacks the parts' B.
Forward the second adds (x A^T) B^T to the base's product, backward the first makes t = scale dy B.
Products of 16-bit values are summed in float32 in a fixed order.

Bytes a row of N numbers: shrink 2 N, addition 4 N; M comes from L2. On an H200 8192 rows of 37888
columns take 0.143 ms and 0.345 ms (3.6 TB/s). A library's product that adds to its output (beta =
1) takes a slower algorithm there: 0.30 ms more, after 0.20 ms for writing what it adds to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparring.kernels import Capability, cdiv, dot, jit, power_of_two, rounded, tl, triton

SHRINK_TILE = {"BLOCK_K": 128, "num_warps": 4, "num_stages": 4}
OUTER_TILE = {"BLOCK_T": 64, "BLOCK_N": 128, "num_warps": 4, "num_stages": 4}
ADD_TILE = {"BLOCK_T": 32, "BLOCK_N": 128, "num_warps": 4}
MAX_RANK = 128
FULL = 96
"""Programs that keep a card's memory busy: with fewer rows a program takes fewer of them."""


@jit(do_not_specialize=["num_rows"])
def _shrink_kernel(
    x_ptr, m_ptr, parts_ptr, u_ptr, scale, num_rows, stride_xt, stride_ut,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, IS_EVEN: tl.constexpr,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One block of rows of one part; IS_EVEN: parts begin and end at multiples of BLOCK_K."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.arange(0, BLOCK_R)
    part = parts_ptr + 4 * tl.program_id(1)
    first = tl.load(part)
    length = tl.load(part + 1) - first
    row = tl.load(part + 2)
    column = tl.load(part + 3)
    if IS_EVEN:
        first = tl.multiple_of(first, BLOCK_K)
        row = tl.multiple_of(row, BLOCK_K)
    k = tl.arange(0, BLOCK_K)
    x_at = x_ptr + t.to(tl.int64)[:, None] * stride_xt + (first + k)[None, :]
    m_at = m_ptr + (row + k)[:, None] * RANK + r[None, :]
    acc = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for start in range(0, length, BLOCK_K):
        if IS_EVEN:
            x = tl.load(x_at, mask=(t < num_rows)[:, None], other=0.0)
            m = tl.load(m_at, mask=(r < RANK)[None, :], other=0.0)
        else:
            inside = start + k < length
            x = tl.load(x_at, mask=(t < num_rows)[:, None] & inside[None, :], other=0.0)
            m = tl.load(m_at, mask=inside[:, None] & (r < RANK)[None, :], other=0.0)
        acc = dot(x, m, acc)
        x_at += BLOCK_K
        m_at += BLOCK_K * RANK
    tl.store(
        u_ptr + t.to(tl.int64)[:, None] * stride_ut + (column + r)[None, :],
        rounded(acc * scale, u_ptr.dtype.element_ty),
        mask=(t < num_rows)[:, None] & (r < RANK)[None, :],
    )  # fmt: skip


@jit
def low_rank_tile(
    u_ptr, m_ptr, parts_ptr, t, n, num_rows, num_columns, stride_ut, stride_mn, stride_mr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, NUM_PARTS: tl.constexpr,
    IS_EVEN: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """u M of rows t and columns n [BLOCK_T, BLOCK_N] in float32, zero outside all parts; IS_EVEN:
    parts begin and end at multiples of BLOCK_N.
    """
    r = tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    u_at = u_ptr + t.to(tl.int64)[:, None] * stride_ut + r[None, :]
    u_inside = (t < num_rows)[:, None] & (r < RANK)[None, :]
    if NUM_PARTS == 0:
        u = tl.load(u_at, mask=u_inside, other=0.0)
        m = tl.load(
            m_ptr + n[None, :] * stride_mn + r[:, None] * stride_mr,
            mask=(r < RANK)[:, None] & (n < num_columns)[None, :], other=0.0,
        )  # fmt: skip
        acc = dot(u, m, acc)
    elif IS_EVEN:
        begin = tl.min(n, 0)
        shift = -1
        column = 0
        for part in tl.static_range(NUM_PARTS):
            first = tl.load(parts_ptr + 4 * part)
            here = (begin >= first) & (begin < tl.load(parts_ptr + 4 * part + 1))
            shift = tl.where(here, tl.load(parts_ptr + 4 * part + 2) + begin - first, shift)
            column = tl.where(here, tl.load(parts_ptr + 4 * part + 3), column)
        column = tl.multiple_of(column, RANK)
        u = tl.load(u_at + column, mask=u_inside & (shift >= 0), other=0.0)
        m = tl.load(
            m_ptr + (shift + n - begin)[None, :] * stride_mn + r[:, None] * stride_mr,
            mask=(r < RANK)[:, None] & (n < num_columns)[None, :] & (shift >= 0), other=0.0,
        )  # fmt: skip
        acc = dot(u, m, acc)
    else:
        for part in tl.static_range(NUM_PARTS):
            first = tl.load(parts_ptr + 4 * part)
            here = (n >= first) & (n < tl.load(parts_ptr + 4 * part + 1))
            row = tl.load(parts_ptr + 4 * part + 2) + n - first
            u = tl.load(u_at + tl.load(parts_ptr + 4 * part + 3), mask=u_inside, other=0.0)
            m = tl.load(
                m_ptr + row[None, :] * stride_mn + r[:, None] * stride_mr,
                mask=(r < RANK)[:, None] & here[None, :], other=0.0,
            )  # fmt: skip
            acc = dot(u, m, acc)
    return acc


@jit(do_not_specialize=["num_rows"])
def _add_kernel(
    y_ptr, u_ptr, m_ptr, parts_ptr, scale, num_rows, num_columns, stride_yt, stride_ut,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, NUM_PARTS: tl.constexpr,
    IS_EVEN: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (t < num_rows)[:, None] & (n < num_columns)[None, :]
    at = y_ptr + t.to(tl.int64)[:, None] * stride_yt + n[None, :]
    y = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    product = low_rank_tile(
        u_ptr, m_ptr, parts_ptr, t, n, num_rows, num_columns, stride_ut, RANK, 1,
        BLOCK_T, BLOCK_N, NUM_PARTS, IS_EVEN, RANK, BLOCK_R,
    )  # fmt: skip
    tl.store(at, rounded(tl.fma(product, scale, y), y_ptr.dtype.element_ty), mask=inside)


@jit(do_not_specialize=["num_rows", "rows_each"])
def _outer_kernel(
    x_ptr, u_ptr, parts_ptr, out_ptr, scale, num_rows, rows_each, stride_xt, stride_ut, stride_os,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, NUM_PARTS: tl.constexpr,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One block of columns, which lies in one part or in none, over one share of the rows."""
    begin = tl.program_id(0) * BLOCK_N
    row = -1
    column = 0
    for part in tl.static_range(NUM_PARTS):
        first = tl.load(parts_ptr + 4 * part)
        here = (begin >= first) & (begin < tl.load(parts_ptr + 4 * part + 1))
        row = tl.where(here, tl.load(parts_ptr + 4 * part + 2) + begin - first, row)
        column = tl.where(here, tl.load(parts_ptr + 4 * part + 3), column)
    if row >= 0:
        column = tl.multiple_of(column, RANK)
        n = tl.arange(0, BLOCK_N)
        r = tl.arange(0, BLOCK_R)
        start = tl.program_id(1) * rows_each
        end = tl.minimum(start + rows_each, num_rows)
        t = start + tl.arange(0, BLOCK_T)
        x_at = x_ptr + t.to(tl.int64)[:, None] * stride_xt + (begin + n)[None, :]
        u_at = u_ptr + t.to(tl.int64)[:, None] * stride_ut + (column + r)[None, :]
        acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
        for done in range(start, end, BLOCK_T):
            inside = (t < end + start - done)[:, None]
            x = tl.load(x_at, mask=inside, other=0.0)
            u = tl.load(u_at, mask=inside & (r < RANK)[None, :], other=0.0)
            acc = dot(tl.trans(x), u, acc)
            x_at += BLOCK_T * stride_xt
            u_at += BLOCK_T * stride_ut
        out_at = out_ptr + tl.program_id(1).to(tl.int64) * stride_os
        tl.store(
            out_at + (row + n)[:, None] * RANK + r[None, :], acc * scale, mask=(r < RANK)[None, :]
        )


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """Where the adapted matrices of a fused weight lie.

    spans: first and last column of the wide tensor (exclusive), first row of the small matrix,
    first column of the narrow tensor, a part; table: the same, int32 [P, 4] on the device. granule:
    what all columns are multiples of. num_ranks: columns of the narrow tensor. num_rows: of the
    small matrix.
    """

    spans: tuple[tuple[int, int, int, int], ...]
    table: Tensor
    granule: int
    num_ranks: int
    num_rows: int


def padded(rank: int) -> int:
    """Columns that a tile of `rank` numbers takes."""
    return max(16, power_of_two(rank))


def shrink_tile(block_r: int) -> dict[str, int]:
    """Of `_shrink_kernel`, by `padded` rank: what fits into 99 KiB of shared memory."""
    return SHRINK_TILE if block_r <= 64 else {**SHRINK_TILE, "BLOCK_K": 64}


def outer_tile(block_r: int) -> dict[str, int]:
    """Of `_outer_kernel`, by `padded` rank: what registers hold."""
    return OUTER_TILE if block_r <= 64 else {**OUTER_TILE, "BLOCK_N": 64}


def takes_rows(x: Tensor, rank: int, capability: Capability) -> bool:
    """Whether the kernels of this file run on x: 16 bits, on a GPU whose dots Triton has, up to
    rank MAX_RANK.
    """
    is_half = x.dtype in (torch.bfloat16, torch.float16) and rank <= MAX_RANK
    return x.is_cuda and is_half and triton is not None and capability.tensor_dots


def shrink_rows_reference(x: Tensor, m: Tensor, parts: Parts, scale: float) -> Tensor:
    """round(scale x m) part by part with library products: x [T, K], m [rows of all parts, r] ->
    [T, P r].
    """
    u = x.new_empty(len(x), parts.num_ranks)
    for first, last, row, column in parts.spans:
        out, rows = u[:, column : column + m.shape[1]], m[row : row + last - first]
        torch.addmm(out, x[:, first:last], rows, beta=0.0, alpha=scale, out=out)
    return u


def add_rows_reference(y: Tensor, u: Tensor, m: Tensor, parts: Parts, scale: float) -> Tensor:
    """y + scale u m^T part by part, rounded once, in place with library products: y [T, N],
    u [T, P r], m [rows of all parts, r].
    """
    for first, last, row, column in parts.spans:
        narrow, rows = u[:, column : column + m.shape[1]], m[row : row + last - first]
        y[:, first:last].addmm_(narrow, rows.T, alpha=scale)
    return y


def shrink_rows_triton(x: Tensor, m: Tensor, parts: Parts, scale: float) -> Tensor:
    """`shrink_rows_reference` in one launch; m is contiguous."""
    assert x.stride(1) == 1, "rows lie in one piece"
    num_rows, rank, count = len(x), m.shape[1], len(parts.spans)
    u = x.new_empty(num_rows, parts.num_ranks)
    block_t = next((size for size in (64, 32) if num_rows * count >= size * FULL), 16)
    tile = shrink_tile(padded(rank))
    if num_rows:
        _shrink_kernel[(cdiv(num_rows, block_t), count)](
            x, m, parts.table, u, scale, num_rows, x.stride(0), u.stride(0), BLOCK_T=block_t,
            IS_EVEN=parts.granule % tile["BLOCK_K"] == 0, RANK=rank, BLOCK_R=padded(rank),
            enable_fp_fusion=False, **tile,
        )  # fmt: skip
    return u


def add_rows_triton(y: Tensor, u: Tensor, m: Tensor, parts: Parts, scale: float) -> Tensor:
    """`add_rows_reference` in one launch that reads and writes y once; m is contiguous."""
    assert y.stride(1) == 1, "rows lie in one piece"
    (num_rows, num_columns), rank = y.shape, m.shape[1]
    if num_rows:
        grid = (
            cdiv(num_columns, ADD_TILE["BLOCK_N"]),
            cdiv(num_rows, ADD_TILE["BLOCK_T"]),
        )
        _add_kernel[grid](
            y, u, m, parts.table, scale, num_rows, num_columns, y.stride(0), u.stride(0),
            NUM_PARTS=len(parts.spans), IS_EVEN=parts.granule % ADD_TILE["BLOCK_N"] == 0,
            RANK=rank, BLOCK_R=padded(rank), enable_fp_fusion=False, **ADD_TILE,
        )  # fmt: skip
    return y


def outer_rows_reference(x: Tensor, u: Tensor, parts: Parts, scale: float) -> Tensor:
    """scale x^T u part by part with library products, in float32 at least: x [T, N], u [T, P r] ->
    [rows of all parts, r].
    """
    rank = parts.num_ranks // len(parts.spans)
    if len(parts.spans) == 1:
        ((first, last, _, column),) = parts.spans
        product = wide_product(x[:, first:last].T, u[:, column : column + rank])
        return product if scale == 1.0 else product.mul_(scale)
    wide = torch.promote_types(x.dtype, torch.float32)
    out = torch.empty(parts.num_rows, rank, dtype=wide, device=x.device)
    for first, last, row, column in parts.spans:
        product = wide_product(x[:, first:last].T, u[:, column : column + rank])
        torch.mul(product, scale, out=out[row : row + last - first])
    return out


def outer_rows_triton(x: Tensor, u: Tensor, parts: Parts, scale: float) -> Tensor:
    """`outer_rows_reference` in one launch that reads x once, and one that adds up shares of the
    rows where there are several; the granule is a multiple of the tile's columns.
    """
    assert x.stride(1) == 1, "rows lie in one piece"
    (num_rows, num_columns), rank = x.shape, parts.num_ranks // len(parts.spans)
    tile = outer_tile(padded(rank))
    assert parts.granule % tile["BLOCK_N"] == 0, "a block of columns lies in one part"
    blocks, block_t = num_columns // tile["BLOCK_N"], tile["BLOCK_T"]
    shares = max(1, min(-(-2 * FULL // blocks), num_rows // (4 * block_t)))
    rows_each = cdiv(cdiv(num_rows, shares), block_t) * block_t
    shares = max(1, cdiv(num_rows, max(1, rows_each)))
    out = torch.empty(shares, parts.num_rows, rank, dtype=torch.float32, device=x.device)
    _outer_kernel[(blocks, shares)](
        x, u, parts.table, out, scale, num_rows, rows_each, x.stride(0), u.stride(0),
        out.stride(0), NUM_PARTS=len(parts.spans), RANK=rank, BLOCK_R=padded(rank),
        enable_fp_fusion=False, **tile,
    )  # fmt: skip
    return out[0] if shares == 1 else out.sum(0)


def shrink_rows(
    x: Tensor, m: Tensor, parts: Parts, scale: float, *, capability: Capability
) -> Tensor:
    """round(scale x m), see `shrink_rows_reference`; no gradient. capability: the model's.

    One part alone is the library's: it is as fast, and sooner launched.
    """
    if len(parts.spans) > 1 and takes_rows(x, m.shape[1], capability):
        return shrink_rows_triton(x, m, parts, scale)
    return shrink_rows_reference(x, m, parts, scale)


def add_rows(
    y: Tensor, u: Tensor, m: Tensor, parts: Parts, scale: float, *, capability: Capability
) -> Tensor:
    """y += scale u m^T in place, see `add_rows_reference`; no gradient. capability: the model's."""
    if takes_rows(y, m.shape[1], capability):
        return add_rows_triton(y, u, m, parts, scale)
    return add_rows_reference(y, u, m, parts, scale)


def outer_rows(
    x: Tensor, u: Tensor, parts: Parts, scale: float, *, capability: Capability
) -> Tensor:
    """scale x^T u in float32, see `outer_rows_reference`; no gradient. capability: the model's."""
    rank, fits = parts.num_ranks // len(parts.spans), parts.granule % OUTER_TILE["BLOCK_N"] == 0
    if len(parts.spans) > 1 and fits and takes_rows(x, rank, capability):
        return outer_rows_triton(x, u, parts, scale)
    return outer_rows_reference(x, u, parts, scale)


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, accumulated and kept in float32 (float64 for float64)."""
    return _product(left, right, torch.promote_types(left.dtype, torch.float32))


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right, accumulated and kept in dtype (at least as wide as theirs)."""
    if left.dtype == dtype:
        return left @ right
    if left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)
