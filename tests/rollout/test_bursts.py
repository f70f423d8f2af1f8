"""The steps that a GPU captures, run without capture on the CPU: bursts, stops, preemption."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence

import pytest
import torch

from sparring.models.transformer import Decoder
from sparring.rollout import generation
from sparring.rollout.cuda_graph import GraphSteps, context_bucket, row_bucket
from sparring.rollout.device_rows import DeviceRows, Fetched
from sparring.rollout.engine import Engine
from sparring.rollout.generation import Generation
from sparring.rollout.sampler import Sampling
from sparring.rollout.scheduler import SequenceState
from sparring.types import Prompt, Rollout

BuildEngine = Callable[..., Engine]
BuildPrompts = Callable[..., list[Prompt]]


def in_bursts(engine: Engine, num_steps: int) -> Engine:
    """The engine, with its decode steps computed as a GPU's are."""
    steps = GraphSteps(
        engine.model,
        adapter=engine.adapter,
        stop_ids=engine.stop_ids,
        max_rows=engine.max_running,
        max_tokens=engine.max_tokens,
        block_size=engine.block_size,
        num_steps=num_steps,
        captures=False,
    )

    def aimed(kv_pool: object, sampling: Sampling) -> GraphSteps:
        steps.aim(kv_pool, sampling)  # type: ignore[arg-type]
        return steps

    engine._steps = aimed  # type: ignore[method-assign,assignment]
    return engine


def flat(rollouts: list[list[Rollout]]) -> list[Rollout]:
    return [r for group in rollouts for r in group]


def facts(rollouts: list[list[Rollout]]) -> list[tuple[list[int], str, str]]:
    return [(r.token_ids.tolist(), r.finish_reason, r.text) for group in rollouts for r in group]


@pytest.mark.parametrize("num_steps", [1, 3, 16])
@pytest.mark.parametrize(
    "knobs",
    [{}, {"temperature": 0.0}, {"temperature": 0.6, "top_p": 0.9}, {"stop": ("1 4", "33")}],
)
def test_bursts_give_the_tokens_of_single_steps(
    model: Decoder,
    build_engine: BuildEngine,
    build_prompts: BuildPrompts,
    num_steps: int,
    knobs: dict[str, object],
) -> None:
    sampling = Sampling(max_completion_tokens=37, seed=4, **knobs)  # type: ignore[arg-type]
    prompts = build_prompts([3, 4, 17, 30])
    plain = build_engine(model)
    want = plain.generate(prompts, sampling, num_samples=3)
    burst = in_bursts(build_engine(model, max_running=5), num_steps)
    got = burst.generate(prompts, sampling, num_samples=3)
    assert facts(got) == facts(want)
    for one, other in zip(flat(got), flat(want), strict=True):
        torch.testing.assert_close(one.logprobs, other.logprobs, rtol=0, atol=1e-5)
    assert burst.stats.num_decode_tokens == plain.stats.num_decode_tokens
    again = burst.generate(prompts[:2], sampling, num_samples=3)
    assert facts(again) == facts(want)[:6]


def test_bursts_in_scarce_memory(
    model: Decoder, build_engine: BuildEngine, build_prompts: BuildPrompts
) -> None:
    sampling = Sampling(max_completion_tokens=60)
    prompts = build_prompts([5, 9, 21])
    want = build_engine(model, stop_ids=()).generate(prompts, sampling, num_samples=4)
    scarce = build_engine(model, stop_ids=(), kv_bytes=45 * build_engine(model).block_bytes)
    got = in_bursts(scarce, 7).generate(prompts, sampling, num_samples=4)
    assert facts(got) == facts(want)
    assert scarce.stats.num_preemptions > 0
    assert scarce.stats.num_free_blocks == scarce.stats.num_blocks


