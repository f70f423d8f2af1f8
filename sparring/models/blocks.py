"""Linear layers and the feed-forward over a frozen base, with gradients written by hand.

    y = x W^T + bias + s (x A^T) B^T          t = s dy B
    dx = dy W + t A      dA = t^T x      dB = s dy^T (x A^T)          (LoRA, arXiv 2106.09685)

The base takes no gradient. Kept for backward are x (once, however many matrices read it) and x A^T;
a decoded weight never is. The base's product is the library's; one launch makes x A^T, and one adds
the adapter's part to the product in place (kernels/lora_rows.py): what is in the model's dtype is
rounded after the product and after the sum, as in decoding. Between gate, up and down nothing is
added in memory: SwiGLU adds the adapters on both sides of it to its tiles, with the same bits
(kernels/lora_swiglu.py). The feed-forward keeps the product that gate and up come from but not what
down reads: backward makes that again, in the place of its own gradient, and writes the gradients of
gate and up over the product, so that three rows of F numbers are all that a token takes at once.

A weight is whatever offers `Weight`; which product it chooses is its own affair.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sparring.kernels.lora_rows import wide_product
from sparring.kernels.lora_swiglu import lora_swiglu, lora_swiglu_gradients
from sparring.kernels.low_rank import LowRank
from sparring.kernels.swiglu import swiglu, swiglu_gradients
from sparring.models.lora import LoraAdapter


class Weight(Protocol):
    """A weight [O, I] as the blocks use it."""

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""

    def matmul(self, x_TI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """x W^T + bias."""

    def matmul_transposed(self, dy_TO: Tensor) -> Tensor:
        """dy W."""

    def fixed_product(
        self, x_TI: Tensor, bias_O: Tensor | None, low_rank: LowRank | None
    ) -> Tensor:
        """x W^T + bias + an adapter's part in an order of sums that no other row changes."""

    def add_matmul_transposed(self, dx_TI: Tensor, dy_TO: Tensor) -> Tensor:
        """dx += dy W, in place and without gradient."""


@dataclass(frozen=True, slots=True)
class Frozen:
    """A linear layer whose base is frozen: weight, bias [O] and the adapter on it, if any.

    is_fixed: a row's result does not depend on the other rows (see Linear).
    """

    weight: Weight
    bias: Tensor | None
    lora: LoraAdapter | None
    is_fixed: bool = False


def lora_linear(x_TI: Tensor, layer: Frozen) -> Tensor:
    """The layer's output [T, O]; differentiable in x and the adapter's A and B."""
    if not torch.is_grad_enabled():
        return _forward(x_TI, layer)[0]
    y: Tensor = _LoraLinear.apply(x_TI, *_leaves(layer), layer)  # type: ignore[no-untyped-call]
    return y


def lora_mlp(x_TD: Tensor, gate_up: Frozen, down: Frozen, *, is_read: bool = True) -> Tensor:
    """down(silu(gate x) * up x): [T, D] -> [T, D]; differentiable in x and the adapters.

    With gradient its backward pass can run once only, because it works in what was kept.
    is_read=False: nobody reads the numbers of the result, only its gradient is wanted; they are not
    computed.
    """
    if not torch.is_grad_enabled():
        return _forward(_hidden(*_into_hidden(x_TD, gate_up), gate_up), down)[0]
    leaves = (*_leaves(gate_up), *_leaves(down))
    y: Tensor = _LoraMlp.apply(x_TD, *leaves, gate_up, down, is_read)  # type: ignore[no-untyped-call]
    return y


def _leaves(layer: Frozen) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if layer.lora is None else (layer.lora.a, layer.lora.b)


def _forward(x: Tensor, layer: Frozen) -> tuple[Tensor, Tensor | None]:
    """(y, x A^T)."""
    lora = layer.lora
    if layer.is_fixed:
        low_rank = None if lora is None else lora.fixed_low_rank(x)
        y = layer.weight.fixed_product(x, layer.bias, low_rank)
        return y, None if low_rank is None else low_rank.xa
    if lora is None:
        return layer.weight.matmul(x, layer.bias), None
    xa = lora.shrink(x)
    return lora.add(layer.weight.matmul(x, layer.bias), xa), xa


def _adds_in_swiglu(x: Tensor, gate_up: Frozen) -> bool:
    """Whether SwiGLU adds gate's and up's adapters; x is any tensor of the pass."""
    lora = gate_up.lora
    return not gate_up.is_fixed and lora is not None and lora.adds_in_swiglu(x)


def _into_hidden(x: Tensor, gate_up: Frozen) -> tuple[Tensor, Tensor | None]:
    """(gate and up, x A^T), without the adapter's part where SwiGLU adds it."""
    if not _adds_in_swiglu(x, gate_up):
        return _forward(x, gate_up)
    assert gate_up.lora is not None, "it is added in SwiGLU"
    xa = gate_up.lora.shrink(x)
    return gate_up.weight.matmul(x, gate_up.bias), xa


def _hidden(projected: Tensor, xa: Tensor | None, gate_up: Frozen) -> Tensor:
    """silu(gate) up of what `_into_hidden` made."""
    lora = gate_up.lora
    if lora is None or xa is None or not _adds_in_swiglu(projected, gate_up):
        return swiglu(projected)
    b = lora.matrices_used()[1]
    return lora_swiglu(projected, xa, b, lora.scale, capability=lora.capability)


