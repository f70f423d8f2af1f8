"""Products of a decode step of many rows, joined with what stands behind them.

    parts[s] = x W^T over the s-th piece of k                    [S, T, N] float32
    y = round(sum of parts, in order, + bias);  s = round(y + residual);  normed = RMSNorm(s)

    h = round(silu(gate) up),  gate and up the rounded halves of x W^T + bias     [T, N / 2]

x [T, K], W [N, K] in 16 bits. A weight with few rows (o, down) gives a product too few tiles for a
card; cut into pieces of k they fill it, and the pieces are not added up by a launch of their own or
by the programs that end last, but by the norm that has to read the product anyway. A weight with
many rows (gate and up) needs no pieces, and SwiGLU is computed where the sums are. Tiles come by
bulk copies (sm_90) in a deep queue, so that few large programs keep memory busy.

A launch may begin while the one before it runs (programmatic dependent launch, sm_90): all its
programs wait before they read, and only then let the next launch begin.

The order of sums is fixed by the shape of W and the table alone: a row's bits do not depend on the
other rows. Rounding points are those of a linear layer, kernels/norm.py and kernels/swiglu.py.
Bytes: W once for each tile of BLOCK_T rows, and 8 S T N for the parts, which the L2 cache holds;
FLOP 2 T N K. No gradient. Not here: which layers take this form (models/lanes.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparring.kernels import Capability, dot, jit, rounded, tl, triton, uses_triton
from sparring.kernels.norm import add_rms_norm_reference
from sparring.kernels.norm import tile_of as norm_tile
from sparring.kernels.swiglu import swiglu_reference

__all__ = ["SplitForm", "add_norm_of_parts", "gated_product", "split_form", "split_product"]

BLOCK_K = 64


@dataclass(frozen=True, slots=True)
class SplitForm:
    """Rows of W and of x that a program computes, pieces of k, warps and stages of the queue."""

    block_n: int
    block_t: int
    segments: int
    num_warps: int = 8
    num_stages: int = 5


FORMS: dict[int, dict[tuple[int, int], tuple[tuple[int, int, SplitForm], ...]]] = {}
"""By architecture and shape [N, K] of a weight: (fewest rows, most rows, form), where the product
and its norm were measured to be faster than the library's (benchmarks/split_product.py).
"""


def split_form(capability: Capability, num_rows: int, weight: Tensor) -> SplitForm | None:
    """The form for a product with a weight [N, K]; None: the library's is as good or better."""
    shape = weight.shape[0], weight.shape[1]
    for fewest, most, form in FORMS.get(capability.arch, {}).get(shape, ()):
        if fewest <= num_rows <= most:
            return form
    return None


