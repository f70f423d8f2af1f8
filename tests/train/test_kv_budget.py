"""What keys and values may take where there is no plan: on a card in numbers, and on a CPU."""

from __future__ import annotations

import pytest
import torch

from sparring.errors import MemoryBudgetError
from sparring.models.checkpoint import build_model, family_of
from sparring.models.transformer import Decoder, kv_bytes_per_token
from sparring.train import kv_budget as module
from sparring.train.kv_budget import kv_budget
from sparring.train.plan_job import CONTEXT_BYTES, Trained
from tests.models.tiny import CONFIGS

MIB = 2**20
QWEN_7B = CONFIGS["qwen2"] | {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
}  # fmt: skip


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Decoder:
    """A small model that passes for one on a card, of whose memory 4 GiB are free."""
    monkeypatch.setattr(module, "has_kernels", lambda _: True)
    monkeypatch.setattr(module, "free_bytes", lambda _: 4096 * MIB)
    return build_model(CONFIGS["qwen2"], device="cpu", dtype=torch.bfloat16)


def test_what_is_useful_is_taken_and_no_more(model: Decoder) -> None:
    each = kv_bytes_per_token(model.config, model.dtype)
    size, running = kv_budget(model, num_rollouts=8, prompt_tokens=64, max_tokens=256)
    assert running == 8
    assert 8 * 256 * each <= size <= 8 * (256 + 64) * each + 64 * each
    twice, _ = kv_budget(model, num_rollouts=16, prompt_tokens=64, max_tokens=256)
    assert 1.9 * size < twice < 2.1 * size


def test_a_budget_bounds_it_and_fewer_rows_run_where_it_is_small(
    model: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"num_rollouts": 512, "prompt_tokens": 64, "max_tokens": 20_000}
    monkeypatch.setattr(module, "_beside", lambda trained, work, arch: work.prompts * MIB // 8)
    free, all_rows = kv_budget(model, **asked)
    assert all_rows == 512
    found = {}
    for budget in (2048 * MIB, 600 * MIB, 80 * MIB):
        monkeypatch.setattr(module, "_left", lambda device, memory: memory)
        found[budget] = kv_budget(model, memory=budget, **asked)
        size, running = found[budget]
        assert size + running * MIB // 8 <= budget
    sizes = [size for size, _ in found.values()]
    rows = [running for _, running in found.values()]
    assert [free, *sizes] == sorted([free, *sizes], reverse=True)
    assert rows == sorted(rows, reverse=True)
    assert rows[-1] < 512
    with pytest.raises(MemoryBudgetError, match="one completion need"):
        kv_budget(model, memory=MIB // 8, **asked)


@pytest.mark.parametrize("rank", [0, 16])
def test_what_is_loaded_is_not_counted_again(rank: int) -> None:
    config = family_of(QWEN_7B).config(QWEN_7B)
    beside = {
        rows: module._beside(
            Trained(config=config, rank=rank), module._work(rows, 100, 1000), arch=90
        )
        for rows in (1, 64)
    }
    graphs = 64 * config.vocab_size * 4
    assert graphs < beside[64] - beside[1] < 1.2 * 2**30  # and a prefill of 6,400 tokens
    assert beside[1] < 0.3 * 2**30


def test_eight_bits_take_less(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"num_rollouts": 8, "prompt_tokens": 64, "max_tokens": 256}
    half, _ = kv_budget(model, **asked)
    monkeypatch.setattr(module, "find_kv_dtype", lambda model, name: torch.int8)
    small, _ = kv_budget(model, kv_dtype="int8", **asked)
    head = model.config.head_size
    assert small / half == pytest.approx((head + 4) / (2 * head))


def test_what_this_process_holds_counts_against_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("memory_allocated", 300), ("memory_reserved", 500)):
        monkeypatch.setattr(torch.cuda, name, lambda _, size=size: size * MIB)
    monkeypatch.setattr(module, "free_bytes", lambda _: 1000 * MIB)
    card = torch.device("cuda", 0)
    assert module._left(card, "auto") == 1200 * MIB
    assert module._left(card, CONTEXT_BYTES + 700 * MIB) == 400 * MIB
    assert module._left(card, CONTEXT_BYTES + 9000 * MIB) == 1200 * MIB


def test_a_cpu_keeps_half_for_what_is_not_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(CONFIGS["qwen2"], device="cpu", dtype=torch.float32)
    monkeypatch.setattr(module, "free_bytes", lambda _: 2 * MIB)
    size, running = kv_budget(model, num_rollouts=64, prompt_tokens=64, max_tokens=256)
    assert (size, running) == (MIB, 64)
    assert kv_budget(model, num_rollouts=64, prompt_tokens=64, max_tokens=256, memory=MIB) == (
        MIB // 2,
        64,
    )
