"""PPO's bytes beside GRPO's, as the plan sees them: Markdown tables for the documentation.

    python benchmarks/plan_algorithms.py

No GPU is needed. Same work and settings in every column: 4 prompts x 8 completions of 256 + 768
tokens, 8,192 tokens a micro-batch, checkpoints per layer, bf16, AdamW in float32. Policy and
critics train an adapter of rank 16 on all linear layers, or all weights. The reference is the
policy with its adapter off, which takes no bytes; for all weights it is a frozen copy.
"""

from __future__ import annotations

from typing import Any

import shapes

from sparring.models.checkpoint import family_of
from sparring.train.plan import Phase, predict
from sparring.train.plan_job import Job, Settings, Trained, Work
from sparring.train.plan_table import algorithm_jobs, compared, table_lines

LLAMA_70B: dict[str, Any] = {
    **shapes.SHAPES["llama-3.1-8b"], "hidden_size": 8192, "intermediate_size": 28672,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
}  # fmt: skip
MODELS = {
    "70B (Llama 3.1)": LLAMA_70B,
    "7B (Qwen2.5)": shapes.SHAPES["qwen2.5-7b"],
    "1.5B (Qwen2.5)": shapes.SHAPES["qwen2.5-1.5b"],
}
WORK = Work(prompts=4, group_size=8, prompt_tokens=256, completion_tokens=768)
SETTINGS = Settings(checkpointing="layers", micro_batch_tokens=8192)


def columns(config: dict[str, Any], *, is_quantised: bool, rank: int) -> dict[str, Phase]:
    """The training phase by algorithm."""
    shape = family_of(config).config(config)
    policy = Trained(config=shape, is_quantised=is_quantised, rank=rank)
    job = Job(policy=policy, work=WORK, reference="base" if rank else "weights")
    return {name: predict(one, SETTINGS).training for name, one in algorithm_jobs(job).items()}


def main() -> None:
    kinds = {
        "adapter on NF4": {"is_quantised": True, "rank": 16},
        "adapter on bf16": {"is_quantised": False, "rank": 16},
    }
    rows = [
        (f"{name}, {kind}", columns(config, **how))
        for name, config in MODELS.items()
        for kind, how in kinds.items()
    ]
    print("Training phase, GiB in all:\n")
    print("\n".join(compared(rows)))
    full = [
        (f"{name}, all weights", columns(config, is_quantised=False, rank=0))
        for name, config in MODELS.items()
    ]
    print("\nWhere the policy trains all weights:\n")
    print("\n".join(compared(full)))
    print("\nBy part, 7B, adapter on NF4:\n\n```")
    found = columns(shapes.SHAPES["qwen2.5-7b"], is_quantised=True, rank=16)
    print("\n".join(table_lines(found)))
    print("```")


if __name__ == "__main__":
    main()