def test_the_next_burst_is_queued_before_the_last_is_read_while_nothing_waits(
    model: Decoder,
    build_engine: BuildEngine,
    build_prompts: BuildPrompts,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[str] = []
    queue, wait = GraphSteps._queue, Fetched.wait
    monkeypatch.setattr(GraphSteps, "_queue", lambda *a: (events.append("queue"), queue(*a))[1])
    monkeypatch.setattr(Fetched, "wait", lambda f: (events.append("read"), wait(f))[1])
    sampling = Sampling(max_completion_tokens=41)
    roomy = in_bursts(build_engine(model, stop_ids=()), 10)
    got = roomy.generate(build_prompts([3, 9]), sampling, num_samples=2)
    prefill, bursts = events[:1], events[1:]
    assert prefill == ["read"]
    assert bursts == ["queue", "queue", "read", "queue", "read", "queue", "read", "read"]
    assert roomy.stats.num_decode_steps == 40
    assert roomy.stats.num_crowded_steps == 0
    events.clear()
    narrow = in_bursts(build_engine(model, stop_ids=(), max_running=2), 10)
    assert facts(narrow.generate(build_prompts([3, 9]), sampling, num_samples=2)) == facts(got)
    assert events[1:9] == ["queue", "read"] * 4, "others wait for a place: look first"
    assert narrow.stats.num_crowded_steps == 40
    assert narrow.stats.mean_crowded_rows == 2


@pytest.mark.parametrize(("blocks", "most"), [(400, 30), (45, 30), (45, 1), (22, 30)])
def test_prefill_steps_queued_ahead_give_the_same_rollouts(
    model: Decoder,
    build_engine: BuildEngine,
    build_prompts: BuildPrompts,
    monkeypatch: pytest.MonkeyPatch,
    blocks: int,
    most: int,
) -> None:
    sampling = Sampling(max_completion_tokens=most)
    prompts = build_prompts([5, 9, 12, 14, 33])  # in several steps, the last one cut
    size = build_engine(model).block_bytes
    prefill, take = Generation._prefill, Generation._take_drawn
    events: list[str] = []

    def watched(*arguments: object) -> object:
        drawn = prefill(*arguments)  # type: ignore[arg-type]
        events.extend("q" * (drawn is not None))
        return drawn

    monkeypatch.setattr(Generation, "_prefill", watched)
    monkeypatch.setattr(Generation, "_take_drawn", lambda *a: (events.append("r"), take(*a))[1])
    found = []
    for is_ahead in (False, True):
        events.clear()
        monkeypatch.setattr(generation, "queues_ahead", lambda _, ahead=is_ahead: ahead)
        engine = build_engine(
            model, stop_ids=(), kv_bytes=blocks * size, max_prefill_tokens=16, max_running=12
        )
        found.append(facts(engine.generate(prompts, sampling, num_samples=4)))
        assert engine.stats.num_free_blocks == engine.stats.num_blocks
        order = "".join(events)
        assert order.count("q") == order.count("r")
        assert "qqq" not in order
        assert ("qq" in order) <= is_ahead
        assert ("qq" in order) == is_ahead or blocks < 400
    assert found[0] == found[1]


def test_a_row_that_its_text_ended_keeps_no_block_that_others_get(
    model: Decoder,
    build_engine: BuildEngine,
    build_prompts: BuildPrompts,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    num_ended: list[int] = []
    go_on = DeviceRows.go_on

    def watched(rows: DeviceRows, running: Sequence[SequenceState], half: int) -> None:
        num_ended.append(sum(s.is_finished for s in running))
        go_on(rows, running, half)

    monkeypatch.setattr(DeviceRows, "go_on", watched)
    free = build_engine(model, stop_ids=()).generate(
        build_prompts([5, 9, 21]), Sampling(max_completion_tokens=90), num_samples=4
    )
    ids = [r.token_ids.tolist() for r in flat(free)[:8]]
    words = tuple(" {} {} ".format(*row[6 * i + 3 : 6 * i + 5]) for i, row in enumerate(ids))
    sampling = Sampling(max_completion_tokens=90, stop=words)
    want = build_engine(model, stop_ids=()).generate(
        build_prompts([5, 9, 21]), sampling, num_samples=4
    )
    assert {r.finish_reason for r in flat(want)} == {"stop", "length"}
    for blocks in (60, 120, 320):
        scarce = build_engine(model, stop_ids=(), kv_bytes=blocks * build_engine(model).block_bytes)
        got = in_bursts(scarce, 3).generate(build_prompts([5, 9, 21]), sampling, num_samples=4)
        assert facts(got) == facts(want)
    assert num_ended
    assert set(num_ended) == {0}, "the device does not know that these have ended"


def test_a_call_that_fails_leaves_the_rows_for_the_next(
    model: Decoder, build_engine: BuildEngine, build_prompts: BuildPrompts
) -> None:
    engine = in_bursts(build_engine(model, stop_ids=()), 5)
    sampling = Sampling(max_completion_tokens=33)
    want = engine.generate(build_prompts([3, 4]), sampling, num_samples=2)

    def stops(_finished: int, _total: int, num_tokens: int) -> None:
        if num_tokens > 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(build_prompts([3, 4]), sampling, num_samples=2, on_progress=stops)
    assert facts(engine.generate(build_prompts([3, 4]), sampling, num_samples=2)) == facts(want)


def test_buckets_hold_what_they_are_for() -> None:
    for rows in range(1, 513):
        assert rows <= row_bucket(rows, 512) <= max(16, rows + 7, rows * 1.25)
    assert [row_bucket(n, 512) for n in (1, 3, 16, 17, 33, 65, 129)] == [1, 4, 16, 24, 40, 80, 160]
    assert row_bucket(300, 310) == 310
    assert [context_bucket(n, 3000) for n in (1, 512, 513, 2048, 2500)] == [
        512, 512, 1024, 2048, 3000,
    ]  # fmt: skip


@pytest.mark.parametrize("num_steps", [1, 8])
def test_enough_leaves_incomplete_prompts_out_whole(
    model: Decoder, build_engine: BuildEngine, build_prompts: BuildPrompts, num_steps: int
) -> None:
    sampling = Sampling(max_completion_tokens=60)
    prompts = build_prompts([3, 4, 17, 30, 8, 9])
    limits = [[50, 60], [5, 9], [60, 60], [7, 3], [40, 2], [60, 60]]
    plain = build_engine(model, stop_ids=())
    want = plain.generate(prompts, sampling, num_samples=2, limits=limits)
    asked: list[int] = []

    def enough(place: int, rollouts: list[Rollout]) -> bool:
        assert [r.sample_index for r in rollouts] == [0, 1]
        asked.append(place)
        return len(asked) == 2

    engine = in_bursts(build_engine(model, stop_ids=(), max_running=7), num_steps)
    got = engine.generate(prompts, sampling, num_samples=2, limits=limits, enough=enough)
    assert sorted(asked) == [1, 3]
    assert [len(group) for group in got] == [0, 2, 0, 2, 0, 0]
    assert facts(got) == facts([want[1], want[3]])
    assert engine.stats.num_free_blocks == engine.stats.num_blocks
    whole = engine.generate(prompts, sampling, num_samples=2, limits=limits)
    assert facts(whole) == facts(want)


def test_a_pool_that_the_engine_lets_go_is_held_by_nobody(
    model: Decoder, build_engine: BuildEngine, build_prompts: BuildPrompts
) -> None:
    engine = in_bursts(build_engine(model), 4)
    engine.generate(build_prompts([3, 4]), Sampling(max_completion_tokens=6))
    assert engine._kv_pool is not None
    pool = weakref.ref(engine._kv_pool)
    engine.sleep()
    gc.collect()
    assert pool() is None
