"""Rollouts on the CPU: the engine against transformers' generate, same work, one run.

16 prompts of 40 tokens x 8 samples on a model of 1.6 million random parameters; completion lengths
log-uniform from 8 to 128, forced and the same in both arms. Prints one JSON object: seconds of each
arm (median), their ratio, and where the engine's time goes.

    python benchmarks/rollout_cpu.py --repeats 5 --threads 2
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time

import torch

from sparring.models.rope import RopeConfig
from sparring.models.transformer import Decoder, TransformerConfig
from sparring.rollout.engine import Engine
from sparring.rollout.sampler import Sampling
from sparring.types import Prompt

NUM_PROMPTS, NUM_SAMPLES, PROMPT_TOKENS = 16, 8, 40
SHORTEST, LONGEST = 8, 128
LAYERS, WIDTH, HEADS, KV_HEADS, FFN, VOCAB = 6, 144, 4, 2, 432, 600


def build_decoder() -> Decoder:
    """A decoder with random weights."""
    config = TransformerConfig(
        family="llama",
        vocab_size=VOCAB,
        width=WIDTH,
        num_layers=LAYERS,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_size=WIDTH // HEADS,
        ffn_width=FFN,
        norm_eps=1e-6,
        rope=RopeConfig(),
        windows=(0,) * LAYERS,
        max_tokens=512,
        tied_head=True,
    )
    model = Decoder(config, dtype=torch.float32)
    model.init_weights(0)
    return model


def transformers_seconds(prompts: list[Prompt], limits: list[list[int]]) -> float:
    """Seconds of one generate call over all samples, rows stopping at their own length."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = transformers.LlamaForCausalLM(config)
    model.requires_grad_(False)
    wanted = torch.tensor([length for lengths in limits for length in lengths])

    class AtLength(transformers.StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
            return input_ids.shape[1] - PROMPT_TOKENS >= wanted

    input_ids = torch.tensor([prompt.token_ids for prompt in prompts])
    started = time.perf_counter()
    model.generate(  # type: ignore[misc]
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_return_sequences=NUM_SAMPLES,
        max_new_tokens=LONGEST,
        stopping_criteria=transformers.StoppingCriteriaList([AtLength()]),
    )
    return time.perf_counter() - started


def main() -> None:
    """Runs both arms in turn and prints the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=("engine", "transformers"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    draw = random.Random(0)
    prompts = [
        Prompt(id=i, token_ids=tuple(draw.randrange(VOCAB) for _ in range(PROMPT_TOKENS)), text="")
        for i in range(NUM_PROMPTS)
    ]
    low, high = math.log(SHORTEST), math.log(LONGEST)
    limits = [
        [round(math.exp(draw.uniform(low, high))) for _ in range(NUM_SAMPLES)] for _ in prompts
    ]
    engine = Engine(
        build_decoder(), kv_bytes=1 << 28, stop_ids=(), decode=lambda _: "", max_tokens=512
    )
    sampling = Sampling(max_completion_tokens=LONGEST)
    engine_seconds: list[float] = []
    peer_seconds: list[float] = []
    for repeat in range(arguments.repeats + 1):  # the first is a warm-up
        if arguments.only != "transformers":
            started = time.perf_counter()
            engine.generate(prompts, sampling, num_samples=NUM_SAMPLES, limits=limits)
            engine_seconds += [time.perf_counter() - started] * (repeat > 0)
        if arguments.only != "engine":
            peer_seconds += [transformers_seconds(prompts, limits)] * (repeat > 0)
    report: dict[str, object] = {"threads": arguments.threads, "torch": torch.__version__}
    report["completion_tokens"] = sum(map(sum, limits))
    if engine_seconds:
        stats = engine.stats
        report["engine_seconds"] = round(statistics.median(engine_seconds), 3)
        report["prefill_seconds"] = round(stats.prefill_seconds, 3)
        report["decode_ms_per_step"] = round(1e3 * stats.decode_seconds / stats.num_decode_steps, 2)
        report["decode_tokens_per_second"] = round(stats.decode_tokens_per_second)
        report["mean_rows"] = round(stats.mean_rows, 1)
    if peer_seconds:
        report["transformers_seconds"] = round(statistics.median(peer_seconds), 3)
    if engine_seconds and peer_seconds:
        ratio = statistics.median(peer_seconds) / statistics.median(engine_seconds)
        report["speedup"] = round(ratio, 2)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
