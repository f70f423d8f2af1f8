"""SwiGLU: h = silu(gate) * up, the two halves of one fused projection.

Shapes: gate_up [T, 2F], gate first -> [T, F]. Arithmetic in float32 (float64 for float64 input),
one rounding at the end. Backward with s = sigmoid(gate): d up = dh gate s, d gate = dh up s (1 +
gate (1 - s)). Bytes per token of 16-bit values: forward 4F read and 2F written, backward 6F read
and 4F written; the Triton form can write the gradient over gate_up, which then takes no memory.
`swiglu_gradients` is the backward pass by itself, in place, and gives h back too (2F more written).
arXiv 2002.05202.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparring.kernels import jit, rounded, tl, triton, uses_triton
from sparring.kernels.column_order import AS_THEY_ARE, Written, place_of

__all__ = [
    "swiglu",
    "swiglu_gradients",
    "swiglu_gradients_reference",
    "swiglu_gradients_triton",
    "swiglu_reference",
    "swiglu_triton",
]

BLOCK_F = 1024
NUM_WARPS = 4


def _halves(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    wide = gate_up if gate_up.dtype == torch.float64 else gate_up.float()
    half = wide.shape[-1] // 2
    return wide[..., :half], wide[..., half:]


def _forward(gate_up: Tensor) -> Tensor:
    gate, up = _halves(gate_up)
    return F.silu(gate).mul_(up).to(gate_up.dtype)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return _forward(gate_up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = _halves(gate_up)
        grad = grads[0].to(gate.dtype)
        out = torch.empty(gate_up.shape, dtype=gate.dtype, device=gate.device)
        d_gate, d_up = _halves(out)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=d_gate)
        torch.mul(F.silu(gate), grad, out=d_up)
        return out.to(gate_up.dtype)


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """silu(gate) * up for gate_up [T, 2F], gate in the first half -> [T, F]; differentiable."""
    if not torch.is_grad_enabled():
        return _forward(gate_up)
    product: Tensor = _Swiglu.apply(gate_up)  # type: ignore[no-untyped-call]
    return product


@jit
def _forward_kernel(
    x_ptr, h_ptr, stride_xt, F: tl.constexpr, BLOCK_F: tl.constexpr,
    IN_ORDER: tl.constexpr = False, BOTH: tl.constexpr = False, EARLY: tl.constexpr = False,
):  # fmt: skip
    """IN_ORDER, BOTH, EARLY: see kernels/norm.py."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = columns < F
    at = x_ptr + token * stride_xt + columns
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + F, mask=inside, other=0.0).to(tl.float32)
    h = rounded(gate / (1.0 + tl.exp(-gate)) * up, h_ptr.dtype.element_ty)
    to = h_ptr + token * F
    if BOTH:
        tl.store(to + tl.num_programs(0).to(tl.int64) * F + columns, h, mask=inside)
    if IN_ORDER:
        columns = place_of(columns)
    tl.store(to + columns, h, mask=inside)


