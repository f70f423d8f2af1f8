"""The plan: bytes by part worked out by hand, proposals that fit, refusals with numbers."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sparring.errors import MemoryBudgetError
from sparring.models.checkpoint import build_model, family_of
from sparring.models.lora import LoraConfig
from sparring.recipe import build_recipe, load_recipe, recipe_text
from sparring.train.cards import Card, find_card
from sparring.train.optimizer import build_optimizer
from sparring.train.plan import MODES, micro_batches, predict, propose
from sparring.train.plan_job import (
    ADAPTERS,
    CONTEXT,
    GRAPHS,
    KV,
    OPTIMIZER,
    PARTS,
    WEIGHTS,
    Job,
    Settings,
    Trained,
    Work,
)
from sparring.train.plan_recipe import (
    algorithm_of,
    fit_memory,
    hold_budget,
    job_of,
    plan_recipe,
)
from sparring.train.plan_seconds import (
    HEAD_LAUNCHES,
    KERNEL_SECONDS,
    OPERATION_SECONDS,
    STEP_SECONDS,
    launches,
)
from sparring.train.plan_table import as_dict, plan_lines

GIB = 2**30
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 512,
    "intermediate_size": 1408, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": 32000, "tie_word_embeddings": True,
    "max_position_embeddings": 4096, "torch_dtype": "bfloat16",
}  # fmt: skip
WORK = Work(prompts=4, group_size=8, prompt_tokens=100, completion_tokens=300)
H200 = find_card("H200")
ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})


def model(**changes: Any) -> Trained:
    return Trained(config=family_of(CONFIG).config(CONFIG), **changes)


def recipe_for(folder: Path, **tables: Any) -> Any:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return build_recipe(
        {
            "model": {"path": str(folder), "max_tokens": 400},
            "lora": {"rank": 8},
            "reward": [{"name": "math"}],
            "rollout": {"prompts_per_step": 4, "max_completion_tokens": 300},
            **tables,
        },
        command="plan",
    )


@pytest.mark.parametrize("rank", [0, 16])
def test_what_stays_is_what_the_model_and_the_optimizer_hold(rank: int) -> None:
    built = build_model(CONFIG, device="cpu", dtype=torch.bfloat16)
    if rank:
        built.add_adapter(LoraConfig(rank=rank))
    tensors = [*built.parameters(), *(b for b in built.buffers())]
    held = sum(t.numel() * t.element_size() for t in tensors)
    trained = built.trainable_parameters()
    optimizer = build_optimizer(trained, learning_rate=1e-3, num_steps=1)
    for p in trained.values():
        p.grad = torch.zeros_like(p)
        if p.dtype == torch.bfloat16:
            p.backward(torch.zeros_like(p))
    optimizer.step(gradient_norm=1.0, max_grad_norm=1.0)
    state = optimizer.state_tensors()
    moments = sum(t.numel() * t.element_size() for t in state.values())
    plan = predict(Job(policy=model(rank=rank), work=WORK), Settings())
    assert plan.rollout is not None
    parts = plan.rollout.parts
    # blocks of 512 bytes: vectors and counts take a whole one, small tables are not counted
    assert (
        0.999 * held <= parts[WEIGHTS] + parts.get(ADAPTERS, 0) <= 1.01 * held + 512 * len(tensors)
    )
    assert moments <= parts[OPTIMIZER] <= 1.01 * moments + 512 * len(state)


def test_parts_add_up_to_the_total_and_are_known() -> None:
    plan = predict(Job(policy=model(), work=WORK), Settings(), budget=8 * GIB, card=H200)
    for phase in (plan.rollout, plan.training):
        assert phase is not None
        assert set(phase.parts) <= set(PARTS)
        assert sum(phase.parts.values()) == phase.total
        assert phase.parts[CONTEXT] == GIB
    assert KV not in plan.training.parts
    assert plan.fits
    assert plan.seconds is not None
    assert min(plan.seconds.prefill, plan.seconds.decode, plan.seconds.training) > 0


def test_micro_batches_are_those_that_packing_makes() -> None:
    # a group is 99 + 8 x 300 rows; two of 2,499 fit into 5,000
    batches = micro_batches(WORK, 5000, exact=True)
    assert [batch.rows for batch in batches] == [4998, 4998]
    assert batches[0].groups == ((99, 8), (99, 8))
    split = micro_batches(WORK, 1000, exact=True)
    assert sum(batch.loss_rows for batch in split) == 4 * 8 * 300
    assert max(batch.rows for batch in split) == 99 + 3 * 300
    open_ended = micro_batches(WORK, 1000)
    # three completions and their prompt fit: a group is cut in three, its prompt laid down thrice
    assert sum(batch.rows for batch in open_ended) == 4 * (3 * 99 + 8 * 300)
    assert max(batch.rows for batch in open_ended) == 1000
    # a completion longer than the limit has a micro-batch to itself
    assert micro_batches(WORK, 100)[0].rows == 99 + 300


def test_less_is_kept_with_checkpoints_and_less_still_with_offload() -> None:
    job = Job(policy=model(rank=8), work=replace(WORK, prompts=32, completion_tokens=1000))
    totals = {
        mode: predict(job, Settings(checkpointing=mode, micro_batch_tokens=32768)).training.total
        for mode in MODES
    }
    assert totals["none"] > totals["selective"] > totals["layers"]
    offloaded = Settings(checkpointing="layers", micro_batch_tokens=32768, offload=True)
    assert predict(job, offloaded).training.total < totals["layers"]


def test_a_proposal_fits_and_more_memory_is_never_slower() -> None:
    job = Job(policy=model(rank=8), work=replace(WORK, prompts=16, completion_tokens=1500))
    seconds = []
    for budget in (2.2 * GIB, 3 * GIB, 8 * GIB, 40 * GIB):
        plan = propose(job, Settings(), budget=int(budget), card=H200)
        assert plan.fits
        assert plan.total <= budget
        assert plan.seconds is not None
        seconds.append(plan.seconds.training)
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] > seconds[-1]


def qwen_7b() -> Trained:
    config = CONFIG | {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
        "tie_word_embeddings": False, "max_position_embeddings": 131072,
    }  # fmt: skip
    targets = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
    return Trained(config=family_of(config).config(config), is_quantised=True, targets=targets)


@pytest.mark.parametrize(
    ("completion_tokens", "prompts", "mode", "offload"),
    [(768, 4, "none", False), (32768, 1, "selective", False), (65536, 1, "selective", True)],
)
def test_what_is_proposed_for_seven_billion_parameters_on_24_gib(
    completion_tokens: int, prompts: int, mode: str, offload: bool
) -> None:
    work = Work(
        prompts=prompts, group_size=8, prompt_tokens=256, completion_tokens=completion_tokens
    )
    job = Job(policy=qwen_7b(), work=work)
    plan = propose(job, Settings(), budget=24 * GIB, card=H200, exact=True)
    assert plan.fits
    assert not plan.training.is_tight
    assert (plan.settings.checkpointing, plan.settings.offload) == (mode, offload)
    plain = "none" if mode == "none" else "layers"
    slower = replace(plan.settings, checkpointing=plain, micro_batch_tokens=2048, offload=True)
    other = predict(job, slower, budget=24 * GIB, card=H200, exact=True)
    assert plan.seconds.training <= other.seconds.training


def test_keys_and_values_in_eight_bits_are_counted_with_their_scales(tmp_path: Path) -> None:
    half, small = (
        job_of(recipe_for(tmp_path, rollout={"kv_dtype": name})) for name in ("auto", "int8")
    )
    head = half.policy.config.head_size
    assert half.policy.kv_bytes_per_token == 6 * 2 * 2 * head * 2
    assert small.policy.kv_bytes_per_token == 6 * 2 * 2 * (head + 4)
    plans = [predict(job, Settings(), budget=8 * GIB) for job in (half, small)]
    sizes = [plan.settings.kv_bytes for plan in plans]
    assert sizes[1] / sizes[0] == pytest.approx((head + 4) / (2 * head), rel=1e-3)


def test_graphs_take_pages_of_their_own_and_grow_with_rows_and_contexts() -> None:
    work = Work(prompts=1, group_size=8, prompt_tokens=256, completion_tokens=768)
    settings, sizes = Settings(checkpointing="layers", offload=True), []
    for changes in ({}, {"prompts": 32}, {"completion_tokens": 32768}):
        job = Job(policy=qwen_7b(), work=replace(work, **changes))
        plan = predict(job, settings, budget=40 * GIB)
        assert plan.rollout is not None
        sizes.append(plan.rollout.parts[GRAPHS])
    assert all((size - 8 * 2**20) % (20 * 2**20) == 0 for size in sizes)
    logits = 256 * 152064 * 4
    assert logits < sizes[1] < logits + 2**28
    assert sizes[0] <= sizes[2] < sizes[1]


def test_nothing_fits_is_said_with_the_numbers() -> None:
    job = Job(policy=model(rank=0), work=WORK)
    with pytest.raises(
        MemoryBudgetError, match=r"nothing fits into 1\.20 GiB.*on the host.*weights 0\.0.*nf4"
    ):
        propose(job, Settings(), budget=int(1.2 * GIB), card=H200)


def test_keys_and_values_take_what_is_left_and_no_more_than_is_useful() -> None:
    job = Job(policy=model(rank=8), work=replace(WORK, prompts=64, completion_tokens=3000))
    wide = predict(job, Settings(), budget=80 * GIB)
    each = job.policy.kv_bytes_per_token
    assert wide.settings.kv_bytes // each >= 64 * 100 + 512 * 3000
    tight = predict(job, Settings(), budget=3 * GIB)
    assert tight.rollout is not None
    assert tight.settings.kv_bytes < wide.settings.kv_bytes
    assert 0.93 * 3 * GIB < tight.rollout.total <= 3 * GIB


def test_a_recipe_is_read_with_its_reference_and_its_critic(tmp_path: Path) -> None:
    plain = recipe_for(tmp_path)
    assert algorithm_of(plain) == "grpo"
    assert job_of(plain).reference == "none"
    with_kl = recipe_for(tmp_path, loss={"name": "grpo", "kl_coef": 0.1})
    assert job_of(with_kl).reference == "base"
    ppo = recipe_for(tmp_path, value={"rank": 4}, train={"passes": 4})
    job = job_of(ppo)
    assert algorithm_of(ppo) == "ppo"
    assert job.critic is not None
    assert job.shares_trunk
    assert job.work == Work(prompts=4, group_size=8, prompt_tokens=100, completion_tokens=300)
    apart = recipe_for(tmp_path, value={"rank": 0, "path": str(tmp_path)})
    larger = predict(replace(job_of(apart), samples=False), Settings()).training.total
    assert larger > predict(replace(job, samples=False), Settings()).training.total
    assert predict(replace(job, samples=False), Settings()).training.total > (
        predict(replace(job_of(plain), samples=False), Settings()).training.total
    )


def test_auto_is_decided_on_a_cpu_and_kept_in_the_record(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, train={"micro_batch_tokens": "auto", "checkpointing": "auto"})
    assert 'micro_batch_tokens = "auto"' in recipe_text(recipe)
    (tmp_path / "recipe.toml").write_text(recipe_text(recipe))
    assert load_recipe(str(tmp_path / "recipe.toml"), command="plan") == recipe
    said: list[str] = []
    decided = fit_memory(recipe, "grpo", said.append)
    if not torch.cuda.is_available():
        assert (decided.train.micro_batch_tokens, decided.train.checkpointing) == (8192, "none")
        assert decided.rollout.kv_memory == "auto"
        assert said == []


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A card of 24 GiB that exists in numbers alone; what it is told."""
    told: dict[str, Any] = {}
    plan_recipe_module = "sparring.train.plan_recipe"
    monkeypatch.setattr(f"{plan_recipe_module}.pick_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(f"{plan_recipe_module}.free_bytes", lambda _: 23 * GIB)
    properties = type("Properties", (), {"total_memory": 24 * GIB})()
    for name, found in {
        "get_device_properties": lambda _: properties,
        "get_device_name": lambda _: "NVIDIA GeForce RTX 4090",
        "get_device_capability": lambda _: (8, 9),
        "memory_reserved": lambda _: 0,
        "current_device": lambda: 0,
        "set_per_process_memory_fraction": lambda share, device: told.update(
            share=share, index=device.index
        ),
    }.items():
        monkeypatch.setattr(torch.cuda, name, found)
    monkeypatch.setattr(
        torch._C, "_accelerator_setAllocatorSettings", lambda text: told.update(allocator=text)
    )
    return told


def test_on_a_card_everything_open_is_decided_before_anything_is_loaded(
    tmp_path: Path, card: dict[str, Any]
) -> None:
    said: list[str] = []
    recipe = recipe_for(
        tmp_path, train={"micro_batch_tokens": "auto", "checkpointing": "auto"},
        run={"memory": "4GiB"}, optimizer={"learning_rate": 1e-5},
    )  # fmt: skip
    decided = fit_memory(recipe, "grpo", said.append)
    assert card["allocator"] == "expandable_segments:True"
    assert card["share"] == pytest.approx((4 - 1) / 24)
    assert card["index"] == 0  # torch takes no device without its number here
    assert decided.train.micro_batch_tokens > 0
    assert decided.train.checkpointing in MODES
    assert decided.run.memory == 4 * GIB
    assert isinstance(decided.rollout.kv_memory, int)
    assert decided.rollout.cache_weights is False
    assert "of 4.00 GiB planned" in said[0]
    free = fit_memory(recipe_for(tmp_path), "grpo", said.append)
    assert free.run.memory == 23 * GIB
    assert card["share"] == 1.0


def test_a_budget_is_held_on_a_card_without_a_number(card: dict[str, Any]) -> None:
    assert hold_budget(6 * GIB, torch.device("cuda"), print) == 6 * GIB
    assert (card["share"], card["index"]) == (pytest.approx(5 / 24), 0)
    assert hold_budget("auto", torch.device("cuda"), print) == 23 * GIB
    assert (card["share"], card["index"]) == (1.0, 0)
    said: list[str] = []
    assert hold_budget(25 * GIB, torch.device("cuda"), said.append) == 24 * GIB
    assert card["share"] == pytest.approx(23 / 24)
    assert "programs can use 24.00 GiB" in said[0]
    with pytest.raises(MemoryBudgetError, match=r"has 24\.00 GiB; give it at most that"):
        hold_budget(26 * GIB, torch.device("cuda"), print)


def test_on_a_card_settings_that_do_not_fit_are_refused_with_those_that_do(
    tmp_path: Path, card: dict[str, Any]
) -> None:
    rollout = {"prompts_per_step": 32, "max_completion_tokens": 300}
    train = {"micro_batch_tokens": 32768, "checkpointing": "none"}
    recipe = recipe_for(tmp_path, rollout=rollout, train=train, run={"memory": "3GiB"})
    with pytest.raises(MemoryBudgetError) as refusal:
        fit_memory(recipe, "grpo", print)
    text = str(refusal.value)
    assert "micro_batch_tokens = 32768" in text
    assert "do not fit into 3.00 GiB: they take" in text
    pasted = "\n".join(line for line in text.splitlines()[1:])
    (tmp_path / "lines.toml").write_text(pasted)
    tables = load_lines(tmp_path / "lines.toml")
    again = recipe_for(tmp_path, rollout=rollout, **tables)
    assert fit_memory(again, "grpo", print).train.checkpointing == tables["train"]["checkpointing"]
    with pytest.raises(MemoryBudgetError, match=r"RTX 4090 has 24\.00 GiB"):
        fit_memory(recipe_for(tmp_path, run={"memory": "80GiB"}), "grpo", print)
    assert card["share"] < 1.0


def load_lines(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text())


def test_a_recipe_that_does_not_fit_is_shown_beside_one_that_does(tmp_path: Path) -> None:
    recipe = recipe_for(
        tmp_path, rollout={"prompts_per_step": 32, "max_completion_tokens": 300},
        train={"micro_batch_tokens": 32768, "checkpointing": "none"},
    )  # fmt: skip
    job = job_of(recipe)
    asked, best = plan_recipe(recipe, job, budget=3 * GIB, card=find_card("4090"))
    assert best is not None
    assert not asked.fits
    assert best.fits
    text = "\n".join(plan_lines(asked, "asked") + plan_lines(best, "best"))
    assert "does NOT fit" in text
    assert "RTX 4090 (estimate)" in text
    assert json.loads(json.dumps(as_dict(best)))["card"]["is_measured"] is False


def test_what_a_recipe_leaves_out_is_its_default_where_that_fits_and_open_elsewhere(
    tmp_path: Path, card: dict[str, Any]
) -> None:
    rollout = {"prompts_per_step": 32, "max_completion_tokens": 300}
    roomy = fit_memory(recipe_for(tmp_path, rollout=rollout), "grpo", print)
    assert (roomy.train.micro_batch_tokens, roomy.train.checkpointing) == (8192, "none")
    silent = recipe_for(tmp_path, rollout=rollout, run={"memory": "1800MiB"})
    decided = fit_memory(silent, "grpo", print)
    assert (decided.train.micro_batch_tokens, decided.train.checkpointing) != (8192, "none")
    asked, best = plan_recipe(silent, job_of(silent), budget=1800 * 2**20, card=find_card("4090"))
    assert asked.fits
    assert asked.settings.checkpointing == decided.train.checkpointing
    assert best is not None
    assert best.settings == asked.settings
    tokens = recipe_for(
        tmp_path, rollout=rollout, train={"micro_batch_tokens": 4096}, run={"memory": "1800MiB"}
    )
    assert fit_memory(tokens, "grpo", print).train.micro_batch_tokens == 4096
    assert card["share"] < 1.0


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "quantization", "least", "most"),
    [
        ("Qwen2.5-7B-Instruct", "nf4", 5.0, 5.4),
        ("Qwen2.5-7B-Instruct", "none", 14.1, 14.3),
        ("Llama-3.1-8B", "none", 14.9, 15.1),
        ("Qwen3-8B", "nf4", 5.5, 6.3),
    ],
)
def test_real_configs(
    shared_dir: Path, name: str, quantization: str, least: float, most: float
) -> None:
    path = shared_dir / "configs" / f"{name}.json"
    recipe = build_recipe(
        {
            "model": {"path": str(path), "quantization": quantization, "max_tokens": 1024},
            "lora": {"rank": 16},
            "reward": [{"name": "math"}],
        },
        command="plan",
    )
    plan = predict(job_of(recipe), Settings(checkpointing="layers"))
    assert least < plan.training.parts[WEIGHTS] / GIB < most


