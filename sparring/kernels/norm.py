"""RMSNorm: y = x / sqrt(mean(x^2) + eps), rounded to x's dtype, then times the weight.

Shapes: x [..., D], weight [D] -> [..., D]. Arithmetic in float32 (float64 for float64 input), one
rounding before the weight, as the checkpoints of the Llama and Qwen families were trained with.
Bytes per row of D 16-bit values: forward reads 2D and writes 2D; backward reads 4D and writes 2D.
arXiv 1910.07467.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["rms_norm", "rms_norm_reference"]


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


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension of x [..., D] with weight [D]; differentiable in both."""
    return rms_norm_reference(x, weight, eps)
