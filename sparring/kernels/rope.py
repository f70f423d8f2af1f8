"""Rotary position embedding in the half-split form.

With a, b the two halves of a head and c, s the cosine and sine of its angles:
out = [a c - b s, b c + a s]. Shapes: x [T, H, E], cos and sin [T, E / 2] float32 -> [T, H, E].
Arithmetic in float32 (float64 for float64 input), one rounding at the end. The backward pass is the
rotation by the negative angle, so nothing but the tables is kept. Bytes per token for H heads of E
16-bit values: 2HE read and 2HE written, either way. arXiv 2104.09864.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparring.kernels import cdiv, jit, power_of_two, rounded, tl, uses_triton

__all__ = [
    "rope",
    "rope_reference",
    "rope_triton",
    "rotated_heads",
    "rotated_heads_reference",
    "rotated_heads_triton",
]


def _rotate(x_THE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x_THE.shape[-1] // 2
    wide = x_THE if x_THE.dtype == torch.float64 else x_THE.float()
    first, second = wide[..., :half], wide[..., half:]
    cos, sin = cos.to(wide.dtype).unsqueeze(1), sin.to(wide.dtype).unsqueeze(1)
    out = torch.empty(wide.shape, dtype=wide.dtype, device=wide.device)
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin)
    return out.to(x_THE.dtype)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_THE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x_THE, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, -sin), None, None


def rope_reference(x_THE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate every head of x [T, H, E] by its token's angles; cos and sin [T, E / 2];
    differentiable in x.
    """
    if not torch.is_grad_enabled():
        return _rotate(x_THE, cos, sin)
    rotated: Tensor = _Rope.apply(x_THE, cos, sin)  # type: ignore[no-untyped-call]
    return rotated


@jit
def _rotate_kernel(
    x_ptr, cos_ptr, sin_ptr, y_ptr, num_heads, stride_t, stride_h, stride_yt,
    HALF: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    columns = tl.arange(0, BLOCK_E)
    cos = tl.load(cos_ptr + token * HALF + columns, mask=columns < HALF, other=0.0)[None, :]
    sin = tl.load(sin_ptr + token * HALF + columns, mask=columns < HALF, other=0.0)[None, :]
    if BACKWARD:
        sin = -sin
    inside = (heads < num_heads)[:, None] & (columns < HALF)[None, :]
    at = x_ptr + token * stride_t + heads[:, None] * stride_h + columns[None, :]
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    to = y_ptr + token * stride_yt + heads[:, None] * (2 * HALF) + columns[None, :]
    dtype = y_ptr.dtype.element_ty
    # one multiply-add, written out: every kernel that rotates rounds alike
    tl.store(to, rounded(tl.fma(first, cos, -(second * sin)), dtype), mask=inside)
    tl.store(to + HALF, rounded(tl.fma(second, cos, first * sin), dtype), mask=inside)


def tile_of(num_heads: int, half: int) -> dict[str, int]:
    """Launch table: one program holds up to 4,096 pairs of one token's heads."""
    block_e = max(16, power_of_two(half))
    block_h = min(power_of_two(num_heads), max(1, 4096 // block_e))
    return {"BLOCK_E": block_e, "BLOCK_H": block_h, "num_warps": 4}


def _rotate_triton(
    x_THE: Tensor, cos: Tensor, sin: Tensor, backward: bool, out_THE: Tensor | None = None
) -> Tensor:
    """out: where to write, heads one behind the other, tokens any distance apart."""
    num_tokens, num_heads, size = x_THE.shape
    if x_THE.stride(-1) != 1:
        x_THE = x_THE.contiguous()
    y_THE = out_THE
    if y_THE is None:
        y_THE = torch.empty(x_THE.shape, dtype=x_THE.dtype, device=x_THE.device)
    tile = tile_of(num_heads, size // 2)
    if num_tokens:
        _rotate_kernel[(num_tokens, cdiv(num_heads, tile["BLOCK_H"]))](
            x_THE, cos.contiguous(), sin.contiguous(), y_THE, num_heads, *x_THE.stride()[:2],
            y_THE.stride(0), HALF=size // 2, BACKWARD=backward, enable_fp_fusion=True, **tile,
        )  # fmt: skip
    return y_THE


class _RopeTriton(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_THE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate_triton(x_THE, cos, sin, False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate_triton(grads[0], cos, sin, True), None, None


def rope_triton(x_THE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rope_reference` as one launch either way; x may be a view with strides."""
    if not torch.is_grad_enabled():
        return _rotate_triton(x_THE, cos, sin, False)
    rotated: Tensor = _RopeTriton.apply(x_THE, cos, sin)
    return rotated


def rope(x_THE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate every head of x [T, H, E] by its token's angles; cos and sin [T, E / 2];
    differentiable in x.
    """
    if uses_triton(x_THE):
        return rope_triton(x_THE, cos, sin)
    return rope_reference(x_THE, cos, sin)


class _RotatedHeads(torch.autograd.Function):
    """The three gradients go to their places in one tensor, which a split would copy them into."""

    @staticmethod
    def forward(
        ctx: Any, heads_TNE: Tensor, cos: Tensor, sin: Tensor, sizes: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.sizes = sizes
        return _rotated_heads(heads_TNE, cos, sin, sizes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        dq, dk, dv = grads
        num_heads, num_rotated = ctx.sizes[0], sum(ctx.sizes)
        shape = (len(dq), num_rotated + dv.shape[1], dq.shape[2])
        out = torch.empty(shape, dtype=dq.dtype, device=dq.device)
        _rotate_triton(dq, cos, sin, True, out[:, :num_heads])
        _rotate_triton(dk, cos, sin, True, out[:, num_heads:num_rotated])
        out[:, num_rotated:] = dv
        return out, None, None, None


def _rotated_heads(
    heads_TNE: Tensor, cos: Tensor, sin: Tensor, sizes: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    rotated = _rotate_triton(heads_TNE[:, : sum(sizes)], cos, sin, False)
    return rotated[:, : sizes[0]], rotated[:, sizes[0] :], heads_TNE[:, sum(sizes) :]


def rotated_heads_reference(
    heads_TNE: Tensor, cos: Tensor, sin: Tensor, sizes: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys rotated, and values, of [T, N, E]; sizes: heads of queries and of keys, the
    rest are values; differentiable.
    """
    both, v = torch.split(heads_TNE, [sum(sizes), heads_TNE.shape[1] - sum(sizes)], dim=1)
    q, k = torch.split(rope_reference(both, cos, sin), list(sizes), dim=1)
    return q, k, v


def rotated_heads_triton(
    heads_TNE: Tensor, cos: Tensor, sin: Tensor, sizes: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """`rotated_heads_reference`; the results are views, of one tensor and of heads."""
    if not torch.is_grad_enabled():
        return _rotated_heads(heads_TNE, cos, sin, sizes)
    three: tuple[Tensor, Tensor, Tensor] = _RotatedHeads.apply(heads_TNE, cos, sin, sizes)
    return three


def rotated_heads(
    heads_TNE: Tensor, cos: Tensor, sin: Tensor, sizes: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys rotated, and values, of one projection; see `rotated_heads_reference`."""
    if uses_triton(heads_TNE):
        return rotated_heads_triton(heads_TNE, cos, sin, sizes)
    return rotated_heads_reference(heads_TNE, cos, sin, sizes)
