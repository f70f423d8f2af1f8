"""Decode steps in lanes: the rows' own numbers, whatever the cut."""

from __future__ import annotations

import pytest
import torch

from sparring.layout import DecodeLayout, KVPool
from sparring.models import lanes
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
    """On a CPU nobody; elsewhere small layers in 16 bits with many rows."""
    model = build_model(CONFIGS["qwen2"], device="cpu", dtype=torch.bfloat16)
    rule = LaneRule(least_rows=64, most_layer_bytes=1 << 20, num_lanes=2)
    monkeypatch.setitem(lanes.RULES, model.capability.arch, rule)
    assert lanes_of(model, 256) == 1
    monkeypatch.setattr(Decoder, "device", torch.device("cuda"))
    assert lanes_of(model, 256) == 2
    assert lanes_of(model, 63) == 1
    model.set_bitwise(True)
    assert lanes_of(model, 256) == 1
    model.set_bitwise(False)
    few = LaneRule(least_rows=64, most_layer_bytes=1000, num_lanes=2)
    monkeypatch.setitem(lanes.RULES, model.capability.arch, few)
    assert lanes_of(model, 256) == 1
