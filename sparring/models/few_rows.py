"""A decode step of few rows over 16-bit weights: five launches a layer, one chain.

The same numbers as the layers' own forward, to the rounding of sums: kernels/few_rows.py has the
norm in the products that read it, SwiGLU and the residual's addition in those that write, and lets
a launch begin while the one before it runs. Where a shape has no such form for so many rows, its
product is the library's, with norm and SwiGLU in launches of their own (kernels/chain.py). Not
here: what a layer is (transformer.py), adapters, NF4 without a decoded copy, bitwise mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from sparring.kernels import Capability
from sparring.kernels.chain import add_norm_early, pieces_norm_early, swiglu_early
from sparring.kernels.few_rows import (
    MAX_ROWS,
    Norm,
    Squares,
    few_rows,
    folds_norm,
    form_of,
    overlaps,
    squares_of,
)
from sparring.kernels.few_rows_tiles import Tiles
from sparring.kernels.matmul import BLOCK
from sparring.kernels.step_start import start_step
from sparring.layout import DecodeLayout, KVPool
from sparring.models.attention import AttentionPlan
from sparring.models.attention_paged_kernel import PagedKernelPlan
from sparring.models.linear import Dense, Linear
from sparring.models.quantised import Quantised
from sparring.models.transformer import Decoder, DecoderLayer


def step_logits(
    model: Decoder,
    tokens_R: Tensor,
    positions_R: Tensor,
    layout: DecodeLayout,
    kv_pool: KVPool,
    *,
    adapter: str | None,
) -> Tensor:
    """Logits [R, V] in float32 after each row's newest token [R], whose keys are written."""
    plan = model.plan(layout, kv_pool, adapter)
    layers = [layer for layer in model.layers if isinstance(layer, DecoderLayer)]
    if not serves(model, len(tokens_R), plan, adapter):
        if model.is_bitwise or not isinstance(model.embed, Dense):
            x_RD, (cos, sin) = model.embed.rows(tokens_R), model.angles(positions_R)
        else:
            start = model.embed.weight, tokens_R, positions_R, model.frequencies_E2
            x_RD, _, cos, sin = start_step(*start)
        return model.logits(model.infer(x_RD, cos, sin, plan, adapter))
    assert isinstance(plan, PagedKernelPlan), "`serves` says so"
    stream = run_layers(layers, *_start(model, tokens_R, positions_R), plan)
    table = model.head.table
    if not isinstance(table, Tensor) or not form_of(model.capability, len(tokens_R), table):
        return model.logits(stream.normed(model.norm))
    return stream.product(model.norm, table, None, out_dtype=torch.float32)


def _start(
    model: Decoder, tokens_R: Tensor, positions_R: Tensor
) -> tuple[Tensor, Squares, Tensor, Tensor]:
    """Embeddings [R, D], their squares, cosines and sines of the positions."""
    if isinstance(model.embed, Dense):
        return start_step(model.embed.weight, tokens_R, positions_R, model.frequencies_E2)
    x_RD = model.embed.rows(tokens_R)
    return x_RD, squares_of(x_RD), *model.angles(positions_R)


def serves(model: Decoder, num_rows: int, plan: AttentionPlan, adapter: str | None) -> bool:
    """Whether a step of so many rows, attended to by `plan`, is computed here: a chain of the
    library's products alone is no faster, so past max_folded_rows one of them has another form.
    """
    layers = [layer for layer in model.layers if isinstance(layer, DecoderLayer)]
    return (
        model.device.type == "cuda"
        and model.dtype.itemsize == 2
        and 0 < num_rows <= MAX_ROWS
        and isinstance(plan, PagedKernelPlan)
        and plan.tiles is None
        and all(_is_plain(linear, adapter) for layer in layers for linear in _linears(layer))
        and model.max_folded_rows > 0
        and (num_rows <= model.max_folded_rows or _has_form(layers[0], num_rows))
    )


def _has_form(layer: DecoderLayer, num_rows: int) -> bool:
    """Whether a product of a layer is not the library's."""
    weights = [_weight_of(linear) for linear in _linears(layer)]
    capability = layer.qkv.capability
    return any(w is not None and form_of(capability, num_rows, w) for w in weights)


def _linears(layer: DecoderLayer) -> tuple[Linear, Linear, Linear, Linear]:
    """The products in the order of their use."""
    return layer.qkv, layer.output, layer.gate_up, layer.down


def _is_plain(linear: Linear, adapter: str | None) -> bool:
    return (
        not linear.is_fixed
        and linear.adapter(adapter) is None
        and linear.capability.tensor_dots
        and linear.base.shape[1] % BLOCK == 0
        and _weight_of(linear) is not None
    )


