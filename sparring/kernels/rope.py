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

__all__ = ["rope", "rope_reference"]


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


def rope(x_THE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate every head of x [T, H, E] by its token's angles; cos and sin [T, E / 2];
    differentiable in x.
    """
    return rope_reference(x_THE, cos, sin)
