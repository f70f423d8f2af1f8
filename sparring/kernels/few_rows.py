"""Products of a decode step of few rows, with what stands around them folded in.

    y = f(x) W^T + bias          f: nothing, or RMSNorm with a weight
    out = y                      or y + residual (rounded twice), or silu(y_gate) y_up

x [T, K], W [N, K], 16 bits, float32 sums, out [T, N] ([T, N / 2] of a gated product). Rounding
points are those of kernels/norm.py, a linear layer, the residual's addition and kernels/swiglu.py,
one after the other. A layer of a decoder is five launches with these: qkv, attention, o, gate and
up, down.

The norm's mean square comes from the launch that wrote x: each of its programs leaves the sum of
squares of its columns, and every program here adds these parts in one order. Where a weight has too
few rows to fill a card, k is cut into segments that are added in order by the program that finishes
last (kernels/matmul.py). So the bits of a result depend on the shapes and the tile alone.

A launch may begin while the one before it still runs (programmatic dependent launch, sm_90 and
later): it asks for its first weights to come to the L2 cache, which no launch of a step changes,
and waits for the other one before it reads or writes anything else. Every program of a launch that
takes part waits, so whatever comes after it in the stream comes after all that is before it; only
then it lets the next one begin. `ahead` are weights of a later launch to be asked for as well.

Bytes: W once; FLOP 2 T N K. Not here: adapters, gradients, which layer takes this form (models/).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparring.kernels import (
    INTERPRETED,
    Capability,
    dot,
    few_rows_hopper,
    few_rows_strips,
    few_rows_tiles,
    jit,
    rounded,
    tl,
    triton,
    uses_triton,
)
from sparring.kernels.few_rows_hopper import Ring
from sparring.kernels.few_rows_strips import Strips
from sparring.kernels.few_rows_tiles import Tiles
from sparring.kernels.matmul import (
    BLOCK,
    INTERPRETED_TILE,
    Tile,
    segments_of,
    steps_of,
    sum_of_segments,
    workspace,
)
from sparring.kernels.norm import rms_norm_reference
from sparring.kernels.splits import prefetch
from sparring.kernels.swiglu import swiglu_reference

__all__ = ["Squares", "few_rows", "few_rows_reference", "few_rows_triton"]

MAX_ROWS, MAX_TILE_ROWS = few_rows_tiles.MAX_ROWS, 128
"""Most rows of a chain, and of a launch of this file's own kernel: one tile of them."""


Own = Ring | Strips | Tiles


@dataclass(frozen=True, slots=True)
class Form:
    """How a product is computed here: tile, pieces of k, and whether the norm is folded in."""

    tile: Tile
    segments: int = 1
    folds_norm: bool = True


FORMS: dict[int, dict[tuple[int, int], Form]] = {
    90: {
        # Qwen2.5-1.5B: qkv, o and down at 9 to 16 rows (up to 8: RINGS)
        (2048, 1536): Form(Tile(64, 16, 4, 4), 6),
        (1536, 1536): Form(Tile(32, 16, 4, 4), 2),
        (1536, 8960): Form(Tile(64, 16, 4, 4), 5),
    },
}
"""By architecture and shape [N, K], where a whole step was measured to be faster than with the
library's product (benchmarks/decode_step.py --search); for as many rows as need that tile.
"""

RINGS: dict[tuple[int, int], dict[int, Own]] = {
    # Qwen2.5-0.5B: qkv, o, down
    (1152, 896): {256: Tiles(64, 7)},
    (896, 896): {256: Tiles(32, 7)},
    (896, 4864): {256: Tiles(64, 7, 2)},
    # Qwen2.5-1.5B: qkv, o, gate and up, down, the head
    (2048, 1536): {8: Strips(128, 6), 128: Tiles(32, 9), 256: Tiles(64, 6)},
    (1536, 1536): {8: Strips(96, 6), 128: Tiles(32, 9), 256: Tiles(64, 6)},
    (17920, 1536): {8: Strips(264, 8, 1)},
    (1536, 8960): {8: Ring(264, 128, 4), 128: Tiles(128, 4, 5), 256: Tiles(128, 4, 2)},
    (151936, 1536): {8: Ring(264, 128, 4)},
    # Qwen2.5-7B: o, gate and up, down, the head; qkv is the library's
    (3584, 3584): {32: Ring(112, 128, 4)},
    (37888, 3584): {32: Ring(296, 64, 3, 2), 64: Ring(296, 64, 3, 2)},
    (3584, 18944): {32: Ring(264, 128, 4)},
    (152064, 3584): {32: Ring(264, 128, 4)},
}
"""The same of the forms that are for sm_90 alone (few_rows_hopper.py, few_rows_strips.py,
few_rows_tiles.py), by shape [N, K] and rows rounded up to a power of two, 8 at least.
"""

