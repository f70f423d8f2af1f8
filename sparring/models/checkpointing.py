"""Activation checkpointing: what the training forward keeps of each layer, and in which memory.

    none        everything that backward reads
    layers      each layer's input [T, D]; backward computes the layer again
    selective   the input, attention's output and its log-sum-exps; attention is not computed again

Bytes a token and layer at 16 bits: layers 2 D, selective 2 D + 2 H E + 4 H. What is kept is chosen
by FLOP saved a byte: attention's output saves 2 FLOP a byte for each key that a query sees, and its
kernel runs at half the rate of a matrix product; the output of any linear layer saves as many FLOP
a byte as it has inputs (D). So attention pays from some D / 4 keys on, where linear outputs, of
which there is three times as much, never pay better. A layer's last product is not computed again
in either mode: nothing reads it (arXiv 1604.06174, 2205.05198).

The three compute the same numbers: forward and backward pass run the same kernels on the same
values, so loss and gradients agree to the bit. offload: what is kept waits in pinned host memory
(host_memory.py), which changes no bit either. With more tokens than mlp_tile_tokens the two
checkpointing modes send the feed-forward through in tiles of so many; each tile's gradients are
added in the order of the tiles, which is another order of the same sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sparring.models.attention import AttentionPlan
from sparring.models.attention_paged import PagedPlan
from sparring.models.attention_paged_kernel import PagedKernelPlan
from sparring.models.host_memory import HostMemory, Trip

MODES = ("none", "layers", "selective")

MLP_TILE_TOKENS = 8192
"""Tokens from which on the feed-forward goes through in tiles: there its products are at their full
rate, and decoding NF4 once more a tile costs 3 % of their time.
"""


class Layer(Protocol):
    """What a layer offers: itself, and its three parts around attention."""

    index: int

    @property
    def window(self) -> int:
        """Sliding window in tokens, 0 = none."""

    def parameters(self) -> Any:
        """All parameters."""

    def heads(
        self, x_TD: Tensor, cos: Tensor, sin: Tensor, adapter: str | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values."""

    def after_attention(
        self, x_TD: Tensor, attended_THE: Tensor, adapter: str | None
    ) -> tuple[Tensor, Tensor]:
        """The residual stream after attention, and that stream normed."""

    def mlp(self, normed_TD: Tensor, adapter: str | None, *, is_read: bool = True) -> Tensor:
        """What the feed-forward adds."""


class Checkpointing:
    """A model's choice of mode, offload and tile; `begin` starts a forward pass.

    Raises ValueError for an unknown mode.
    """

    def __init__(
        self,
        mode: str,
        *,
        device: torch.device,
        offload: bool = False,
        mlp_tile_tokens: int = MLP_TILE_TOKENS,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"checkpointing is {mode!r}; known: {', '.join(MODES)}")
        self.mode, self.offload, self.mlp_tile_tokens = mode, offload, mlp_tile_tokens
        self._device = device
        self._host: HostMemory | None = None  # made by the first pass that needs it

    def begin(self, num_layers: int) -> ForwardPass:
        """What one forward pass runs its layers through."""
        if not self.offload or self._device.type != "cuda" or self.mode == "none":
            return ForwardPass(self, None)
        self._host = self._host or HostMemory(self._device)
        return ForwardPass(self, self._host.begin(num_layers))


class ForwardPass:
    """Runs the layers of one forward pass; made by `Checkpointing.begin`."""

    def __init__(self, chosen: Checkpointing, trip: Trip | None) -> None:
        self.chosen, self.trip = chosen, trip

    def run(
        self,
        layer: nn.Module,
        x_TD: Tensor,
        cos: Tensor,
        sin: Tensor,
        plan: AttentionPlan,
        adapter: str | None,
    ) -> Tensor:
        """The residual stream [T, D] after the layer."""
        is_kept = self.chosen.mode == "none" or not torch.is_grad_enabled()
        if is_kept or not (x_TD.requires_grad or any(p.requires_grad for p in layer.parameters())):
            out: Tensor = layer(x_TD, cos, sin, plan, adapter)
            return out
        anchor = x_TD.new_empty(0).requires_grad_()  # the first layer's input may need no gradient
        call = _Call(layer, cos, sin, plan, adapter, self)
        checkpointed: Tensor = _Checkpointed.apply(x_TD, anchor, call)  # type: ignore[no-untyped-call]
        return checkpointed


