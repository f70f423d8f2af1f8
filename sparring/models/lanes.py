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


def lanes_of(model: Decoder, num_rows: int) -> int:
    """How many lanes a decode step of so many rows has."""
    rule = RULES.get(model.capability.arch)
    if rule is None or num_rows < rule.least_rows or model.is_bitwise:
        return 1
    if model.device.type != "cuda" or model.dtype.itemsize != 2:
        return 1
    layer = model.layers[0]
    linears = [module for module in layer.modules() if isinstance(module, Linear)]
    sizes = [linear.base.weight.nbytes for linear in linears if isinstance(linear.base, Dense)]
    is_small = len(sizes) == len(linears) and sum(sizes) <= rule.most_layer_bytes
    return rule.num_lanes if is_small else 1


def lane_streams(model: Decoder, max_rows: int) -> tuple[torch.cuda.Stream, ...]:
    """A stream for each lane but the first, for steps of up to max_rows rows."""
    return tuple(torch.cuda.Stream(model.device) for _ in range(lanes_of(model, max_rows) - 1))


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

    def current(self) -> AbstractContextManager[object]:
        """Inside, the lane's stream is the one that launches go to."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def attend(self, layer: DecoderLayer) -> None:
        """Attention of a layer; what it adds to x is added by the norm that comes next."""
        eps = layer.config.norm_eps
        normed = self.normed(layer.attention_norm, eps)
        given = self.cos, self.sin
        if not isinstance(self.plan, PagedKernelPlan):
            self.added = layer.attention(normed, *given, self.plan, self.adapter, in_order=False)
            return
        attended = self.plan.attend_rotated(
            layer.qkv(normed, self.adapter), *given, layer.q_norm, layer.k_norm, eps, layer.index,
            layer.window, overlaps=self.overlaps,
        )  # fmt: skip
        self.added = layer.output(attended.view(len(normed), -1), self.adapter)

    def feed(self, layer: DecoderLayer) -> None:
        """The feed-forward of a layer."""
        y = layer.gate_up(self.normed(layer.mlp_norm, layer.config.norm_eps), self.adapter)
        is_early = EARLY and self.overlaps
        hidden = swiglu_ahead(y, ahead_of(y, 0)) if is_early else swiglu(y, overwrite=True)
        self.added = layer.down(hidden, self.adapter)

    def normed(self, norm: Tensor, eps: float) -> Tensor:
        """The norm of x with what was to be added to it."""
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
    early = bool(beside) and overlaps(model.capability)
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
