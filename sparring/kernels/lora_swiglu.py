"""SwiGLU that adds the adapters on either side of it while its tiles are in registers.

Shapes: gate_up [T, 2F], xa [T, 2r], B [2F, r], dh and h [T, F], t [T, r], A [r, F].
Forward, of the product gate_up = x W^T without its adapter: gate += s xa_gate B_gate^T, up alike,
each rounded to the product's dtype, then h = silu(gate) up as in swiglu.py. Backward, of dh = dy W
without its adapter: dh += t A, rounded; gate and up as forward; the gradients go over gate_up and h
over dh. The bits are those of `add_rows` (lora_rows.py) and then swiglu.py, without the passes over
memory: bytes a token of 16-bit values are 6 F forward and 12 F backward, where the additions by
themselves take 8 F and 4 F more.
"""

from __future__ import annotations

from torch import Tensor

from sparring.kernels import Capability, cdiv, jit, rounded, tl
from sparring.kernels.lora_rows import low_rank_tile, padded, takes_rows
from sparring.kernels.swiglu import swiglu_gradients_reference, swiglu_reference

TILE = {"BLOCK_T": 16, "BLOCK_F": 128, "num_warps": 4}


@jit
def _added(
    at, inside, u_ptr, m_ptr, scale, t, n, num_rows, stride_ut, stride_mn, stride_mr,
    F: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """round(values + scale u M) in float32."""
    y = tl.load(at, mask=inside, other=0.0)
    product = low_rank_tile(
        u_ptr, m_ptr, m_ptr, t, n, num_rows, F, stride_ut, stride_mn, stride_mr,
        BLOCK_T, BLOCK_F, 0, True, RANK, BLOCK_R,
    )  # fmt: skip
    return rounded(tl.fma(product, scale, y.to(tl.float32)), y.dtype).to(tl.float32)


@jit(do_not_specialize=["num_rows"])
def _forward_kernel(
    x_ptr, xa_ptr, b_ptr, h_ptr, scale, num_rows, stride_xt, stride_xat,
    F: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = (t < num_rows)[:, None] & (n < F)[None, :]
    at = x_ptr + t.to(tl.int64)[:, None] * stride_xt + n[None, :]
    gate = _added(
        at, inside, xa_ptr, b_ptr, scale, t, n, num_rows, stride_xat, RANK, 1,
        F, BLOCK_T, BLOCK_F, RANK, BLOCK_R,
    )  # fmt: skip
    up = _added(
        at + F, inside, xa_ptr + RANK, b_ptr + F * RANK, scale, t, n, num_rows, stride_xat, RANK, 1,
        F, BLOCK_T, BLOCK_F, RANK, BLOCK_R,
    )  # fmt: skip
    h = gate / (1.0 + tl.exp(-gate)) * up
    to = h_ptr + t.to(tl.int64)[:, None] * F + n[None, :]
    tl.store(to, rounded(h, h_ptr.dtype.element_ty), mask=inside)


@jit(do_not_specialize=["num_rows"])
def _backward_kernel(
    x_ptr, dh_ptr, xa_ptr, b_ptr, u_ptr, a_ptr, scale, num_rows, stride_xt, stride_xat, stride_ut,
    F: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr, RANK_A: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """The gradients of both halves over x, and h over dh."""
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = (t < num_rows)[:, None] & (n < F)[None, :]
    at = x_ptr + t.to(tl.int64)[:, None] * stride_xt + n[None, :]
    dh_at = dh_ptr + t.to(tl.int64)[:, None] * F + n[None, :]
    gate = _added(
        at, inside, xa_ptr, b_ptr, scale, t, n, num_rows, stride_xat, RANK, 1,
        F, BLOCK_T, BLOCK_F, RANK, BLOCK_R,
    )  # fmt: skip
    up = _added(
        at + F, inside, xa_ptr + RANK, b_ptr + F * RANK, scale, t, n, num_rows, stride_xat, RANK, 1,
        F, BLOCK_T, BLOCK_F, RANK, BLOCK_R,
    )  # fmt: skip
    dh = _added(
        dh_at, inside, u_ptr, a_ptr, 1.0, t, n, num_rows, stride_ut, 1, F,
        F, BLOCK_T, BLOCK_F, RANK_A, BLOCK_A,
    )  # fmt: skip
    dtype = x_ptr.dtype.element_ty
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    h = gate / (1.0 + tl.exp(-gate)) * up  # the forward pass's bits
    d_gate = dh * up * (sigmoid + silu * (1.0 - sigmoid))
    tl.store(dh_at, rounded(h, dtype), mask=inside)
    tl.store(at, rounded(d_gate, dtype), mask=inside)
    tl.store(at + F, rounded(dh * silu, dtype), mask=inside)


def lora_swiglu_reference(gate_up: Tensor, xa: Tensor, b: Tensor, scale: float) -> Tensor:
    """h [T, F] of gate_up [T, 2F] without its adapter, xa [T, 2r] and b [2F, r]; gate first."""
    return swiglu_reference(_with_adapter(gate_up, xa, b, scale))


def _with_adapter(gate_up: Tensor, xa: Tensor, b: Tensor, scale: float) -> Tensor:
    rank, half = b.shape[1], len(b) // 2
    added = gate_up.clone()
    added[:, :half].addmm_(xa[:, :rank], b[:half].T, alpha=scale)
    added[:, half:].addmm_(xa[:, rank:], b[half:].T, alpha=scale)
    return added


def lora_swiglu_gradients_reference(
    gate_up: Tensor, dh: Tensor, xa: Tensor, b: Tensor, scale: float, t: Tensor, a: Tensor
) -> Tensor:
    """Writes the gradient by gate_up over it and h over dh [T, F], which is returned.

    gate_up, xa, b as forward. dh without its adapter, which adds t a: t [T, R], a [R, F].
    """
    added = _with_adapter(gate_up, xa, b, scale)
    swiglu_gradients_reference(added, dh.addmm_(t, a))
    gate_up.copy_(added)
    return dh


def lora_swiglu_triton(gate_up: Tensor, xa: Tensor, b: Tensor, scale: float) -> Tensor:
    """`lora_swiglu_reference` in one launch."""
    assert gate_up.stride(1) == 1, "rows lie in one piece"
    num_rows, half, rank = len(gate_up), gate_up.shape[1] // 2, b.shape[1]
    h = gate_up.new_empty(num_rows, half)
    if num_rows:
        grid = (cdiv(half, TILE["BLOCK_F"]), cdiv(num_rows, TILE["BLOCK_T"]))
        _forward_kernel[grid](
            gate_up, xa, b, h, scale, num_rows, gate_up.stride(0), xa.stride(0),
            F=half, RANK=rank, BLOCK_R=padded(rank), enable_fp_fusion=True, **TILE,
        )  # fmt: skip
    return h


def lora_swiglu_gradients_triton(
    gate_up: Tensor, dh: Tensor, xa: Tensor, b: Tensor, scale: float, t: Tensor, a: Tensor
) -> Tensor:
    """`lora_swiglu_gradients_reference` in one launch; dh and a are contiguous."""
    assert dh.is_contiguous(), "it is written in place, as it lies"
    assert a.is_contiguous(), "its rows lie one behind the other"
    num_rows, half, rank = len(dh), dh.shape[1], b.shape[1]
    if num_rows:
        grid = (cdiv(half, TILE["BLOCK_F"]), cdiv(num_rows, TILE["BLOCK_T"]))
        _backward_kernel[grid](
            gate_up, dh, xa, b, t, a, scale, num_rows,
            gate_up.stride(0), xa.stride(0), t.stride(0), F=half,
            RANK=rank, BLOCK_R=padded(rank), RANK_A=len(a), BLOCK_A=padded(len(a)),
            enable_fp_fusion=True, **TILE,
        )  # fmt: skip
    return dh


def lora_swiglu(
    gate_up: Tensor, xa: Tensor, b: Tensor, scale: float, *, capability: Capability
) -> Tensor:
    """silu(gate) up of gate_up [T, 2F] plus its adapter's part, see `lora_swiglu_reference`; no
    gradient. capability: the model's.
    """
    if takes_rows(gate_up, b.shape[1], capability):
        return lora_swiglu_triton(gate_up, xa, b, scale)
    return lora_swiglu_reference(gate_up, xa, b, scale)


def lora_swiglu_gradients(
    gate_up: Tensor, dh: Tensor, xa: Tensor, b: Tensor, scale: float, t: Tensor, a: Tensor, *,
    capability: Capability,
) -> Tensor:  # fmt: skip
    """The backward pass of `lora_swiglu` in place, see `lora_swiglu_gradients_reference`."""
    if takes_rows(gate_up, max(b.shape[1], len(a)), capability):
        return lora_swiglu_gradients_triton(gate_up, dh, xa, b, scale, t, a)
    return lora_swiglu_gradients_reference(gate_up, dh, xa, b, scale, t, a)
