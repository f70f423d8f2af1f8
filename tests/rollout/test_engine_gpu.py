"""The engine on a GPU: captured steps against the same steps without capture, sleep, adapters."""

from __future__ import annotations

import pytest
import torch

from sparring.kernels import kept
from sparring.models.checkpoint import build_model
from sparring.models.lora import LoraConfig
from sparring.models.transformer import Decoder
from sparring.rollout.engine import Engine
from sparring.rollout.sampler import Sampling
from sparring.types import Prompt, Rollout
from tests.models.tiny import CONFIGS

pytestmark = pytest.mark.gpu

BIG = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "head_dim": 32}
END = 7


def gpu_model(name: str = "qwen3", *, dtype: torch.dtype = torch.bfloat16) -> Decoder:
    model = build_model({**CONFIGS[name], **BIG}, device="cuda", dtype=dtype)
    model.init_weights(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)
    return model


def adapted(model: Decoder) -> Decoder:
    model.add_adapter(LoraConfig(rank=8))
    turn(model, 0.05)
    return model


@torch.no_grad()
def turn(model: Decoder, size: float) -> None:
    """What an optimizer step does to an adapter: parameters in place, then the shadows."""
    generator = torch.Generator().manual_seed(int(size * 1000))
    for parameter in model.trainable_parameters().values():
        parameter += torch.randn(parameter.shape, generator=generator).mul(size).cuda()
    model.refresh_shadows()


def prompts(*lengths: int) -> list[Prompt]:
    generator = torch.Generator().manual_seed(5)
    return [
        Prompt(
            id=i, text="", token_ids=tuple(torch.randint(8, 97, (n,), generator=generator).tolist())
        )
        for i, n in enumerate(lengths)
    ]


def engine(model: Decoder, **changes: object) -> Engine:
    arguments: dict[str, object] = {
        "kv_bytes": 1 << 26, "stop_ids": (END,), "decode": lambda ids: " ".join(map(str, ids)),
        "max_tokens": 700, "max_running": 64,
    }  # fmt: skip
    return Engine(model, **{**arguments, **changes})  # type: ignore[arg-type]


def taken_from(sleeper: Engine) -> list[torch.Tensor]:
    """Something else that lies where a sleeping engine's pool lay."""
    data = sleeper._kv_pool.data
    place, size = data.data_ptr(), data.nbytes
    del data
    torch.cuda.empty_cache()  # so that few other free blocks are as good
    sleeper.sleep()
    blockers: list[torch.Tensor] = []
    while len(blockers) < 16:
        blockers.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        if abs(blockers[-1].data_ptr() - place) < size:
            return blockers
    raise AssertionError("nothing came to lie where the pool lay")


def flat(rollouts: list[list[Rollout]]) -> list[Rollout]:
    return [r for group in rollouts for r in group]


def assert_same(got: list[list[Rollout]], want: list[list[Rollout]]) -> None:
    for one, other in zip(flat(got), flat(want), strict=True):
        assert torch.equal(one.token_ids, other.token_ids)
        assert torch.equal(one.logprobs, other.logprobs)
        assert one.finish_reason == other.finish_reason


@pytest.mark.parametrize("samples", [1, 2, 3, 8, 21, 40])
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "mistral_window"])
def test_graphs_equal_the_steps_without_capture(name: str, samples: int) -> None:
    model = adapted(gpu_model(name))
    sampling = Sampling(max_completion_tokens=70, seed=3)
    asked = prompts(5, 64, 300)[: 1 if samples > 8 else 3]
    captured = engine(model)
    got = captured.generate(asked, sampling, num_samples=samples)
    want = engine(model, cuda_graphs=False).generate(asked, sampling, num_samples=samples)
    assert captured.graph_stats.num_graphs > 0
    assert_same(got, want)
    assert len({tuple(r.token_ids.tolist()) for r in flat(got)}) == len(flat(got))


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "mistral_window"])
def test_a_chain_of_many_rows_over_the_library_s_products(name: str) -> None:
    """More rows than any product has a form for: norms, SwiGLU and attention begin early."""
    sampling = Sampling(max_completion_tokens=450, seed=3)  # two buckets of contexts
    asked = prompts(5, 64, 80)
    model = gpu_model(name)
    plain = engine(model, stop_ids=(), max_running=128).generate(asked, sampling, num_samples=40)
    model.max_folded_rows = 256
    chained = engine(model, stop_ids=(), max_running=128)
    got = chained.generate(asked, sampling, num_samples=40)
    eager = engine(model, stop_ids=(), max_running=128, cuda_graphs=False)
    assert_same(got, eager.generate(asked, sampling, num_samples=40))
    assert_same(chained.generate(asked, sampling, num_samples=40), got)
    gaps = [
        abs(float(a.logprobs[1] - b.logprobs[1]))
        for a, b in zip(flat(got), flat(plain), strict=True)
        if torch.equal(a.token_ids[:2], b.token_ids[:2])
    ]
    assert len(gaps) > 60, "the first token is the prefill's, the second nearly always the same"
    assert max(gaps) < 0.2