@jit
def _backward_kernel(
    x_ptr, dh_ptr, dx_ptr, stride_xt,
    F: tl.constexpr, BLOCK_F: tl.constexpr, KEEPS_H: tl.constexpr,
):  # fmt: skip
    """Gradients of both halves; KEEPS_H: h is written over dh."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = columns < F
    at = x_ptr + token * stride_xt + columns
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + F, mask=inside, other=0.0).to(tl.float32)
    dh = tl.load(dh_ptr + token * F + columns, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    d_gate = dh * up * (sigmoid + silu * (1.0 - sigmoid))
    dtype = dx_ptr.dtype.element_ty
    to = dx_ptr + token * stride_xt + columns
    tl.store(to, rounded(d_gate, dtype), mask=inside)
    tl.store(to + F, rounded(dh * silu, dtype), mask=inside)
    if KEEPS_H:
        h = gate / (1.0 + tl.exp(-gate)) * up  # the forward pass's bits
        tl.store(dh_ptr + token * F + columns, rounded(h, dtype), mask=inside)


def _forward_triton(gate_up: Tensor, written: Written = AS_THEY_ARE) -> Tensor:
    x = gate_up.reshape(-1, gate_up.shape[-1]).contiguous()
    half = x.shape[1] // 2
    shape = (2, len(x), half) if written.both else (*gate_up.shape[:-1], half)
    h = torch.empty(shape, dtype=x.dtype, device=x.device)
    if len(x):
        _forward_kernel[(len(x), triton.cdiv(half, BLOCK_F))](
            x, h, x.stride(0), F=half, BLOCK_F=BLOCK_F, num_warps=NUM_WARPS, enable_fp_fusion=True,
            **written.options(),
        )  # fmt: skip
    return h


class _SwigluTriton(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, overwrite: bool) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.overwrite = overwrite
        return _forward_triton(gate_up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        x = gate_up.reshape(-1, gate_up.shape[-1]).contiguous()
        half = x.shape[1] // 2
        dx = x if ctx.overwrite else torch.empty_like(x)
        if len(x):
            _backward_kernel[(len(x), triton.cdiv(half, BLOCK_F))](
                x, grads[0].contiguous(), dx, x.stride(0),
                F=half, BLOCK_F=BLOCK_F, KEEPS_H=False, num_warps=NUM_WARPS, enable_fp_fusion=True,
            )  # fmt: skip
        return dx.view(gate_up.shape), None


def swiglu_triton(
    gate_up: Tensor, *, overwrite: bool = False, written: Written = AS_THEY_ARE
) -> Tensor:
    """`swiglu_reference` as one launch either way.

    overwrite: the backward pass writes the gradient over gate_up, so it can run once and nobody
    else may read gate_up afterwards.
    """
    if not torch.is_grad_enabled():
        return _forward_triton(gate_up, written)
    assert written == AS_THEY_ARE, "other ways are for products without gradient"
    product: Tensor = _SwigluTriton.apply(gate_up, overwrite)
    return product


def swiglu(gate_up: Tensor, *, overwrite: bool = False, written: Written = AS_THEY_ARE) -> Tensor:
    """silu(gate) * up for gate_up [T, 2F], gate in the first half -> [T, F]; differentiable.

    overwrite: on a GPU the backward pass may write over gate_up (it can run once only). written:
    another way to write h, without gradient.
    """
    if uses_triton(gate_up):
        return swiglu_triton(gate_up, overwrite=overwrite, written=written)
    return written.of(swiglu_reference(gate_up))


def swiglu_gradients_reference(gate_up: Tensor, dh: Tensor) -> Tensor:
    """Writes the gradient by gate_up [T, 2F] over it and h [T, F] over dh, which is returned."""
    gate, up = _halves(gate_up)
    grad, hidden = dh.to(gate.dtype), F.silu(gate) * up
    d_up = F.silu(gate) * grad
    d_gate = torch.ops.aten.silu_backward(grad * up, gate)
    gate_up.copy_(torch.cat([d_gate, d_up], dim=-1))
    return dh.copy_(hidden)


def swiglu_gradients_triton(gate_up: Tensor, dh: Tensor) -> Tensor:
    """`swiglu_gradients_reference` in one launch; both tensors [T, ...] are contiguous."""
    assert gate_up.is_contiguous(), "it is written in place, as it lies"
    assert dh.is_contiguous(), "it is written in place, as it lies"
    half = dh.shape[1]
    if len(dh):
        _backward_kernel[(len(dh), triton.cdiv(half, BLOCK_F))](
            gate_up, dh, gate_up, gate_up.stride(0),
            F=half, BLOCK_F=BLOCK_F, KEEPS_H=True, num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return dh


def swiglu_gradients(gate_up: Tensor, dh: Tensor) -> Tensor:
    """The backward pass of swiglu in place: the gradient by gate_up [T, 2F] goes over it, and h
    [T, F] over dh, which is returned.
    """
    if uses_triton(gate_up):
        return swiglu_gradients_triton(gate_up, dh)
    return swiglu_gradients_reference(gate_up, dh)
