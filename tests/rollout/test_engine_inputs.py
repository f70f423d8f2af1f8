"""Endings as seen through the engine, and every input that it refuses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from sparring.errors import MemoryBudgetError, RunError, UserError
from sparring.models.transformer import Decoder
from sparring.rollout.engine import Engine
from sparring.rollout.sampler import Sampling
from sparring.types import Prompt

BuildEngine = Callable[..., Engine]
BuildPrompts = Callable[..., list[Prompt]]
PIECES = ["a", "答", "案", "\n", "Q", "é", " "]
BYTES = {10: b"\xe7", 11: b"\xad", 12: b"\x94"}


def decode(token_ids: Sequence[int]) -> str:
    """Ids below 7 write pieces, 10 to 12 the bytes of one character, the others nothing."""
    parts = [BYTES.get(t) or (PIECES[t].encode() if t < len(PIECES) else b"") for t in token_ids]
    return b"".join(parts).decode("utf-8", errors="replace")


@pytest.mark.parametrize(
    ("completion", "stop", "expected"),
    [
        ([0, 3, 4, 7], (), ([0, 3, 4, 7], "a\nQ", "stop")),
        ([7], (), ([7], "", "stop")),
        ([0, 3, 4, 0, 0, 0], ("\nQ",), ([0, 3, 4], "a", "stop")),
        ([5, 10, 11, 12, 2, 0, 0], ("答案",), ([5, 10, 11, 12, 2], "é", "stop")),
        ([0, 1, 6, 2, 1, 2], ("x", "答案"), ([0, 1, 6, 2, 1, 2], "a答 案", "stop")),
        ([0] * 9, ("Q",), ([0] * 9, "a" * 9, "length")),
    ],
)
def test_endings(
    scripted: Callable[[Sequence[int]], Any],
    build_engine: BuildEngine,
    completion: list[int],
    stop: tuple[str, ...],
    expected: tuple[list[int], str, str],
) -> None:
    prompts = [Prompt(id=0, token_ids=(1, 2), text="")]
    engine = build_engine(scripted([0, *completion, 0]), decode=decode)
    sampling = Sampling(max_completion_tokens=len(expected[0]), stop=stop)
    [rollouts] = engine.generate(prompts, sampling, num_samples=2)
    for rollout in rollouts:
        assert (rollout.token_ids.tolist(), rollout.text, rollout.finish_reason) == expected


def test_minimum_length_holds_end_tokens_back(model: Decoder, build_engine: BuildEngine) -> None:
    engine = build_engine(model, stop_ids=tuple(range(30)))
    prompts = [Prompt(id=i, token_ids=(40, 41, 42), text="") for i in range(20)]
    free = engine.generate(prompts, Sampling(max_completion_tokens=12))
    held = engine.generate(prompts, Sampling(max_completion_tokens=12, min_completion_tokens=5))
    assert min(len(r.token_ids) for [r] in free) < 5
    assert min(len(r.token_ids) for [r] in held) == 6
    assert all((r.token_ids[:5] >= 30).all() for [r] in held)


def test_no_prompts_give_no_rollouts(model: Decoder, build_engine: BuildEngine) -> None:
    assert build_engine(model).generate([], Sampling(max_completion_tokens=4)) == []


@pytest.mark.parametrize(
    ("token_ids", "words"),
    [
        ((), "prompt 5 has no tokens"),
        ((8,) * 256, "256 tokens, but max_tokens = 256"),
        ((8, 61), "token id 61; this model knows 0 to 60"),
        ((-1, 8), "token id -1"),
    ],
)
def test_prompts_that_cannot_be_read_are_refused(
    model: Decoder,
    build_engine: BuildEngine,
    build_prompts: BuildPrompts,
    token_ids: tuple[int, ...],
    words: str,
) -> None:
    prompts = [*build_prompts([4]), Prompt(id=5, token_ids=token_ids, text="")]
    with pytest.raises(UserError, match=words):
        build_engine(model).generate(prompts, Sampling(max_completion_tokens=4))


def test_a_request_that_can_never_fit_is_refused_before_anything_runs(
    model: Decoder, build_engine: BuildEngine, build_prompts: BuildPrompts
) -> None:
    engine = build_engine(model, kv_bytes=build_engine(model).block_bytes * 6)
    calls: list[int] = []
    with pytest.raises(MemoryBudgetError, match=r"10 tokens with up to 11 .* 6 blocks .* holds 5 "):
        engine.generate(
            build_prompts([4, 10]),
            Sampling(max_completion_tokens=11),
            on_progress=lambda *numbers: calls.append(1),
        )
    assert calls == []
    [[rollout]] = engine.generate(build_prompts([9]), Sampling(max_completion_tokens=11))
    assert len(rollout.token_ids) >= 1


def test_memory_below_two_blocks_is_refused(model: Decoder, build_engine: BuildEngine) -> None:
    with pytest.raises(MemoryBudgetError, match="at least 2 are needed"):
        build_engine(model, kv_bytes=1000)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_tokens": 1},
        {"kv_bytes": 0},
        {"kv_bytes": 1.5},
        {"max_running": 0},
        {"block_size": -4},
        {"max_prefill_tokens": True},
        {"kv_dtype": "int4"},
    ],
)
def test_engine_settings_are_checked(
    model: Decoder, build_engine: BuildEngine, changes: dict[str, object]
) -> None:
    [name] = changes
    with pytest.raises(UserError, match=f"{name} is "):
        build_engine(model, **changes)


@pytest.mark.parametrize("limits", [[[1]], [[1, 0], [1, 1]], [[1, 1]]])
def test_limits_must_fit_prompts_and_samples(
    model: Decoder,
    build_engine: BuildEngine,
    build_prompts: BuildPrompts,
    limits: list[list[int]],
) -> None:
    with pytest.raises(UserError, match="limits must hold 2 numbers"):
        build_engine(model).generate(
            build_prompts([4, 4]), Sampling(max_completion_tokens=4), num_samples=2, limits=limits
        )


def test_counts_of_samples_and_versions_are_checked(
    model: Decoder, build_engine: BuildEngine, build_prompts: BuildPrompts
) -> None:
    engine = build_engine(model)
    with pytest.raises(UserError, match="num_samples is 0"):
        engine.generate(build_prompts([4]), Sampling(max_completion_tokens=4), num_samples=0)
    with pytest.raises(UserError, match="policy_version is -1"):
        engine.weights_changed(policy_version=-1)


def test_a_diverged_model_stops_with_a_message(
    build_model: Callable[..., Decoder], build_engine: BuildEngine, build_prompts: BuildPrompts
) -> None:
    model = build_model()
    with torch.no_grad():
        model.norm.fill_(float("nan"))
    with pytest.raises(RunError, match=r"not finite after prompt 3 .*earlier checkpoint"):
        build_engine(model).generate(
            build_prompts([4], first_id=3), Sampling(max_completion_tokens=4)
        )


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_keys_in_eight_bits_need_a_gpu(
    model: Decoder, build_engine: BuildEngine, kv_dtype: str
) -> None:
    with pytest.raises(UserError, match=f"kv_dtype = '{kv_dtype}' needs a GPU with tensor cores"):
        build_engine(model, kv_dtype=kv_dtype)