PREFETCHED_BYTES = 16 << 20
"""Of a matrix, asked for before its launch may begin."""

FASTER_ROWS: dict[int, int] = {90: 32}
"""By architecture: rows up to which steps are chained (models/few_rows.py), whatever products."""

PDL_ARCH = 90
"""From this compute capability on a launch may begin while the one before it runs."""


@dataclass(frozen=True, slots=True, eq=False)
class Squares:
    """Sums of squares of x [T, K] over parts of its columns: [S, T] float32."""

    parts: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Norm:
    """The RMSNorm that x goes through; forms for sm_90 alone find the squares themselves."""

    weight: Tensor
    eps: float
    squares: Squares | None


@jit
def prefetch_rows(
    w_ptr, row_n, first, last, stride_k, ahead_ptr, ahead_rows, stride_ahead, program, programs,
    AHEAD: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """Columns `first` to `last` of rows of W, and this program's share of the first AHEAD columns
    of all rows of another matrix; a line is 64 columns.
    """
    line = tl.arange(0, LINES) * 64
    at = w_ptr + row_n.to(tl.int64)[:, None] * stride_k
    for column in tl.range(first, last, LINES * 64):
        prefetch(at + tl.minimum(column + line, stride_k - 64)[None, :])
    if AHEAD > 0:
        each: tl.constexpr = AHEAD // 64
        lanes = tl.arange(0, 256)
        total = ahead_rows * each
        share = (total + programs - 1) // programs
        end = tl.minimum(total, (program + 1) * share)
        for i in tl.range(program * share, end, 256):
            index = tl.minimum(i + lanes, end - 1)
            prefetch(ahead_ptr + (index // each).to(tl.int64) * stride_ahead + index % each * 64)


@jit
def _store(
    acc, t, row_n, tile_n, bias_ptr, residual_ptr, out_ptr, squares_ptr, num_rows, num_outputs,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, GATED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """What happens to the sums acc [N, T] of a tile, and the store as [T, N]."""
    dtype = out_ptr.dtype.element_ty
    inside = row_n < num_outputs
    if HAS_BIAS:
        acc += tl.load(bias_ptr + row_n, mask=inside, other=0.0).to(tl.float32)[:, None]
    y = rounded(acc, dtype)
    if GATED:
        HALF: tl.constexpr = BLOCK_N // 2
        pair = y.to(tl.float32).reshape(2, HALF, BLOCK_T).permute(1, 2, 0)
        gate, up = tl.split(pair)
        y = rounded(gate / (1.0 + tl.exp(-gate)) * up, dtype)
        n = tile_n * HALF + tl.arange(0, HALF)
        width = num_outputs // 2
    else:
        n = row_n
        width = num_outputs
    mask = (n < width)[:, None] & (t < num_rows)[None, :]
    at = t.to(tl.int64)[None, :] * width + n[:, None]
    if HAS_RESIDUAL:
        before = tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
        y = rounded(y.to(tl.float32) + before, dtype)
        wide = tl.where(mask, y.to(tl.float32), 0.0)
        to = squares_ptr + tile_n * num_rows + t
        tl.store(to, tl.sum(wide * wide, axis=0), mask=t < num_rows)
    tl.store(out_ptr + at, y, mask=mask)


@jit
def _normed(x, scale, factor, HAS_NORM: tl.constexpr):
    """x [T, K] normed with the rows' scales and times the norm's weight; or x itself."""
    if HAS_NORM:
        wide = rounded(x.to(tl.float32) * scale[:, None], x.dtype).to(tl.float32)
        return rounded(wide * factor.to(tl.float32)[None, :], x.dtype)
    else:  # noqa: RET505 - Triton wants one type a branch
        return x


@jit
def _scales(parts_ptr, row_t, num_rows, num_parts, columns, eps, BLOCK_S: tl.constexpr):
    """1 / rms of every row, from its squares in parts."""
    part = tl.arange(0, BLOCK_S)
    squares = tl.load(
        parts_ptr + part[:, None] * num_rows + row_t[None, :],
        mask=(part < num_parts)[:, None], other=0.0,
    )  # fmt: skip
    return 1.0 / tl.sqrt(tl.sum(squares, axis=0) / columns + eps)


@jit(do_not_specialize=["num_rows", "segments", "steps", "num_parts", "prefetched", "ahead_rows"])
def _few_rows_kernel(
    x_ptr, w_ptr, bias_ptr, norm_ptr, parts_ptr, residual_ptr, out_ptr, squares_ptr, ahead_ptr,
    work_ptr, count_ptr, eps, num_rows, num_outputs, stride_k, segments, steps, num_parts,
    prefetched, ahead_rows, stride_ahead,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_S: tl.constexpr, SPLIT: tl.constexpr, EVEN_K: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr, GATED: tl.constexpr, PDL: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    tile_n = tl.program_id(1)
    segment = tl.program_id(2)
    t = tl.arange(0, BLOCK_T)
    n = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    row_n = tile_n * BLOCK_N + n
    if GATED:  # half of the rows are gates, the others what they let through
        HALF: tl.constexpr = BLOCK_N // 2
        row_n = tile_n * HALF + n % HALF
        row_n = tl.where(row_n < num_outputs // 2, row_n, num_outputs // 2 - 1)
        row_n += tl.where(n < HALF, 0, num_outputs // 2)
    source = tl.minimum(row_n, num_outputs - 1)
    first = tl.minimum(segment * steps * 64, stride_k)
    last = tl.minimum(first + steps * 64, stride_k)
    if PDL:
        program = segment * tl.num_programs(1) + tile_n
        prefetch_rows(
            w_ptr, source, first, tl.minimum(last, first + prefetched), stride_k, ahead_ptr,
            ahead_rows, stride_ahead, program, tl.num_programs(1) * tl.num_programs(2), AHEAD, 2,
        )  # fmt: skip
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row_t = tl.minimum(t, num_rows - 1)
    scale = tl.zeros([BLOCK_T], tl.float32)
    if HAS_NORM:
        scale = _scales(parts_ptr, row_t, num_rows, num_parts, stride_k, eps, BLOCK_S)
    x_at = x_ptr + row_t[:, None] * stride_k + k[None, :]
    w_at = w_ptr + source.to(tl.int64)[:, None] * stride_k + k[None, :]
    dtype = x_ptr.dtype.element_ty
    acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    coming = tl.zeros([BLOCK_K], dtype)
    if HAS_NORM:  # a turn ahead: the pipeline leaves so small a load alone
        coming = tl.load(norm_ptr + first + k, mask=first + k < stride_k, other=0.0)
    for at in tl.range(first, last, BLOCK_K, num_stages=STAGES):
        if EVEN_K:
            x = tl.load(x_at + at)
            w = tl.load(w_at + at)
        else:
            inside = (at + k < stride_k)[None, :]
            x = tl.load(x_at + at, mask=inside, other=0.0)
            w = tl.load(w_at + at, mask=inside, other=0.0)
        factor = coming
        if HAS_NORM:
            after = at + BLOCK_K + k
            coming = tl.load(norm_ptr + after, mask=after < stride_k, other=0.0)
        acc = dot(w, tl.trans(_normed(x, scale, factor, HAS_NORM)), acc)
    finishes = True
    if SPLIT:
        acc, finishes = sum_of_segments(
            acc, work_ptr, count_ptr, segment, segments, BLOCK_N, BLOCK_T
        )
    if finishes:
        _store(
            acc, t, row_n, tile_n, bias_ptr, residual_ptr, out_ptr, squares_ptr, num_rows,
            num_outputs, HAS_BIAS, HAS_RESIDUAL, GATED, BLOCK_N, BLOCK_T,
        )  # fmt: skip


def form_of(capability: Capability, num_rows: int, weight: Tensor) -> Form | Own | None:
    """The form of a product with a weight [N, K] for a number of rows; None: the library's."""
    num_outputs, columns = weight.shape
    if fills_early(capability) and num_rows <= MAX_ROWS:
        most = max(8, triton.next_power_of_2(num_rows))
        own = RINGS.get((num_outputs, columns), {}).get(most)
        if own is not None:
            return own
    form = FORMS.get(capability.arch, {}).get((num_outputs, columns))
    if form is None:
        return None
    most = form.tile.block_t
    return form if num_rows <= most and (most == 16 or num_rows > most // 2) else None


def general_form(capability: Capability, num_rows: int, num_outputs: int, columns: int) -> Form:
    """A form for any shape: small tiles, and pieces of k where there are few of them."""
    if not capability.tensor_dots:
        return Form(INTERPRETED_TILE, segments_of(capability, num_outputs, columns))
    block_t = next(n for n in (16, 32, 64, 128) if n >= num_rows)
    tile = Tile(32, block_t, 4, 4) if block_t <= 32 else Tile(64, block_t, 4, 4, block_k=64)
    return Form(tile, segments_of(capability, num_outputs, columns, tile.block_n))


def fills_early(capability: Capability) -> bool:
    """Whether the forms that are for sm_90 alone run."""
    return capability.arch == few_rows_hopper.ARCH and capability.tensor_dots


def folds_norm(form: Form | Own, num_rows: int, weight: Tensor, squares: Squares | None) -> bool:
    """Whether a product [N, K] in that form computes the norm of its rows."""
    if isinstance(form, Tiles):
        return False
    if isinstance(form, Strips):
        return few_rows_strips.folds_norm(weight.shape[1])
    if isinstance(form, Ring):
        return few_rows_hopper.folds_norm(form, num_rows, weight.shape[1])
    return form.folds_norm and squares is not None


def max_folded_rows(capability: Capability) -> int:
    """Rows up to which a decode step is computed in this form whatever its products."""
    return FASTER_ROWS.get(capability.arch, 0) if capability.tensor_dots else 0


def overlaps(capability: Capability) -> bool:
    """Whether launches of a chain may begin before the one before them has ended."""
    return capability.arch >= PDL_ARCH


def few_rows_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Squares | None]:
    """See `few_rows`; the product in float64, the norm from x itself."""
    if norm is not None:
        x = rms_norm_reference(x, norm.weight, norm.eps)
    y = x.double() @ weight.double().T
    if bias is not None:
        y += bias.double()
    y = y.to(out_dtype or x.dtype)
    if gated:
        y = swiglu_reference(y)
    if residual is None:
        return y, None
    y = y + residual
    return y, Squares(y.float().square().sum(1)[None])


def few_rows_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
    out_dtype: torch.dtype | None = None,
    capability: Capability,
    overlap: bool | None = None,
    ahead: Tensor | None = None,
    form: Form | None = None,
    prefetched_bytes: int | None = None,
) -> tuple[Tensor, Squares | None]:
    """`few_rows_reference` in one launch, summed in float32 in a fixed order.

    overlap: begin before the launch before has ended, which the card decides where it is left out.
    ahead [N', K']: weights of a later launch. form: of a table, or for tests and measurements,
    as prefetched_bytes.
    """
    (num_rows, columns), num_outputs = x.shape, weight.shape[0]
    _check(x, weight, residual, gated, MAX_TILE_ROWS)
    width = num_outputs // 2 if gated else num_outputs
    out = torch.empty(num_rows, width, dtype=out_dtype or x.dtype, device=x.device)
    form = form or general_form(capability, num_rows, num_outputs, columns)
    tile, segments = form.tile, form.segments
    overlap = overlaps(capability) if overlap is None else overlap
    tiles = triton.cdiv(width, tile.block_n // 2 if gated else tile.block_n)
    work, count = x, x
    if segments > 1:
        work, count = workspace(x, tile, tiles, segments)
    squares = None
    if residual is not None:
        squares = Squares(torch.empty(tiles, num_rows, dtype=torch.float32, device=x.device))
    parts = x
    if norm is not None:
        assert norm.squares is not None, "this form does not find them itself"
        parts = norm.squares.parts
    num_parts = 1 if norm is None else len(parts)
    ahead_columns = 0
    if prefetched_bytes is None:
        prefetched_bytes = PREFETCHED_BYTES
    if overlap and ahead is not None:
        ahead_columns = _prefetched_columns(ahead, prefetched_bytes)
    options = {"launch_pdl": True} if overlap else {}
    _few_rows_kernel[(1, tiles, segments)](
        x, weight, x if bias is None else bias, x if norm is None else norm.weight, parts,
        x if residual is None else residual, out, out if squares is None else squares.parts,
        weight if ahead is None else ahead, work, count, 0.0 if norm is None else norm.eps,
        num_rows, num_outputs, columns, segments, steps_of(columns, segments), num_parts,
        _prefetched_columns(weight, prefetched_bytes) // segments,
        0 if ahead is None else ahead.shape[0], 0 if ahead is None else ahead.shape[1],
        BLOCK_N=tile.block_n, BLOCK_T=tile.block_t, BLOCK_K=tile.block_k, STAGES=tile.num_stages,
        BLOCK_S=triton.next_power_of_2(num_parts), SPLIT=segments > 1,
        EVEN_K=columns % tile.block_k == 0, HAS_BIAS=bias is not None, HAS_NORM=norm is not None,
        HAS_RESIDUAL=residual is not None, GATED=gated, PDL=overlap, AHEAD=ahead_columns,
        num_warps=tile.num_warps, enable_fp_fusion=True, **options,
    )  # fmt: skip
    return out, squares


def _prefetched_columns(weight: Tensor, num_bytes: int) -> int:
    """Columns of every row that are that many bytes: whole lines of 64."""
    each = num_bytes // (weight.shape[0] * 128)
    return min(each * 64, weight.shape[1])


def _check(
    x: Tensor, weight: Tensor, residual: Tensor | None, gated: bool, max_rows: int = MAX_ROWS
) -> None:
    rows, columns = x.shape
    if rows > max_rows or columns % BLOCK or weight.shape[1] != columns:
        raise ValueError(
            f"x is {tuple(x.shape)} and the weight {tuple(weight.shape)}: columns must be equal and"
            f" a multiple of {BLOCK}, rows at most {max_rows}"
        )
    if not (x.is_contiguous() and weight.is_contiguous()) or x.dtype != weight.dtype:
        raise ValueError(f"x ({x.dtype}) and the weight ({weight.dtype}) lie row by row, one dtype")
    assert residual is None or (residual.is_contiguous() and not gated), "one epilogue, row by row"


def few_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
    out_dtype: torch.dtype | None = None,
    capability: Capability,
    ahead: Tensor | None = None,
    form: Form | Own | None = None,
) -> tuple[Tensor, Squares | None]:
    """(out, the squares of out where a residual is given and the form leaves them), no gradient.

    x [T, K], weight [N, K], bias [N]. norm: x goes through it first. residual [T, N]: is added to
    the product, rounded. gated: the first half of the outputs are gates of the second, out [T, N /
    2]. out_dtype: of the product, x's where it is left out. ahead: weights of a launch to come.
    form: of `form_of`. Raises ValueError on shapes, dtypes and strides that it does not take.
    """
    given = {"norm": norm, "residual": residual, "gated": gated, "out_dtype": out_dtype}
    if isinstance(form, Own):
        _check(x, weight, residual, gated)
        given["overlaps"] = overlaps(capability)
    if isinstance(form, Tiles):
        assert given.pop("norm") is None, "is computed before"
        return few_rows_tiles.launch(x, weight, bias, **given, tiles=form), None
    if isinstance(form, Ring | Strips):
        given["norm"] = None if norm is None else (norm.weight, norm.eps)
        if isinstance(form, Ring):
            return few_rows_hopper.launch(x, weight, bias, **given, ring=form), None
        return few_rows_strips.launch(x, weight, bias, **given, strips=form), None
    if uses_triton(x) and capability.tensor_dots:
        more = {"capability": capability, "ahead": ahead, "form": form}
        return few_rows_triton(x, weight, bias, **given, **more)
    return few_rows_reference(x, weight, bias, **given)


@jit
def _squares_kernel(x_ptr, parts_ptr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    x = tl.load(x_ptr + row * D + columns, mask=columns < D, other=0.0).to(tl.float32)
    tl.store(parts_ptr + row, tl.sum(x * x, axis=0))


def squares_of(x: Tensor) -> Squares:
    """The squares of x [T, K], in one part."""
    parts = torch.empty(1, len(x), dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(x.shape[1])
    if not uses_triton(x) and not INTERPRETED:
        return Squares(x.float().square().sum(1)[None])
    _squares_kernel[(len(x),)](
        x, parts, D=x.shape[1], BLOCK_D=block, num_warps=4 if block <= 2048 else 8
    )
    return Squares(parts)
