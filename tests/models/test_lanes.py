"""Decode steps in lanes: the rows' own numbers, whatever the cut."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparring.kernels import capability_for, capability_of
from sparring.kernels.split_product import FORMS, SplitForm
from sparring.layout import DecodeLayout, KVPool
from sparring.models import lanes
from sparring.models.attention_paged import PagedPlan, paged_layout
from sparring.models.checkpoint import build_model
from sparring.models.lanes import LaneRule, infer_in_lanes, lane_rows, lanes_of, layout_of
from sparring.models.lora import LoraConfig
from sparring.models.transformer import Decoder, new_kv_pool
from tests.models.tiny import CONFIGS


def layout_and_pool(model: Decoder, rows: int) -> tuple[DecodeLayout, KVPool]:
    """Rows of different lengths, each in two blocks of its own."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 32, (rows,), generator=generator)
    tables = torch.arange(1, 1 + 2 * rows).view(rows, 2)
    last = lengths - 1
    layout = DecodeLayout(
        kv_lengths_R=lengths.int(),
        block_tables_RN=tables.int(),
        slots_R=tables.gather(1, (last // 16)[:, None])[:, 0] * 16 + last % 16,
        block_size=16,
        max_kv_length=32,
    )
    pool = new_kv_pool(model.config, 1 + 2 * rows, 16, model.dtype, model.device)
    pool.data.copy_(torch.randn(pool.data.shape, generator=generator))
    return layout, pool


@pytest.mark.parametrize(("rows", "count"), [(1, 2), (7, 2), (24, 3), (19, 2)])
@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_lanes_give_what_the_layers_give(name: str, rows: int, count: int) -> None:
    model = build_model(CONFIGS[name], device="cpu", dtype=torch.float64)
    model.init_weights(0)
    model.add_adapter(LoraConfig(rank=4))
    with torch.no_grad():
        for parameter in model.trainable_parameters().values():
            parameter.normal_(0.0, 0.1)
    model.refresh_shadows()
    tokens = torch.arange(rows) % model.config.vocab_size
    found = []
    for num_lanes in (1, count):
        layout, pool = layout_and_pool(model, rows)
        cut = lane_rows(rows, num_lanes)
        cos, sin = model.angles(layout.kv_lengths_R.long() - 1)
        with torch.no_grad():
            x_RD = model.embed.rows(tokens)
            plans = [model.plan(layout_of(layout, r), pool, "policy") for r in cut]
            if num_lanes == 1:
                out = model.infer(x_RD, cos, sin, plans[0], "policy")
            else:
                out = infer_in_lanes(model, x_RD, cos, sin, plans, cut, adapter="policy")
        found.append((out, pool.data))
    torch.testing.assert_close(found[1][0], found[0][0])
    torch.testing.assert_close(found[1][1], found[0][1])


def counting(kernel: Callable[..., Tensor], calls: list[str]) -> Callable[..., Tensor]:
    def counted(*given: object, **more: object) -> Tensor:
        calls.append(kernel.__name__)
        return kernel(*given, **more)

    return counted


@pytest.mark.parametrize("joined", ["output", "gate_up", "down", "all"])
def test_joined_products_give_what_the_layers_give(
    joined: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the kernels' references, in bfloat16; the shapes are those of kernels that join."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    model = build_model(CONFIGS["qwen2"] | sizes, device="cpu", dtype=torch.bfloat16)
    model.init_weights(0)
    with torch.no_grad():
        for linear in model.linears().values():
            linear.base.weight.mul_(8.0)
    card, rows = capability_for(90), 20
    monkeypatch.setattr(model, "capability", card)
    names = ["output", "gate_up", "down"] if joined == "all" else [joined]
    shapes = {tuple(getattr(model.layers[0], name).base.shape) for name in names}
    monkeypatch.setitem(FORMS, 90, dict.fromkeys(shapes, ((1, 16, SplitForm(32, 64, 3)),)))
    calls, found = [], []
    for kernel in ("split_product", "gated_product"):
        monkeypatch.setattr(lanes, kernel, counting(getattr(lanes, kernel), calls))
    for count in (1, 2):
        for linear in model.linears().values():
            linear.capability = card if count == 2 else capability_of(model.device)
        layout, pool = layout_and_pool(model, rows)
        cut = lane_rows(rows, count)
        with torch.no_grad():
            x_RD = model.embed.rows(torch.arange(rows))
            cos, sin = model.angles(layout.kv_lengths_R.long() - 1)
            plans = [PagedPlan(paged_layout(layout_of(layout, r)), pool) for r in cut]
            found.append(infer_in_lanes(model, x_RD, cos, sin, plans, cut, adapter=None))
    assert len(calls) == 2 * len(model.layers) * len(names)
    want, got = (out.double() for out in found)
    assert (got - want).norm() / want.norm() < 0.02


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_every_row_is_in_one_lane(count: int) -> None:
    for rows in range(1, 70):
        cut = lane_rows(rows, count)
        assert [i for part in cut for i in range(part.start, part.stop)] == [*range(rows)]
        assert len(cut) <= count
        assert all(part.start % lanes.ROWS_TOGETHER == 0 for part in cut)
    assert [part.stop - part.start for part in lane_rows(256, 2)] == [128, 128]
    assert [part.stop - part.start for part in lane_rows(200, 2)] == [96, 104]


def test_who_has_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU nobody; elsewhere small layers in 16 bits with many rows, without adapters."""
    card = capability_for(90)
    model = build_model(CONFIGS["qwen2"], device="cpu", dtype=torch.bfloat16)
    monkeypatch.setattr(model, "capability", card)
    for linear in model.linears().values():
        linear.capability = card
    rule = LaneRule(least_rows=64, most_layer_bytes=1 << 20, num_lanes=2)
    monkeypatch.setitem(lanes.RULES, 90, rule)
    assert lanes_of(model, 256, "policy") == 1
    monkeypatch.setattr(Decoder, "device", torch.device("cuda"))
    assert lanes_of(model, 256, "policy") == 2
    assert lanes_of(model, 63, "policy") == 1
    model.set_bitwise(True)
    assert lanes_of(model, 256, "policy") == 1
    model.set_bitwise(False)
    model.add_adapter(LoraConfig(rank=4))
    assert lanes_of(model, 256, "policy") == 1
    assert lanes_of(model, 256, None) == 2
    few = LaneRule(least_rows=64, most_layer_bytes=1000, num_lanes=2)
    monkeypatch.setitem(lanes.RULES, 90, few)
    assert lanes_of(model, 256, None) == 1
