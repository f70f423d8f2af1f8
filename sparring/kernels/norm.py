"""RMSNorm: y = x / sqrt(mean(x^2) + eps), rounded to x's dtype, then times the weight.

Shapes: x [..., D], weight [D] -> [..., D]. Arithmetic in float32 (float64 for float64 input), one
rounding before the weight, as the checkpoints of the Llama and Qwen families were trained with.
Bytes per row of D 16-bit values: forward reads 2D and writes 2D; backward reads 4D and writes 2D.
arXiv 1910.07467.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rms_norm", "rms_norm_reference"]


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension of x [..., D] with weight [D]; differentiable."""
    wide = x if x.dtype == torch.float64 else x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension of x [..., D] with weight [D]; differentiable."""
    return rms_norm_reference(x, weight, eps)