def _weight_of(linear: Linear) -> Tensor | None:
    """The weight [O, I] in 16 bits, where there is one in memory."""
    base = linear.base
    if isinstance(base, Dense):
        return base.weight
    return base.decoded_copy() if isinstance(base, Quantised) else None


class _Stream:
    """The residual stream [T, D] on its way through the layers.

    squares: of x, where the launch that wrote it left them. added: what is still to be added to x,
    by the norm that comes next: a product [T, D], or its pieces [S, T, D] in float32.
    """

    def __init__(self, x_TD: Tensor, squares: Squares, capability: Capability, eps: float) -> None:
        self.x_TD, self.capability, self.eps = x_TD, capability, eps
        self.squares: Squares | None = squares
        self.added: Tensor | None = None

    def into(self, norm: Tensor, linear: Linear, *, gated: bool = False) -> Tensor:
        """The product of the normed stream, its gate applied."""
        weight = _weight_of(linear)
        assert weight is not None, "`serves` says so"
        return self.product(norm, weight, linear.bias, gated=gated)

    def product(
        self,
        norm: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        gated: bool = False,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """The product of the normed stream with a weight: in the form of a table (out_dtype: of
        its sums), or the library's, without a gate.
        """
        form = form_of(self.capability, len(self.x_TD), weight)
        product = partial(
            few_rows, gated=gated, out_dtype=out_dtype, capability=self.capability, form=form
        )
        folds = form is not None and folds_norm(form, len(self.x_TD), weight, self.squares)
        if folds and self.added is None:
            folded = Norm(weight=norm, eps=self.eps, squares=self.squares)
            return product(self.x_TD, weight, bias, norm=folded)[0]
        normed = self.normed(norm)
        if form is not None:
            return product(normed, weight, bias)[0]
        return F.linear(normed, weight, bias)

    def normed(self, norm: Tensor) -> Tensor:
        """The stream's norm, with what was to be added."""
        given = {"overlaps": overlaps(self.capability)}
        if self.added is None:
            normed, _ = add_norm_early(self.x_TD, None, norm, self.eps, **given)
            return normed
        add = pieces_norm_early if self.added.dim() == 3 else add_norm_early
        normed, self.x_TD = add(self.added, self.x_TD, norm, self.eps, **given)
        self.added = None
        return normed

    def gate(self, gate_up: Linear, norm: Tensor) -> Tensor:
        """silu(gate) up of the normed stream."""
        weight = _weight_of(gate_up)
        assert weight is not None, "`serves` says so"
        y = self.into(norm, gate_up, gated=True)
        if form_of(self.capability, len(y), weight) is not None:
            return y
        return swiglu_early(y, overlaps=overlaps(self.capability))

    def onto(self, y: Tensor, linear: Linear, ahead: Linear | None = None) -> None:
        """Adds a product to the stream; weights of `ahead` may be asked for beside it."""
        weight = _weight_of(linear)
        assert weight is not None, "`serves` says so"
        form = form_of(self.capability, len(y), weight)
        self.squares = None
        if form is None:
            self.added = F.linear(y, weight, linear.bias)
            return
        if isinstance(form, Tiles) and form.pieces > 1:
            self.added = few_rows(y, weight, linear.bias, capability=self.capability, form=form)[0]
            return
        assert self.added is None, "a norm came between"
        self.x_TD, self.squares = few_rows(
            y,
            weight,
            linear.bias,
            residual=self.x_TD,
            capability=self.capability,
            form=form,
            ahead=None if ahead is None else _weight_of(ahead),
        )


def run_layers(
    layers: Sequence[DecoderLayer],
    x_TD: Tensor,
    squares: Squares,
    cos: Tensor,
    sin: Tensor,
    plan: PagedKernelPlan,
) -> _Stream:
    """The residual stream [T, D] after all layers."""
    assert not torch.is_grad_enabled(), "a decode step has no gradient"
    capability, eps = layers[0].qkv.capability, layers[0].config.norm_eps
    stream = _Stream(x_TD, squares, capability, eps)
    for layer in layers:
        attended = plan.attend_rotated(
            stream.into(layer.attention_norm, layer.qkv),
            cos,
            sin,
            layer.q_norm,
            layer.k_norm,
            eps,
            layer.index,
            layer.window,
            chained=True,
            overlaps=overlaps(capability),
        )
        stream.onto(attended.view(len(x_TD), -1), layer.output, layer.gate_up)
        stream.onto(stream.gate(layer.gate_up, layer.mlp_norm), layer.down)
    return stream