@jit(do_not_specialize=["steps", "num_steps"])
def _split_kernel(
    x_desc, w_desc, parts_desc, num_steps, steps,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """One tile [T, N] over `steps` blocks of k."""
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    t0 = tl.program_id(0) * BLOCK_T
    n0 = tl.program_id(1) * BLOCK_N
    segment = tl.program_id(2)
    first = tl.minimum(segment * steps, num_steps)
    last = tl.minimum(first + steps, num_steps)
    acc = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for at in tl.range(first, last, num_stages=STAGES):
        x = x_desc.load([t0, at * BLOCK_K])
        w = w_desc.load([n0, at * BLOCK_K])
        acc = dot(x, w.T, acc)
    parts_desc.store([segment, t0, n0], acc.reshape(1, BLOCK_T, BLOCK_N))


def _check(x: Tensor, weight: Tensor) -> None:
    if x.shape[1] % BLOCK_K or weight.shape[1] != x.shape[1] or x.dtype != weight.dtype:
        raise ValueError(
            f"x is {tuple(x.shape)} {x.dtype} and the weight {tuple(weight.shape)} {weight.dtype}: "
            f"columns must be equal and a multiple of {BLOCK_K}, dtypes the same"
        )


def _early(overlaps: bool) -> dict[str, bool]:
    return {"launch_pdl": True} if overlaps else {}


def split_product_reference(x: Tensor, weight: Tensor, segments: int) -> Tensor:
    """[S, T, N] float32: the product over each piece of k."""
    steps = math.ceil(math.ceil(x.shape[1] / BLOCK_K) / segments) * BLOCK_K
    pieces = [slice(i * steps, (i + 1) * steps) for i in range(segments)]
    return torch.stack([(x[:, p].double() @ weight[:, p].double().T).float() for p in pieces])


def split_product_triton(
    x: Tensor, weight: Tensor, form: SplitForm, *, overlaps: bool = False
) -> Tensor:
    """Parts [S, T, N] float32 of x [T, K] times W [N, K]. Raises ValueError on shapes and dtypes
    that the kernel does not take. overlaps: it is launched early and waits for x (sm_90).
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    _check(x, weight)
    (num_rows, columns), num_outputs = x.shape, weight.shape[0]
    parts = torch.empty(form.segments, num_rows, num_outputs, device=x.device)
    num_steps = columns // BLOCK_K
    grid = (
        triton.cdiv(num_rows, form.block_t), triton.cdiv(num_outputs, form.block_n), form.segments,
    )  # fmt: skip
    _split_kernel[grid](
        TensorDescriptor.from_tensor(x.contiguous(), [form.block_t, BLOCK_K]),
        TensorDescriptor.from_tensor(weight, [form.block_n, BLOCK_K]),
        TensorDescriptor.from_tensor(parts, [1, form.block_t, form.block_n]),
        num_steps, triton.cdiv(num_steps, form.segments),
        BLOCK_N=form.block_n, BLOCK_T=form.block_t, BLOCK_K=BLOCK_K, STAGES=form.num_stages,
        OVERLAPS=overlaps, num_warps=form.num_warps, **_early(overlaps),
    )  # fmt: skip
    return parts


def split_product(x: Tensor, weight: Tensor, form: SplitForm, *, overlaps: bool = False) -> Tensor:
    """Parts [S, T, N] float32 of x [T, K] times W [N, K], over pieces of k."""
    if uses_triton(x):
        return split_product_triton(x, weight, form, overlaps=overlaps)
    return split_product_reference(x, weight, form.segments)


@jit(do_not_specialize=["num_steps"])
def _gated_kernel(
    x_desc, w_desc, bias_ptr, out_desc, half, num_steps,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """silu(gate) up of one tile: BLOCK_N gates and as many that they let through."""
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    t0 = tl.program_id(0) * BLOCK_T
    n0 = tl.program_id(1) * BLOCK_N
    gate = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for at in tl.range(0, num_steps, num_stages=STAGES):
        x = x_desc.load([t0, at * BLOCK_K])
        w = w_desc.load([n0, at * BLOCK_K])
        gate = dot(x, w.T, gate)
        w = w_desc.load([half + n0, at * BLOCK_K])
        up = dot(x, w.T, up)
    if HAS_BIAS:
        n = n0 + tl.arange(0, BLOCK_N)
        inside = n < half
        gate += tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)[None, :]
        up += tl.load(bias_ptr + half + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    dtype = x_desc.dtype
    gate, up = rounded(gate, dtype).to(tl.float32), rounded(up, dtype).to(tl.float32)
    out_desc.store([t0, n0], rounded(gate / (1.0 + tl.exp(-gate)) * up, dtype))


def gated_product_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """silu(gate) up [T, N / 2], gate and up the halves of x W^T + bias; sums in float64."""
    y = x.double() @ weight.double().T
    if bias is not None:
        y += bias.double()
    return swiglu_reference(y.to(x.dtype))


def gated_product_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    form: SplitForm,
    *,
    overlaps: bool = False,
) -> Tensor:
    """silu(gate) up [T, N / 2] of x [T, K] and W [N, K], whose first half are gates; the form's
    block_n counts gates. Raises ValueError on shapes and dtypes that the kernel does not take.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    _check(x, weight)
    half = weight.shape[0] // 2
    if half % form.block_n:
        raise ValueError(f"{half} gates are no multiple of {form.block_n}")
    out = torch.empty(len(x), half, dtype=x.dtype, device=x.device)
    _gated_kernel[(triton.cdiv(len(x), form.block_t), half // form.block_n)](
        TensorDescriptor.from_tensor(x.contiguous(), [form.block_t, BLOCK_K]),
        TensorDescriptor.from_tensor(weight, [form.block_n, BLOCK_K]),
        x if bias is None else bias,
        TensorDescriptor.from_tensor(out, [form.block_t, form.block_n]),
        half, x.shape[1] // BLOCK_K,
        BLOCK_N=form.block_n, BLOCK_T=form.block_t, BLOCK_K=BLOCK_K, STAGES=form.num_stages,
        HAS_BIAS=bias is not None, OVERLAPS=overlaps, num_warps=form.num_warps,
        enable_fp_fusion=True, **_early(overlaps),
    )  # fmt: skip
    return out


def gated_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    form: SplitForm,
    *,
    overlaps: bool = False,
) -> Tensor:
    """silu(gate) up [T, N / 2], gate and up the halves of x W^T + bias."""
    if uses_triton(x):
        return gated_product_triton(x, weight, bias, form, overlaps=overlaps)
    return gated_product_reference(x, weight, bias)


@jit(do_not_specialize=["num_rows", "segments"])
def _norm_kernel(
    parts_ptr, bias_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, num_rows, segments, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, HAS_BIAS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """norm.py's forward with a residual, its x added up from parts."""
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    inside = (rows < num_rows)[:, None] & (columns < D)[None, :]
    flat = rows[:, None] * D + columns[None, :]
    plane = num_rows.to(tl.int64) * D
    residual = tl.load(residual_ptr + flat, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(parts_ptr + flat, mask=inside, other=0.0)
    for part in tl.range(1, segments):
        x += tl.load(parts_ptr + part * plane + flat, mask=inside, other=0.0)
    if HAS_BIAS:
        x += tl.load(bias_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
    dtype = y_ptr.dtype.element_ty
    kept = rounded(rounded(x, dtype).to(tl.float32) + residual, dtype)
    tl.store(sum_ptr + flat, kept, mask=inside)
    x = kept.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / D + eps)
    normed = rounded(x * scale[:, None], dtype).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    tl.store(y_ptr + flat, rounded(normed * weight[None, :], dtype), mask=inside)


def add_norm_of_parts_reference(
    parts: Tensor, bias: Tensor | None, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(RMSNorm of product + residual, product + residual) for the parts [S, T, N] of a product."""
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    if bias is not None:
        total += bias.float()
    return add_rms_norm_reference(total.to(residual.dtype), residual, weight, eps)


def add_norm_of_parts_triton(
    parts: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    overlaps: bool = False,
) -> tuple[Tensor, Tensor]:
    """The same in one launch. overlaps: it is launched early and waits for the parts (sm_90)."""
    segments, rows, width = parts.shape
    y, summed = torch.empty_like(residual), torch.empty_like(residual)
    tile = norm_tile(width)
    _norm_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
        parts, parts if bias is None else bias, residual, weight, y, summed, rows, segments, eps,
        D=width, HAS_BIAS=bias is not None, OVERLAPS=overlaps, enable_fp_fusion=True, **tile,
        **_early(overlaps),
    )  # fmt: skip
    return y, summed


def add_norm_of_parts(
    parts: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    overlaps: bool = False,
) -> tuple[Tensor, Tensor]:
    """(RMSNorm of product + residual, product + residual), both [T, N], from parts [S, T, N]."""
    if uses_triton(parts):
        return add_norm_of_parts_triton(parts, bias, residual, weight, eps, overlaps=overlaps)
    return add_norm_of_parts_reference(parts, bias, residual, weight, eps)