@pytest.mark.parametrize("steps", [1, 3, 16])
def test_looking_at_the_result_more_often_changes_nothing(steps: int) -> None:
    model = gpu_model()
    sampling = Sampling(max_completion_tokens=64)
    want = engine(model, stop_ids=()).generate(prompts(33), sampling, num_samples=8)
    got = engine(model, stop_ids=(), steps_per_sync=steps).generate(
        prompts(33), sampling, num_samples=8
    )
    assert_same(got, want)


def test_replays_after_an_adapter_update_equal_a_fresh_engine() -> None:
    model = adapted(gpu_model())
    sampling = Sampling(max_completion_tokens=40)
    old = engine(model)
    before = old.generate(prompts(20, 70), sampling, num_samples=4)
    captured = old.graph_stats.num_graphs
    turn(model, 0.2)
    got = old.generate(prompts(20, 70), sampling, num_samples=4)
    assert_same(got, engine(model).generate(prompts(20, 70), sampling, num_samples=4))
    assert [r.token_ids.tolist() for r in flat(got)] != [r.token_ids.tolist() for r in flat(before)]
    assert old.graph_stats.num_graphs >= captured


def test_graphs_survive_a_pool_that_moves() -> None:
    model = gpu_model()
    sampling = Sampling(max_completion_tokens=50)
    sleeper = engine(model)
    want = sleeper.generate(prompts(100, 9), sampling, num_samples=4)
    graphs = sleeper.graph_stats.num_graphs
    place = sleeper._kv_pool.data.data_ptr()
    blocker = taken_from(sleeper)
    got = sleeper.generate(prompts(100, 9), sampling, num_samples=4)
    assert sleeper._kv_pool.data.data_ptr() != place
    assert sleeper.graph_stats.num_graphs == graphs
    assert_same(got, want)
    del blocker


@pytest.mark.parametrize(
    "knobs",
    [{"temperature": 0.0}, {"temperature": 0.7, "min_completion_tokens": 12}, {"top_k": 5}],
)
def test_rules_are_read_at_run_time(knobs: dict[str, float]) -> None:
    model = gpu_model()
    kept = engine(model)
    kept.generate(prompts(12), Sampling(max_completion_tokens=20, seed=1), num_samples=4)
    sampling = Sampling(max_completion_tokens=30, seed=2, **knobs)  # type: ignore[arg-type]
    got = kept.generate(prompts(12), sampling, num_samples=4)
    assert_same(got, engine(model).generate(prompts(12), sampling, num_samples=4))
    assert all(len(r.token_ids) >= knobs.get("min_completion_tokens", 0) for r in flat(got))


def test_stop_strings_cut_what_a_burst_drew_past_them() -> None:
    model = gpu_model()
    sampling = Sampling(max_completion_tokens=60)
    free = flat(engine(model).generate(prompts(30), sampling, num_samples=6))
    word = str(free[0].token_ids[5].item())
    stopped = Sampling(max_completion_tokens=60, stop=(f" {word} ",))
    got = flat(engine(model).generate(prompts(30), stopped, num_samples=6))
    assert got[0].finish_reason == "stop"
    assert len(got[0].token_ids) < len(free[0].token_ids)
    assert len(got[0].logprobs) == len(got[0].token_ids)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_scarce_memory_preempts_and_writes_the_same(temperature: float) -> None:
    model = adapted(gpu_model())
    model.set_bitwise(True)
    sampling = Sampling(max_completion_tokens=200, temperature=temperature)
    roomy = engine(model, stop_ids=())
    want = roomy.generate(prompts(70, 3, 130), sampling, num_samples=4)
    assert roomy.stats.num_preemptions == 0
    scarce = engine(model, stop_ids=(), kv_bytes=14 * roomy.block_bytes)
    for _ in range(2):
        got = scarce.generate(prompts(70, 3, 130), sampling, num_samples=4)
        assert all(len(r.token_ids) == 200 for r in flat(got))
        assert_same(got, want)
        assert scarce.stats.num_preemptions > 0
        assert scarce.stats.num_free_blocks == scarce.stats.num_blocks


def alive(owner: Engine) -> int:
    """Bytes in the graphs' memory that some tensor holds."""
    assert owner._graph_steps is not None
    memory = owner._graph_steps._memory
    assert memory is not None
    with memory.allocating():  # the library's scratch beside a bias: nobody reads it later
        ones = torch.ones(16, 16, dtype=owner.model.dtype, device="cuda")
        torch.nn.functional.linear(ones, ones, ones[0])
        del ones
    pool, segments = memory._handle, torch.cuda.memory_snapshot()
    return sum(s["allocated_size"] for s in segments if s["segment_pool_id"] == pool)


