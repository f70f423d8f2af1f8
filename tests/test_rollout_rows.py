"""The rows of benchmarks/rollouts.py: each kind runs, and its figures are what they are called."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from benchmarks import nf4_instructions, rollout_start, schedule
from benchmarks.rollout_rows import (
    INSTRUCTIONS,
    ROWS,
    limits_of,
    prefill_seconds,
    prompts_of,
    same_rows,
    seconds_a_step,
    tiny,
)
from benchmarks.rollouts import missed, run_all, told
from benchmarks.shapes import SHAPES, build
from sparring.kernels import nf4_hopper
from sparring.models.checkpoint import build_model


def test_the_ragged_row_is_the_one_that_is_asked_for() -> None:
    row = ROWS["ragged"]
    lengths = sorted(n for line in limits_of(row) for n in line)
    prompts = [len(prompt.token_ids) for prompt in prompts_of(row, 152064)]
    assert (len(prompts), len(lengths)) == (32, 256)
    assert 64 <= min(prompts) < 200
    assert 900 < max(prompts) <= 1024
    assert 350 < lengths[128] < 450
    assert 1500 < max(lengths) <= 4096
    assert (row.max_running, row.quantization, row.lora_rank) == (128, "nf4", 16)
    assert ROWS["ragged quarter"] == dataclasses.replace(row, runs=1, kv_share=0.25)


@pytest.mark.parametrize("mean_rows", [1.0, 7.4, 21.2, 36.9, 39.1, 61.0, 127.6])
def test_fixed_lengths_have_about_as_many_rows(mean_rows: float) -> None:
    fixed = same_rows(ROWS["ragged quarter"], mean_rows, 543.7, 558.3)
    prompts, samples, prompt_tokens, output = fixed.work
    assert abs(prompts * samples - mean_rows) <= max(1.0, 0.02 * mean_rows)
    assert (prompt_tokens, output, fixed.kv_share) == (544, 558, 1.0)
    assert fixed.kind == "rollout"


@pytest.mark.parametrize(
    "names",
    [
        ("7b 4x8x256x768", "prefill 32x2048"),
        ("7b nf4 cached 4x8x256x768",),
        ("ragged", "ragged quarter"),
        ("ragged cached quarter",),
        ("step bitwise 4x8x256x768", "step cached 4x8x256x768"),
    ],
)
def test_each_kind_of_row_runs(names: tuple[str, ...], tmp_path: Path) -> None:
    rows = {name: dataclasses.replace(tiny(ROWS[name]), runs=1) for name in names}
    run_all(rows, tmp_path / "rows.json")
    found = json.loads((tmp_path / "rows.json").read_text())
    assert list(found) == list(names)
    for name, row in rows.items():
        got = found[name]
        assert "failed" not in got, got
        assert name in told(name, dataclasses.asdict(row) | got)
        run = got["runs"][0]
        assert run["tokens"] == sum(map(sum, limits_of(row)))
        assert got["tokens/s"] == pytest.approx(run["tokens"] / run["rollout"])
        assert 0 < got["share of limit"] < 1
        assert 0 <= got["mismatch"]["mean"] < 0.1
        if row.kind == "ragged":
            assert 0 < got["rows while some wait"] <= 1
            assert got["fixed"]["preemptions"] == 0
            assert got["recomputed share"] == run["recomputed tokens"] / run["tokens"]
        if row.kv_share < 1:
            assert run["blocks"] < got["without limit"]["peak blocks"]
            assert run["peak blocks"] <= run["blocks"]
            assert got["without limit"]["preemptions"] == 0
        if row.kind == "step":
            assert run["step"] > run["rollout"]
            assert got["values"]


def test_the_limit_of_a_prefill_is_its_arithmetic() -> None:
    """A 7B on a card of 801 TFLOP/s: 59,500 tokens a second (61,380 by products alone)."""
    row = ROWS["prefill 32x2048"]
    model = build_model(SHAPES[row.model], device="meta", dtype=torch.bfloat16)
    tokens = row.work[0] * row.work[2]
    assert tokens / prefill_seconds(row, model, 4.26e12, 801e12) == pytest.approx(59_500, rel=1e-3)
    assert tokens / prefill_seconds(row, model, 1e9, 801e12) == pytest.approx(
        tokens * 1e9 / (2 * 6_525_288_448), rel=1e-6
    )


def test_four_bits_are_bound_by_bytes_or_decoding_and_their_copy_by_its_own_bytes() -> None:
    model = build("tiny", quantization="nf4", device="cpu")
    weights = sum(x.base.shape[0] * x.base.shape[1] for x in model.linears().values())
    row = dataclasses.replace(ROWS["7b nf4 fused 4x8x256x768"], model="tiny")
    copied = dataclasses.replace(row, caches_weights=True)
    slow, quick = 1e9, 1e15  # bytes a second
    difference = seconds_a_step(copied, model, slow, 1e15) - seconds_a_step(row, model, slow, 1e15)
    assert difference == pytest.approx((2 - 0.516) * weights / slow)
    decoding = seconds_a_step(row, model, quick, 1e18) - seconds_a_step(copied, model, quick, 1e18)
    assert decoding == pytest.approx(weights * (2.65 / 16.7e12 - 2 / quick), rel=0.05)


def test_the_instructions_of_the_shipped_products_are_those_on_record() -> None:
    tile = nf4_hopper.TILES[2]
    found = nf4_instructions.counted(tile)
    (kept,) = [
        one for one in json.loads(INSTRUCTIONS.read_text())["tiles"] if one["rows"] == tile.block_t
    ]
    assert found["integer a weight"] == pytest.approx(kept["integer a weight"], rel=0.05)


def test_a_row_under_a_cap_counts_only_if_little_lies_beside_the_allocators_memory() -> None:
    capped = ROWS["step 4x8x256x768 in 24 GiB"]
    beside = {"device used - reserved GiB": 1.2}
    assert "at most 1.0" in missed(capped, beside)["missed"]
    assert not missed(capped, {"device used - reserved GiB": 0.8})
    assert not missed(dataclasses.replace(capped, cap_gib=0.0), beside)


def test_the_engines_start_is_measured_over_every_bucket() -> None:
    pairs = rollout_start.buckets(256, 1024)
    assert len(pairs) == len(set(pairs)) == 2 * 19
    assert (pairs[0], pairs[-1]) == ((256, 1024), (1, 512))
    found = rollout_start.measure("tiny", "nf4", 2, 32, counts_launches=True)
    assert found["start seconds"] > found["every bucket seconds"] > 0
    assert set(found["launches"]) == {"1"}
    assert "FAILED" not in rollout_start.told("warm", found)


@pytest.mark.parametrize("seed", schedule.SEEDS[:2])
def test_ragged_lengths_keep_the_rows_full_and_scarce_memory_recomputes_little(seed: int) -> None:
    work = schedule.drawn(seed)
    free = schedule.simulate(work, 10**6, guess=128.0)
    assert free["crowded rows"] >= 0.9 * schedule.MOST
    assert free["preemptions"] == 0
    scarce = schedule.simulate(work, free["peak blocks"] // 4, guess=128.0)
    assert 0 < scarce["recomputed"] <= 0.15
    assert scarce["peak blocks"] <= free["peak blocks"] // 4
    assert scarce["steps"] * (free["peak blocks"] // 4) >= work.block_steps()
