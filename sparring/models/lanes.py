"""A decode step of many rows in lanes: parts of the rows that go through the layers side by side.

Where a layer is small, none of its launches fills a card: products have fewer tiles than the card
has multiprocessors, and between two launches it waits for the last program of one and the first of
the next. So the rows are cut into lanes, each on a stream of its own: while one lane's attention
reads keys and values, another's products run. A lane begins when the one before it has attended
for the first time, so that they do not do the same thing at the same time. Weights are read once a
lane, but out of the L2 cache, which holds a small layer whole.

Every row's numbers are those of the layers' own forward of as many rows as its lane has. Not here:
few rows of large layers (few_rows.py), NF4, bitwise mode, embedding and head (one for all lanes).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from sparring.kernels.chain import add_norm_ahead, ahead_of, swiglu_ahead
from sparring.kernels.few_rows import overlaps
from sparring.kernels.norm import add_rms_norm, rms_norm
from sparring.kernels.split_product import (
    SplitForm,
    add_norm_of_parts,
    gated_product,
    split_form,
    split_product,
)
from sparring.kernels.swiglu import swiglu
from sparring.layout import DecodeLayout
from sparring.models.attention import AttentionPlan
from sparring.models.attention_paged_kernel import PagedKernelPlan
from sparring.models.linear import Dense, Linear
from sparring.models.transformer import Decoder, DecoderLayer

ROWS_TOGETHER = 8
"""Lanes begin at multiples of so many rows: neighbours are often samples of one prompt."""


@dataclass(frozen=True, slots=True)
class LaneRule:
    """From how many rows on, and up to how many bytes a layer, a step has so many lanes."""

    least_rows: int
    most_layer_bytes: int
    num_lanes: int


RULES: dict[int, LaneRule] = {}
"""By architecture, as measured (benchmarks/many_rows.py); other cards have one lane."""

EARLY = False
"""Whether norms and SwiGLU are launched before the product that they read has ended."""


def lanes_for(arch: int, num_rows: int, layer_bytes: int) -> int:
    """How many lanes a step of so many rows has on a card, with layers of so many bytes."""
    rule = RULES.get(arch)
    if rule is None or num_rows < rule.least_rows or layer_bytes > rule.most_layer_bytes:
        return 1
    return rule.num_lanes


def lanes_of(model: Decoder, num_rows: int, adapter: str | None) -> int:
    """How many lanes a decode step of so many rows has: one but for 16-bit weights on a GPU.

    One with an adapter: its products share counters that two streams must not use at once.
    """
    if model.device.type != "cuda":
        return 1
    weights = [
        plain_weight(linear, adapter)
        for layer in model.layers
        for linear in layer.modules()
        if isinstance(linear, Linear)
    ]
    if any(weight is None for weight in weights):
        return 1
    num_bytes = sum(weight.nbytes for weight in weights if weight is not None)
    return lanes_for(model.capability.arch, num_rows, num_bytes // len(model.layers))


def lane_streams(
    model: Decoder, max_rows: int, adapter: str | None
) -> tuple[torch.cuda.Stream, ...]:
    """A stream for each lane but the first, for steps of up to max_rows rows."""
    num_lanes = lanes_of(model, max_rows, adapter)
    return tuple(torch.cuda.Stream(model.device) for _ in range(num_lanes - 1))


def plain_weight(linear: Linear, adapter: str | None) -> Tensor | None:
    """The weight [O, I] in 16 bits where it is in memory and all that the product is made of."""
    base = linear.base
    if linear.is_fixed or linear.adapter(adapter) is not None or not linear.capability.tensor_dots:
        return None
    weight = base.weight.detach() if isinstance(base, Dense) else base.decoded_copy()
    return weight if weight is not None and weight.element_size() == 2 else None


def joins(model: Decoder, num_rows: int, adapter: str | None) -> bool:
    """Whether products of a step of so many rows are joined with what stands behind them
    (kernels/split_product.py).
    """
    layer = model.layers[0]
    assert isinstance(layer, DecoderLayer), "layers are DecoderLayers"
    linears = layer.output, layer.gate_up, layer.down
    weights = [plain_weight(linear, adapter) for linear in linears]
    forms = [w is not None and split_form(model.capability, num_rows, w) for w in weights]
    return model.device.type == "cuda" and num_rows > model.max_folded_rows and any(forms)


def lane_rows(num_rows: int, num_lanes: int) -> list[slice]:
    """The rows of each lane, about as many in each; fewer lanes where there are few rows."""
    blocks = -(-num_rows // ROWS_TOGETHER)
    ends = [min(num_rows, blocks * i // num_lanes * ROWS_TOGETHER) for i in range(num_lanes + 1)]
    ends[-1] = num_rows
    return [slice(a, b) for a, b in itertools.pairwise(ends) if a < b]


def layout_of(layout: DecodeLayout, rows: slice) -> DecodeLayout:
    """Some rows of a layout, as views."""
    return DecodeLayout(
        kv_lengths_R=layout.kv_lengths_R[rows],
        block_tables_RN=layout.block_tables_RN[rows],
        slots_R=layout.slots_R[rows],
        block_size=layout.block_size,
        max_kv_length=layout.max_kv_length,
    )


class _Lane:
    """Some rows [R, D] of a step on their way through the layers, on one stream."""

    def __init__(
        self, x_RD: Tensor, cos: Tensor, sin: Tensor, plan: AttentionPlan, *, adapter: str | None,
        stream: torch.cuda.Stream | None, overlaps: bool,
    ) -> None:  # fmt: skip
        self.x_RD, self.cos, self.sin, self.plan = x_RD, cos, sin, plan
        self.adapter, self.stream, self.overlaps = adapter, stream, overlaps
        self.added: Tensor | None = None
        self.parts: tuple[Tensor, Tensor | None] | None = None

    def current(self) -> AbstractContextManager[object]:
        """Inside, the lane's stream is the one that launches go to."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def attend(self, layer: DecoderLayer) -> None:
        """Attention of a layer; what it adds to x is added by the norm that comes next."""
        eps = layer.config.norm_eps
        normed = self.normed(layer.attention_norm, eps)
        given = self.cos, self.sin
        if isinstance(self.plan, PagedKernelPlan):
            attended = self.plan.attend_rotated(
                layer.qkv(normed, self.adapter), *given, layer.q_norm, layer.k_norm, eps,
                layer.index, layer.window, overlaps=self.overlaps,
            )  # fmt: skip
        else:
            heads = layer._project(normed, *given, self.adapter)
            attended = self.plan.attend(*heads, layer.index, layer.window)
        self.add(attended.reshape(len(normed), -1), layer.output)

    def feed(self, layer: DecoderLayer) -> None:
        """The feed-forward of a layer."""
        self.add(self.gated(layer), layer.down)

    def gated(self, layer: DecoderLayer) -> Tensor:
        """silu(gate) up of the normed rows."""
        linear, normed = layer.gate_up, self.normed(layer.mlp_norm, layer.config.norm_eps)
        weight, form = self.form(linear)
        if weight is not None and form is not None:
            return gated_product(normed, weight, linear.bias, form, overlaps=self.overlaps)
        y = linear(normed, self.adapter)
        is_early = EARLY and self.overlaps
        return swiglu_ahead(y, ahead_of(y, 0)) if is_early else swiglu(y, overwrite=True)

    def form(self, linear: Linear) -> tuple[Tensor | None, SplitForm | None]:
        """A layer's weight and the form of its product, where it is joined with what follows."""
        weight = plain_weight(linear, self.adapter)
        if weight is None:
            return None, None
        return weight, split_form(linear.capability, len(self.x_RD), weight)

    def add(self, y: Tensor, linear: Linear) -> None:
        """Adds a product to x: the norm that comes next does, be it in parts."""
        weight, form = self.form(linear)
        if weight is None or form is None:
            self.added = linear(y, self.adapter)
            return
        parts = split_product(y, weight, form, overlaps=self.overlaps)
        self.parts = parts, linear.bias

    def normed(self, norm: Tensor, eps: float) -> Tensor:
        """The norm of x with what was to be added to it."""
        if self.parts is not None:
            given = *self.parts, self.x_RD, norm, eps
            normed, self.x_RD = add_norm_of_parts(*given, overlaps=self.overlaps)
            self.parts = None
            return normed
        if EARLY and self.overlaps:
            residual = None if self.added is None else self.x_RD
            x_RD = self.x_RD if self.added is None else self.added
            normed, self.x_RD = add_norm_ahead(x_RD, residual, norm, eps, ahead_of(norm, 0))
        elif self.added is None:
            normed = rms_norm(self.x_RD, norm, eps)
        else:
            normed, self.x_RD = add_rms_norm(self.added, self.x_RD, norm, eps)
        self.added = None
        return normed