def test_a_micro_batch_takes_as_long_as_the_host_or_the_card_whichever_is_longer() -> None:
    slow, fast = (replace(H200, flops=k * H200.flops, bandwidth=k * H200.bandwidth) for k in (1, 4))

    def seconds(width: int, card: Card) -> float:
        config = replace(model().config, width=width, ffn_width=4 * width)
        job = Job(policy=replace(model(rank=8), config=config), work=WORK)
        plan = predict(job, Settings(checkpointing="layers"), card=card)
        assert plan.seconds is not None
        return plan.seconds.training

    kernels, operations = launches(model(rank=8), recomputes=True)
    layers = 6 * (kernels * KERNEL_SECONDS + operations * OPERATION_SECONDS)
    small = [seconds(512, card) for card in (slow, fast)]
    assert small[1] == pytest.approx(small[0], rel=0.01)  # as many launches on any card
    head = HEAD_LAUNCHES[0] * KERNEL_SECONDS + HEAD_LAUNCHES[1] * OPERATION_SECONDS
    batches = micro_batches(WORK, Settings().micro_batch_tokens)
    assert small[0] == pytest.approx(len(batches) * (layers + head) + STEP_SECONDS, rel=0.01)
    large = [seconds(16384, card) - STEP_SECONDS for card in (slow, fast)]
    assert large[1] < 0.3 * large[0]


def test_remedies_are_those_that_are_left() -> None:
    job = Job(policy=model(rank=8, targets=ATTENTION, is_quantised=True), work=WORK)
    with pytest.raises(MemoryBudgetError) as refusal:
        propose(job, Settings(), budget=1100 * 2**20, card=H200)
    assert "give more memory, shorten completions or take a smaller model" in str(refusal.value)
    with pytest.raises(MemoryBudgetError, match=r"nf4.*an adapter \(\[lora\]\), shorten"):
        propose(Job(policy=model(rank=0), work=WORK), Settings(), budget=1100 * 2**20, card=H200)
