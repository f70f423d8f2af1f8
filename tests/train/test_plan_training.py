"""The plan's tape of a training pass against a trace of the real code, at real widths."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparring.algorithms.losses import dapo
from sparring.kernels.nf4 import NF4Matrix
from sparring.layout import PackedLayout
from sparring.models.checkpoint import build_model, family_of
from sparring.models.lora import PROJECTIONS, LoraConfig
from sparring.models.quantised import Quantised
from sparring.models.transformer import Decoder
from sparring.train.allocator import CachingAllocator
from sparring.train.optimizer import build_optimizer
from sparring.train.plan_job import Settings, Trained
from sparring.train.plan_seconds import HEAD_LAUNCHES, launches
from sparring.train.plan_training import MicroBatch, TrainingTape
from sparring.train.tape import Event, Peak, Tape, play
from sparring.types import Batch
from tests.train import memory_trace
from tests.train.memory_trace import CARD, META

pytest.importorskip("triton", reason="kernels are traced as a GPU runs them")

PROMPT, COMPLETION, GROUP = 256, 768, 8
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-7b": {
        "architectures": ["Qwen2ForCausalLM"], "hidden_size": 3584, "intermediate_size": 18944,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
    "qwen2.5-0.5b": {
        "architectures": ["Qwen2ForCausalLM"], "hidden_size": 896, "intermediate_size": 4864,
        "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"], "hidden_size": 1024, "intermediate_size": 3072,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 151936, "tie_word_embeddings": True,
    },
}  # fmt: skip


def config_of(shape: str, num_layers: int) -> dict[str, Any]:
    return {**SHAPES[shape], "num_hidden_layers": num_layers, "max_position_embeddings": 32768}


def model_of(
    shape: str, num_layers: int, is_quantised: bool, targets: tuple[str, ...] | None
) -> Decoder:
    """A model without data, as a card would hold it."""
    model = build_model(
        config_of(shape, num_layers),
        device=META,
        dtype=torch.bfloat16,
        is_quantised=is_quantised,
        capability=CARD,
    )
    for linear in model.linears().values():
        if isinstance(linear.base, Quantised):
            for index, rows in enumerate(linear.base.part_rows):
                linear.base.fill(index, packed(rows, linear.base.num_inputs))
    if targets:
        model.add_adapter(LoraConfig(rank=16, target_modules=targets))
    return model


def packed(rows: int, inputs: int) -> NF4Matrix:
    def empty(numbers: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(numbers, dtype=dtype, device=META)

    blocks = rows * inputs // 64
    return NF4Matrix(
        packed=empty(rows * inputs // 2, torch.uint8),
        absmax=empty(blocks, torch.uint8),
        absmax2=empty(-(-blocks // 256), torch.float32),
        offset=empty(-(-blocks // 256), torch.float32),
        shape=(rows, inputs),
        dtype=torch.bfloat16,
    )


def batch_of(num_groups: int) -> tuple[Batch, MicroBatch]:
    """Whole groups, as a batch without data and as the plan knows it."""
    bounds, parents = [0], []
    for _ in range(num_groups):
        parent = len(parents)
        parents += [-1, *[parent] * GROUP]
        bounds.append(bounds[-1] + PROMPT - 1)
        bounds += [bounds[-1] + COMPLETION * i for i in range(1, GROUP + 1)]
    rows, loss_rows = bounds[-1], num_groups * GROUP * COMPLETION

    def empty(dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(rows, dtype=dtype, device=META)

    batch = Batch(
        input_ids_T=empty(torch.int64),
        labels_T=empty(torch.int64),
        positions_T=empty(torch.int64),
        layout=PackedLayout(cu_seqlens=tuple(bounds), parents=tuple(parents)),
        loss_mask_T=empty(torch.bool),
        sequence_ids_T=empty(torch.int64),
        num_local_sequences=num_groups * GROUP,
        num_loss_tokens=float(loss_rows),
        num_sequences=float(num_groups * GROUP),
        advantages_T=empty(torch.float32),
        sampler_logprobs_T=empty(torch.float32),
    )
    groups = ((PROMPT - 1, GROUP),) * num_groups
    return batch, MicroBatch(rows=rows, loss_rows=loss_rows, groups=groups)


def traced(model: Decoder, batch: Batch, loss_rows: int) -> Peak:
    """Two micro-batches of the real code."""
    with memory_trace.pretending(loss_rows):
        tape = memory_trace.Tape()
        with tape:
            for _ in range(2):
                dapo(model.score(batch), batch).loss.backward()
    return play([Event(*event, "") for event in tape.events], CachingAllocator(expandable=True))


def planned(model: Trained, settings: Settings, batch: MicroBatch) -> Peak:
    tape = Tape()
    training = TrainingTape(tape, model, settings)
    training.micro_batch(batch)
    later = {"has_gradients": True, "rows": batch.rows, "loss_rows": batch.loss_rows}
    training.micro_batch(MicroBatch(groups=batch.groups, **later))
    return play(tape.events, CachingAllocator(expandable=True))


@pytest.mark.parametrize(
    ("shape", "is_quantised", "targets", "mode", "num_groups"),
    [
        ("qwen2.5-7b", True, ATTENTION, "layers", 1),
        ("qwen2.5-7b", True, PROJECTIONS, "layers", 2),
        ("qwen2.5-7b", True, ATTENTION, "selective", 1),
        ("qwen2.5-7b", True, ATTENTION, "none", 1),
        ("qwen2.5-7b", False, PROJECTIONS, "none", 1),
        ("qwen2.5-7b", False, None, "layers", 1),
        ("qwen3-0.6b", False, ATTENTION, "layers", 1),
        ("qwen3-0.6b", False, PROJECTIONS, "none", 1),
        ("qwen2.5-0.5b", False, None, "none", 1),
        ("qwen2.5-0.5b", False, None, "layers", 1),
    ],
)
def test_the_tape_asks_for_what_the_code_asks_for(
    shape: str, is_quantised: bool, targets: tuple[str, ...] | None, mode: str, num_groups: int
) -> None:
    num_layers = 5
    model = model_of(shape, num_layers, is_quantised, targets)
    model.set_checkpointing(mode)
    if targets is None:  # gradients of 16 bits move into float32 as they arrive
        build_optimizer(model.trainable_parameters(), learning_rate=1e-5, num_steps=1)
    config = config_of(shape, num_layers)
    trained = Trained(
        config=family_of(config).config(config),
        is_quantised=is_quantised,
        rank=16 if targets else 0,
        targets=frozenset(targets or ()),
    )
    batch, micro_batch = batch_of(num_groups)
    code = traced(model, batch, micro_batch.loss_rows)
    plan = planned(trained, Settings(checkpointing=mode), micro_batch)
    assert 0.99 * code.allocated < plan.allocated < 1.03 * code.allocated
    assert 0.96 * code.reserved < plan.reserved < 1.06 * code.reserved


@pytest.mark.parametrize(
    ("shape", "is_quantised", "targets", "mode"),
    [
        ("qwen2.5-0.5b", False, None, "none"),
        ("qwen2.5-0.5b", False, None, "layers"),
        ("qwen2.5-0.5b", False, PROJECTIONS, "layers"),
        ("qwen2.5-0.5b", True, PROJECTIONS, "layers"),
        ("qwen2.5-7b", True, ATTENTION, "none"),
        ("qwen2.5-7b", True, ATTENTION, "layers"),
        ("qwen3-0.6b", False, ATTENTION, "none"),
        ("qwen3-0.6b", False, ATTENTION, "layers"),
    ],
)
def test_the_host_launches_as_often_as_is_counted(
    shape: str, is_quantised: bool, targets: tuple[str, ...] | None, mode: str
) -> None:
    counts, batch = [], batch_of(1)[0]
    for num_layers in (2, 3):
        model = model_of(shape, num_layers, is_quantised, targets)
        model.set_checkpointing(mode)
        if targets is None:
            build_optimizer(model.trainable_parameters(), learning_rate=1e-5, num_steps=1)
        for _ in range(2):  # the first makes what is made once, and has no gradients to add to
            found = memory_trace.Launches()
            with memory_trace.pretending(GROUP * COMPLETION, found.kernel), found:
                dapo(model.score(batch), batch).loss.backward()
        counts.append(found)
    config = config_of(shape, 3)
    trained = Trained(
        config=family_of(config).config(config), is_quantised=is_quantised,
        rank=16 if targets else 0, targets=frozenset(targets or ()),
    )  # fmt: skip
    kernels, operations = launches(trained, mode != "none")
    assert abs(counts[1].kernels - counts[0].kernels - kernels) <= 2
    assert abs(counts[1].operations - counts[0].operations - operations) <= 2
    if targets is not None:
        rest = counts[0].kernels - 2 * kernels, counts[0].operations - 2 * operations
        assert rest == pytest.approx(HEAD_LAUNCHES, abs=4)
