"""The rows of benchmarks/rollouts.py: which model does which work, its prompts and its lengths.

work = prompts, samples, prompt tokens, output tokens. `tiny` makes a row of the same kind that a
CPU runs in a second: it shows that a row runs, and measures nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from sparring.models.transformer import Decoder, kv_bytes_per_token
from sparring.train.cards import find_card
from sparring.types import Prompt

INSTRUCTIONS = Path(__file__).parents[1] / "docs" / "benchmarks" / "nf4-instructions-sm90.json"
"""Counted in the machine code by benchmarks/nf4_instructions.py."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    kind: rollout, ragged (prompts of 64 tokens to the row's, log-normal completions cut at the
    row's), step (a whole GRPO step) or prefill. kv_share: of the blocks that the same work takes at
    most where memory is no limit. runs: measured, after one that compiles and captures.
    """

    model: str
    work: tuple[int, int, int, int]
    quantization: str = "none"
    lora_rank: int = 0
    caches_weights: bool = False
    kind: str = "rollout"
    cap_gib: float = 0.0
    max_running: int = 512
    kv_share: float = 1.0
    checkpointing: str = "layers"
    micro_batch_tokens: int = 8192
    bitwise: bool = False
    cuda_graphs: bool = True
    steps_per_sync: int = 16
    kv_dtype: Literal["auto", "int8", "fp8"] = "auto"
    runs: int = 3

    def kv_bytes_per_token(self, model: Decoder) -> int:
        """Bytes of a token's keys and values, scales included."""
        kept = {"auto": model.dtype, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
        return kv_bytes_per_token(model.config, kept[self.kv_dtype])


SMALL, LARGE = "qwen2.5-1.5b", "qwen2.5-7b"
NF4: dict[str, Any] = {"model": LARGE, "quantization": "nf4"}
LORA: dict[str, Any] = {**NF4, "lora_rank": 16}
STEP: dict[str, Any] = {**LORA, "kind": "step"}
PLANNED: dict[str, Any] = {"checkpointing": "none", "micro_batch_tokens": 4096}
"""What `plan` chooses for such a step under 24 GiB (training_phase.py, 7b-nf4-24gib-plan)."""
RAGGED: dict[str, Any] = {
    **LORA, "work": (32, 8, 1024, 4096), "max_running": 128, "kind": "ragged", "runs": 2,
}  # fmt: skip
ROWS: dict[str, Row] = {
    "1.5b 1x8x256x512": Row(model=SMALL, work=(1, 8, 256, 512)),
    "1.5b bitwise 1x8x256x512": Row(model=SMALL, work=(1, 8, 256, 512), bitwise=True),
    "1.5b 16x8x256x512": Row(model=SMALL, work=(16, 8, 256, 512)),
    "1.5b 32x8x256x1024": Row(model=SMALL, work=(32, 8, 256, 1024)),
    "7b 4x8x256x768": Row(model=LARGE, work=(4, 8, 256, 768)),
    "7b 16x8x256x512": Row(model=LARGE, work=(16, 8, 256, 512)),
    "7b 16x8x256x512 int8": Row(model=LARGE, work=(16, 8, 256, 512), kv_dtype="int8"),
    "7b 16x8x256x512 fp8": Row(model=LARGE, work=(16, 8, 256, 512), kv_dtype="fp8"),
    "7b 32x8x256x1024": Row(model=LARGE, work=(32, 8, 256, 1024)),
    "7b nf4 fused 4x8x256x768": Row(**NF4, work=(4, 8, 256, 768)),
    "7b nf4 cached 4x8x256x768": Row(**NF4, work=(4, 8, 256, 768), caches_weights=True),
    "7b nf4 fused 16x8x256x512": Row(**NF4, work=(16, 8, 256, 512)),
    "7b nf4 cached 16x8x256x512": Row(**NF4, work=(16, 8, 256, 512), caches_weights=True),
    "7b nf4 lora fused 4x8x256x768": Row(**LORA, work=(4, 8, 256, 768)),
    "7b nf4 lora cached 4x8x256x768": Row(**LORA, work=(4, 8, 256, 768), caches_weights=True),
    "step 4x8x256x768": Row(**STEP, work=(4, 8, 256, 768)),
    "step cached 4x8x256x768": Row(**STEP, work=(4, 8, 256, 768), caches_weights=True),
    "step planned 4x8x256x768": Row(**STEP, **PLANNED, work=(4, 8, 256, 768)),
    "step 4x8x256x768 in 24 GiB": Row(**STEP, work=(4, 8, 256, 768), cap_gib=24),
    "step planned 4x8x256x768 in 24 GiB": Row(**STEP, **PLANNED, work=(4, 8, 256, 768), cap_gib=24),
    "step 4x8x256x256": Row(**STEP, work=(4, 8, 256, 256), micro_batch_tokens=2400),
    "step bitwise 4x8x256x768": Row(**STEP, work=(4, 8, 256, 768), bitwise=True),
    "prefill 32x2048": Row(model=LARGE, work=(32, 1, 2048, 1), kind="prefill"),
    "prefill nf4 32x2048": Row(**NF4, work=(32, 1, 2048, 1), kind="prefill"),
    "ragged": Row(**RAGGED),
    "ragged quarter": Row(**RAGGED | {"runs": 1}, kv_share=0.25),
    "ragged cached": Row(**RAGGED, caches_weights=True),
    "ragged cached quarter": Row(**RAGGED | {"runs": 1}, caches_weights=True, kv_share=0.25),
    "0.5b 32x8x256x1024": Row(model="qwen2.5-0.5b", work=(32, 8, 256, 1024)),
    "qwen3-0.6b 32x8x256x1024": Row(model="qwen3-0.6b", work=(32, 8, 256, 1024)),
}


def tiny(row: Row) -> Row:
    """A row of the same kind for a CPU: another model, fewer and shorter sequences, no cap."""
    prompts, samples, prompt_tokens, output = row.work
    work = (min(prompts, 4), min(samples, 2), prompt_tokens // 16, max(1, output // 32))
    return replace(
        row,
        model="tiny",
        work=work,
        cap_gib=0.0,
        max_running=max(3, row.max_running // 25),
        micro_batch_tokens=256,
        steps_per_sync=4,
        kv_dtype="auto",  # 8 bits need a GPU
    )


def prompts_of(row: Row, vocab_size: int) -> list[Prompt]:
    """Distinct random prompts of the row."""
    count, _, tokens, _ = row.work
    generator = torch.Generator().manual_seed(1)
    lengths = [tokens] * count
    if row.kind == "ragged":
        low = min(64, tokens)
        lengths = torch.randint(low, tokens + 1, (count,), generator=generator).tolist()
    high = vocab_size - 100
    return [
        Prompt(
            id=i, text="", token_ids=tuple(torch.randint(high, (n,), generator=generator).tolist())
        )
        for i, n in enumerate(lengths)
    ]


def limits_of(row: Row) -> list[list[int]]:
    """How long each completion is: the row's output tokens; ragged: log-normal, median 400."""
    prompts, samples, _, most = row.work
    if row.kind != "ragged":
        return [[most] * samples] * prompts
    normal = torch.randn(prompts, samples, generator=torch.Generator().manual_seed(2))
    lengths = (most / 4096 * 400 * normal.mul(0.8).exp()).clamp(1, most).long()
    return [[int(n) for n in line] for line in lengths]


def same_rows(row: Row, mean_rows: float, prompt_tokens: float, output: float) -> Row:
    """Fixed lengths with about as many rows in flight, all at once, and the same mean lengths."""
    most = max(1, round(mean_rows))
    _, samples = min(
        ((abs(round(most / s) * s - most), s) for s in range(min(6, most), min(10, most) + 1)),
    )
    count = max(1, round(most / samples))
    work = (count, samples, round(prompt_tokens), max(2, round(output)))
    return replace(row, kind="rollout", work=work, kv_share=1.0, runs=1)


def mean_context(row: Row) -> float:
    """Tokens that a row attends to on average: its prompt and half its output."""
    return row.work[2] + row.work[3] / 2


def seconds_a_step(row: Row, model: Decoder, bandwidth: float, rate: float) -> float:
    """The limit of one decode step of all the row's sequences at their mean context.

    Every weight is read once or every product computed, whichever takes longer; four-bit weights
    that are not decoded beforehand may be bound by the integer instructions of their decoding. Keys
    and values are read by every row; what is sampled costs nothing. bandwidth in bytes, rate in
    FLOP a second.
    """
    config, rows = model.config, row.work[0] * row.work[1]
    parameters = sum(
        linear.base.shape[0] * linear.base.shape[1] for linear in model.linears().values()
    )
    is_decoded = model.is_quantised and not row.caches_weights
    a_weight = 0.516 if is_decoded else 2.0
    head = config.vocab_size * config.width
    return (
        max(
            parameters * a_weight / bandwidth,
            2 * parameters * rows / rate,
            parameters * integer_seconds(rows) if is_decoded else 0.0,
        )
        + max(2 * head / bandwidth, 2 * head * rows / rate)
        + rows * mean_context(row) * row.kv_bytes_per_token(model) / bandwidth
    )


def prefill_seconds(row: Row, model: Decoder, bandwidth: float, rate: float) -> float:
    """The limit of the row's prefill: products and causal attention of every prompt token, the head
    of each prompt's last one, or reading the weights once, whichever takes longer.
    """
    config = model.config
    prompts, _, tokens, _ = row.work
    parameters = sum(
        linear.base.shape[0] * linear.base.shape[1] for linear in model.linears().values()
    )
    head = config.vocab_size * config.width
    pairs = tokens * (tokens + 1) / 2  # of query and key, a prompt
    attention = 4 * config.num_layers * config.num_heads * config.head_size * pairs
    flop = prompts * (2 * parameters * tokens + attention + 2 * head)
    return max(flop / rate, parameters * (0.516 if model.is_quantised else 2.0) / bandwidth)


def integer_seconds(rows: int) -> float:
    """Seconds of an H200's integer lanes for one weight of an NF4 product of so many rows."""
    tiles = json.loads(INSTRUCTIONS.read_text())["tiles"]
    tile = next((tile for tile in tiles if rows <= tile["rows"]), tiles[-1])
    return float(tile["integer a weight"]) / find_card("H200").lanes
