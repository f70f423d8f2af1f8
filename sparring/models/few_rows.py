"""A decode step of few rows over 16-bit weights: five launches a layer, one chain.

The same numbers as the layers' own forward, to the rounding of sums: kernels/few_rows.py has the
norm in the products that read it, SwiGLU and the residual's addition in those that write, and lets
a launch begin while the one before it runs. Not here: what a layer is (transformer.py), adapters,
NF4 without a decoded copy, bitwise mode.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparring.kernels.few_rows import Norm, Squares, few_rows, overlaps, squares_of
from sparring.kernels.matmul import BLOCK
from sparring.kernels.norm import rms_norm
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
        cos, sin = model.angles(positions_R)
        return model.logits(model.infer(model.embed.rows(tokens_R), cos, sin, plan, adapter))
    assert isinstance(plan, PagedKernelPlan), "`serves` says so"
    if isinstance(model.embed, Dense):
        given = start_step(model.embed.weight, tokens_R, positions_R, model.frequencies_E2)
    else:
        x_RD = model.embed.rows(tokens_R)
        given = (x_RD, squares_of(x_RD), *model.angles(positions_R))
    x_RD, squares = run_layers(layers, *given, plan)
    table, eps = model.head.table, model.config.norm_eps
    if not isinstance(table, Tensor):
        return model.logits(rms_norm(x_RD, model.norm, eps))
    norm = Norm(weight=model.norm, eps=eps, squares=squares)
    return few_rows(x_RD, table, norm=norm, out_dtype=torch.float32, capability=model.capability)[0]


def serves(model: Decoder, num_rows: int, plan: AttentionPlan, adapter: str | None) -> bool:
    """Whether a step of so many rows, attended to by `plan`, can be computed here."""
    layers = [layer for layer in model.layers if isinstance(layer, DecoderLayer)]
    return (
        model.device.type == "cuda"
        and model.dtype.itemsize == 2
        and 0 < num_rows <= model.max_folded_rows
        and isinstance(plan, PagedKernelPlan)
        and plan.tiles is None
        and not plan.shares_prompts
        and all(_is_plain(linear, adapter) for layer in layers for linear in _linears(layer))
    )


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


def run_layers(
    layers: Sequence[DecoderLayer],
    x_TD: Tensor,
    squares: Squares,
    cos: Tensor,
    sin: Tensor,
    plan: PagedKernelPlan,
) -> tuple[Tensor, Squares]:
    """The residual stream [T, D] after all layers, and its squares."""
    assert not torch.is_grad_enabled(), "a decode step has no gradient"
    capability = layers[0].qkv.capability
    for layer in layers:
        qkv, output, gate_up, down = (_weight_of(linear) for linear in _linears(layer))
        assert qkv is not None, "`serves` says so"
        assert output is not None, "`serves` says so"
        assert gate_up is not None, "`serves` says so"
        assert down is not None, "`serves` says so"
        eps = layer.config.norm_eps
        norm = Norm(weight=layer.attention_norm, eps=eps, squares=squares)
        heads, _ = few_rows(x_TD, qkv, layer.qkv.bias, norm=norm, capability=capability)
        attended = plan.attend_rotated(
            heads,
            cos,
            sin,
            layer.q_norm,
            layer.k_norm,
            eps,
            layer.index,
            layer.window,
            overlaps=overlaps(capability),
        )
        x_TD, found = few_rows(
            attended.view(len(x_TD), -1),
            output,
            layer.output.bias,
            residual=x_TD,
            capability=capability,
            ahead=gate_up,
        )
        assert found is not None, "a residual was given"
        norm = Norm(weight=layer.mlp_norm, eps=eps, squares=found)
        hidden, _ = few_rows(
            x_TD, gate_up, layer.gate_up.bias, norm=norm, gated=True, capability=capability
        )
        x_TD, found = few_rows(hidden, down, layer.down.bias, residual=x_TD, capability=capability)
        assert found is not None, "a residual was given"
        squares = found
    return x_TD, squares