def infer_in_lanes(
    model: Decoder,
    x_RD: Tensor,
    cos: Tensor,
    sin: Tensor,
    plans: Sequence[AttentionPlan],
    rows: Sequence[slice],
    *,
    adapter: str | None,
    beside: Sequence[torch.cuda.Stream] = (),
) -> Tensor:
    """Hidden states [R, D] after the final norm, as `Decoder.infer`, one lane for each plan.

    rows: of `lane_rows`. beside: streams of all lanes but the first, whose stream is the current
    one and waits for the others at the end; without any, lanes run one after another.
    """
    assert not torch.is_grad_enabled(), "a decode step has no gradient"
    layers = [layer for layer in model.layers if isinstance(layer, DecoderLayer)]
    first = torch.cuda.current_stream(model.device) if beside else None
    streams = [first, *beside] if beside else [None] * len(plans)
    early = x_RD.is_cuda and overlaps(model.capability)
    lanes = [
        _Lane(x_RD[r], cos[r], sin[r], plan, adapter=adapter, stream=stream, overlaps=early)
        for r, plan, stream in zip(rows, plans, streams, strict=False)
    ]
    before: torch.cuda.Stream | None = None
    for lane in lanes:
        if lane.stream is not None and before is not None:
            lane.stream.wait_stream(before)  # until it has attended
        before = lane.stream
        with lane.current():
            lane.attend(layers[0])
    for layer, following in zip(layers, [*layers[1:], None], strict=True):
        for lane in lanes:
            with lane.current():
                lane.feed(layer)
                if following is not None:
                    lane.attend(following)
    hidden = []
    for lane in lanes:
        with lane.current():
            hidden.append(lane.normed(model.norm, model.config.norm_eps))
    for stream in streams[1 : len(lanes)]:
        if first is not None and stream is not None:
            first.wait_stream(stream)
    # inputs of other lanes' streams were held until here: this stream's memory is free again now
    return torch.cat(hidden)