class _Call:
    """A layer with all of its arguments but the residual stream."""

    def __init__(
        self,
        layer: Any,
        cos: Tensor,
        sin: Tensor,
        plan: AttentionPlan,
        adapter: str | None,
        within: ForwardPass,
    ) -> None:
        assert not isinstance(plan, PagedPlan | PagedKernelPlan), (
            "generation keeps nothing for a backward pass"
        )
        self.layer: Layer = layer
        self.cos, self.sin, self.plan, self.adapter = cos, sin, plan, adapter
        self.trip = within.trip
        self.keeps_attention = within.chosen.mode == "selective"
        self.tile = within.chosen.mlp_tile_tokens or (1 << 62)

    def heads(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.layer.heads(x_TD, self.cos, self.sin, self.adapter)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Any]:
        """Attention's output and what else its backward pass needs beside q, k and v."""
        return self.plan.attend_kept(q, k, v, self.layer.window)

    def finish(self, x_TD: Tensor, attended: Tensor) -> Tensor:
        """From attention's output to the end of the layer, without gradient."""
        summed_TD, normed_TD = self.layer.after_attention(x_TD, attended, self.adapter)
        if len(x_TD) <= self.tile:
            return summed_TD + self.layer.mlp(normed_TD, self.adapter)
        out = torch.empty_like(summed_TD)
        for first in range(0, len(out), self.tile):
            part = slice(first, first + self.tile)
            added = self.layer.mlp(normed_TD[part], self.adapter)
            torch.add(summed_TD[part], added, out=out[part])
        return out

    def finish_backward(self, x_TD: Tensor, attended: Tensor, dy: Tensor) -> None:
        """Computes `finish` again and leaves gradients at x, attended and the parameters."""
        with torch.enable_grad():
            summed, normed = self.layer.after_attention(x_TD, attended, self.adapter)
        if len(dy) <= self.tile:
            with torch.enable_grad():
                added = self.layer.mlp(normed, self.adapter, is_read=False)
            _backward([added, summed], [dy, dy])
            return
        leaf = normed.detach().requires_grad_(normed.requires_grad)
        d_normed = torch.empty_like(leaf)
        for first in range(0, len(dy), self.tile):
            part = slice(first, first + self.tile)
            tile = leaf[part].detach().requires_grad_(leaf.requires_grad)
            with torch.enable_grad():
                added = self.layer.mlp(tile, self.adapter, is_read=False)
            _backward([added], [dy[part]])
            if tile.grad is not None:
                d_normed[part] = tile.grad
        _backward([normed, summed], [d_normed, dy])


class _Checkpointed(torch.autograd.Function):
    """A layer that keeps little and computes itself again in two halves, the last one first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, _anchor: Tensor, call: _Call) -> Tensor:
        heads, ctx.residue = call.heads(x), None
        if call.keeps_attention:
            attended, ctx.residue = call.attend(*heads)
        else:
            attended = call.plan.attend(*heads, call.layer.index, call.layer.window)
        ctx.call = call
        kept = (x, attended) if call.keeps_attention else (x,)
        if call.trip is None:
            ctx.save_for_backward(*kept)
        else:
            call.trip.put(call.layer.index, kept)
        return call.finish(x, attended)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        call: _Call = ctx.call
        kept = ctx.saved_tensors if call.trip is None else call.trip.take(call.layer.index)
        x = kept[0].detach().requires_grad_(ctx.needs_input_grad[0])
        heads = None
        if call.keeps_attention:
            attended, residue = kept[1], ctx.residue
        else:
            with torch.enable_grad():
                heads = call.heads(x)
            q, k, v = heads
            attended, residue = call.attend(q.detach(), k.detach(), v.detach())
        attended = attended.detach().requires_grad_()
        call.finish_backward(x, attended, grads[0])
        if heads is None:
            with torch.enable_grad():
                heads = call.heads(x)
        if attended.grad is not None and any(head.requires_grad for head in heads):
            q, k, v = (head.detach() for head in heads)
            d_heads = call.plan.attend_backward(
                q, k, v, attended.detach(), residue, attended.grad, call.layer.window
            )
            _backward(heads, d_heads)
        return x.grad, None, None


def _backward(outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Backward from those outputs that have a graph."""
    pairs = [(y, dy) for y, dy in zip(outputs, gradients, strict=True) if y.requires_grad]
    if pairs:
        torch.autograd.backward([y for y, _ in pairs], [dy for _, dy in pairs])