@pytest.mark.parametrize("rows", [6, 40, 200])
@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
@pytest.mark.parametrize("is_adapted", [True, False])
def test_steps_leave_nothing_in_the_memory_of_graphs(
    name: str, is_adapted: bool, rows: int
) -> None:
    for make in kept.MAKERS:
        make.cache_clear()
    model = adapted(gpu_model(name)) if is_adapted else gpu_model(name)
    asked = prompts(*[9] * rows)
    owner = engine(model, stop_ids=(), max_running=512)
    limits = [[1 + 15 * (i % 4)] for i in range(rows)]
    owner._reserve(asked, limits)
    before = alive(owner)
    owner.generate(asked, Sampling(max_completion_tokens=80), limits=limits)
    assert alive(owner) == before


def test_what_outlives_a_step_lies_outside_its_graph() -> None:
    """Counters of products in few rows, first needed after steps of many rows were captured."""
    for make in kept.MAKERS:
        make.cache_clear()
    model = gpu_model()
    model.set_bitwise(True)
    asked = prompts(*[9] * 400)  # one prefill of many rows
    limits = [[1 + 60 * (i < 20) + i % 20] for i in range(400)]
    sampling = Sampling(max_completion_tokens=80)
    many = engine(model, stop_ids=(), max_running=512)
    many._reserve(asked, limits)
    before = alive(many)
    want = many.generate(asked, sampling, limits=limits)
    assert many.graph_stats.num_graphs > 1
    assert alive(many) == before, "nothing that a step made is still there"
    assert_same(many.generate(asked, sampling, limits=limits), want)
    eager = engine(model, stop_ids=(), max_running=512, cuda_graphs=False)
    assert_same(eager.generate(asked, sampling, limits=limits), want)


def test_a_pool_of_another_size_has_graphs_of_its_own() -> None:
    model = gpu_model()
    sampling = Sampling(max_completion_tokens=40)
    changed = engine(model, stop_ids=())
    want = changed.generate(prompts(70, 3), sampling, num_samples=4)
    changed.sleep()
    changed.num_blocks //= 2
    assert_same(changed.generate(prompts(70, 3), sampling, num_samples=4), want)


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_keys_and_values_in_eight_bits(kv_dtype: str) -> None:
    model = adapted(gpu_model())
    sampling, asked = Sampling(max_completion_tokens=60), prompts(100, 9, 70)
    half = engine(model, stop_ids=())
    small = engine(model, stop_ids=(), kv_dtype=kv_dtype)
    assert small.block_bytes < 0.6 * half.block_bytes
    got = small.generate(asked, sampling, num_samples=4)
    plain = engine(model, stop_ids=(), kv_dtype=kv_dtype, cuda_graphs=False)
    assert_same(got, plain.generate(asked, sampling, num_samples=4))
    place = small._kv_pool.data.data_ptr()
    blocker = taken_from(small)
    assert_same(got, small.generate(asked, sampling, num_samples=4))
    assert small._kv_pool.data.data_ptr() != place
    del blocker
    want = half.generate(asked, sampling, num_samples=4)
    gaps = [
        abs(float(a.logprobs[0]) - float(b.logprobs[0]))
        for a, b in zip(flat(got), flat(want), strict=True)
        if int(a.token_ids[0]) == int(b.token_ids[0])
    ]
    assert len(gaps) >= 8
    assert 0 < sum(gaps) / len(gaps) < 0.15


@pytest.mark.parametrize("samples", [1, 16])
def test_memory_of_graphs_is_reserved_before_keys_and_values(samples: int) -> None:
    model = adapted(gpu_model())
    writer = engine(model, stop_ids=())
    sizes = []
    taken = writer.wake

    def wake() -> None:
        sizes.append(writer.graph_stats.num_bytes)
        taken()

    writer.wake = wake
    for knobs in ({}, {"top_p": 0.9}):
        sampling = Sampling(max_completion_tokens=600, **knobs)  # two buckets of contexts
        writer.generate(prompts(20, 30, 40), sampling, num_samples=samples)
    assert writer.graph_stats.num_graphs >= 4
    assert sizes[0] > 0
    assert {*sizes, writer.graph_stats.num_bytes} == {sizes[0]}


def test_more_rows_reserve_more_and_keys_and_values_lie_behind() -> None:
    model = gpu_model()
    writer = engine(model)
    sampling = Sampling(max_completion_tokens=20)
    few = writer.generate(prompts(20), sampling)
    small = writer.graph_stats.num_bytes
    many = writer.generate(prompts(*[20] * 40), sampling, num_samples=2)
    assert writer.graph_stats.num_bytes >= small
    assert_same([few[0]], engine(model).generate(prompts(20), sampling))
    assert len(flat(many)) == 80
    assert_same(many, engine(model).generate(prompts(*[20] * 40), sampling, num_samples=2))


def test_sleep_frees_the_pool_though_graphs_were_captured() -> None:
    writer = engine(gpu_model(), kv_bytes=1 << 28)
    sampling = Sampling(max_completion_tokens=8)
    writer.generate(prompts(20, 30), sampling, num_samples=2)
    awake = torch.cuda.memory_allocated()
    writer.sleep()
    freed = awake - torch.cuda.memory_allocated()
    assert freed >= writer.num_blocks * writer.block_bytes