def _shrink(x: Tensor, layer: Frozen) -> Tensor:
    """x A^T as the forward pass has it."""
    lora = layer.lora
    assert lora is not None, "a layer with an adapter"
    return lora.fixed_low_rank(x).xa if layer.is_fixed else lora.shrink(x)


def _backward(
    dy: Tensor, layer: Frozen, xa: Tensor | None, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, t, dB); needs: of x, A and B. dA is t^T x."""
    lora = layer.lora
    if lora is None:
        return (layer.weight.matmul_transposed(dy) if needs[0] else None), None, None
    t, db = _narrow_gradients(dy, lora, xa, needs)
    dx = None
    if needs[0] and t is not None:
        dx = layer.weight.add_matmul_transposed(t @ lora.matrices_used()[0], dy)
    return dx, t, db


def _narrow_gradients(
    dy: Tensor, lora: LoraAdapter, xa: Tensor | None, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """(t, dB), what is wanted of them."""
    t = lora.shrink_gradient(dy) if needs[0] or needs[1] else None
    return t, lora.b_gradient(dy, xa) if needs[2] and xa is not None else None


def _through_hidden(
    dy: Tensor, gate_up: Frozen, down: Frozen, projected: Tensor, kept: tuple[Tensor | None, ...],
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(h, t, dB of down) and the gradient by gate and up, written over projected.

    kept: x A^T and h A^T. needs: of what is within, A and B of down; h is None where neither of the
    first two is needed, and nothing is written then.
    """
    xa, ha = kept
    inner, outer = gate_up.lora, down.lora
    adds = _adds_in_swiglu(dy, gate_up) and (needs[0] or needs[1])
    if adds and inner is not None and outer is not None and xa is not None:
        t, db = _narrow_gradients(dy, outer, ha, needs)
        assert t is not None, "needed"
        dh = down.weight.matmul_transposed(dy)
        (_, b), (a, _) = inner.matrices_used(), outer.matrices_used()
        hidden = lora_swiglu_gradients(
            projected, dh, xa, b, inner.scale, t, a, capability=inner.capability
        )
        return hidden, t, db
    if adds and inner is not None and xa is not None:
        inner.add(projected, xa)
    dh_or_none, t, db = _backward(dy, down, ha, (needs[0] or needs[1], *needs[1:]))
    return None if dh_or_none is None else swiglu_gradients(projected, dh_or_none), t, db


def _matrices(*layers: Frozen) -> list[Tensor]:
    """The adapters' matrices: saved, so that changing them before backward is an error."""
    return [m for one in layers if one.lora is not None for m in one.lora.matrices_used()]


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, _a: Tensor | None, _b: Tensor | None, layer: Frozen) -> Tensor:
        y, xa = _forward(x, layer)
        _, needs_a, needs_b, _ = ctx.needs_input_grad
        ctx.layer = layer
        kept = (x if needs_a else None, xa if needs_b else None)
        ctx.save_for_backward(*kept, *_matrices(layer))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, xa, *_ = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dx, t, db = _backward(grads[0], ctx.layer, xa, needs[:3])
        da = wide_product(t.T, x) if needs[1] and t is not None else None
        return dx, da, db, None


class _LoraMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        _gate_up_a: Tensor | None,
        _gate_up_b: Tensor | None,
        _down_a: Tensor | None,
        _down_b: Tensor | None,
        gate_up: Frozen,
        down: Frozen,
        is_read: bool,
    ) -> Tensor:
        _, needs_a, needs_b, _, needs_down_b, *_ = ctx.needs_input_grad
        projected, xa = _into_hidden(x, gate_up)
        ha = None
        if is_read:
            y, ha = _forward(_hidden(projected, xa, gate_up), down)
        else:
            y = x.new_empty(()).expand(len(x), down.weight.shape[0])
            if down.lora is not None and needs_down_b:
                ha = _shrink(_hidden(projected, xa, gate_up), down)
        ctx.layers, ctx.has_run = (gate_up, down), False
        keeps_xa = needs_b or _adds_in_swiglu(x, gate_up)
        kept = (x if needs_a else None, projected, xa if keeps_xa else None)
        ctx.save_for_backward(*kept, ha if needs_down_b else None, *_matrices(gate_up, down))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.has_run:
            raise RuntimeError("the feed-forward's backward pass has run: it works in place, once")
        ctx.has_run = True
        x, projected, xa, ha, *_ = ctx.saved_tensors
        (gate_up, down), needs, dy = ctx.layers, ctx.needs_input_grad, grads[0]
        needs_inner = any(needs[:3])
        hidden, t, down_db = _through_hidden(
            dy, gate_up, down, projected, (xa, ha), (needs_inner, needs[3], needs[4])
        )
        down_da = dx = gate_up_da = gate_up_db = None
        if needs[3] and hidden is not None and t is not None:
            down_da = wide_product(t.T, hidden)
        del hidden
        if needs_inner:
            dx, t, gate_up_db = _backward(projected, gate_up, xa, needs[:3])
            gate_up_da = wide_product(t.T, x) if needs[1] and t is not None else None
        return dx, gate_up_da, gate_up_db, down_da, down_db, None, None, None
