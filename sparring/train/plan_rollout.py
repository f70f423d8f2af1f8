"""The memory of a rollout as a tape: prefill, decode steps and what the engine keeps for them.

It mirrors rollout/engine.py on a GPU in 16 bits. The KV pool is taken last and is as large as it is
told; everything else depends on the model and on how many rows run.
"""

from __future__ import annotations

from sparring.train.plan_job import (
    DECODED,
    GRAPHS,
    KV,
    LOGITS,
    WORKING,
    Settings,
    Trained,
    Work,
)
from sparring.train.tape import Tape

PREFILL_TOKENS = 8192
"""Most tokens of one prefill step, as the engine's own default."""
BLOCK_TOKENS = 16
"""Tokens of a block of the KV pool, as the engine's own default."""


def take_rollout(tape: Tape, model: Trained, work: Work, settings: Settings) -> None:
    """KV pool, a prefill step and a decode step; everything is given back at the end."""
    item, linears = model.item, model.linears()
    cached: list[int] = []
    if settings.caches_weights:
        for _ in range(model.config.num_layers):
            cached += [
                tape.take(DECODED, size.decoded(item)) for size in linears.values()
                if size.is_quantised
            ]  # fmt: skip
    pool = tape.take(KV, settings.kv_bytes)
    rows = min(settings.max_running, work.num_completions)
    prefill = max(1, min(PREFILL_TOKENS, work.prompts * work.prompt_tokens))
    _forward(tape, model, prefill, work.prompts, settings)
    _forward(tape, model, rows, rows, settings)
    tape.give(pool, *cached)


def _forward(tape: Tape, model: Trained, tokens: int, drawn: int, settings: Settings) -> None:
    """One step without gradient; `drawn` rows of logits are sampled from."""
    config, item = model.config, model.item
    linears = model.linears()

    def decoded(name: str) -> int:
        return 0 if settings.caches_weights else linears[name].decoded(item)

    def rows(numbers: int) -> int:
        return tokens * numbers * item

    x, normed = tape.take(WORKING, rows(config.width)), tape.take(WORKING, rows(config.width))
    with tape.during(DECODED, decoded("qkv")):
        qkv = tape.take(WORKING, rows(linears["qkv"].outputs))
    with tape.during(WORKING, rows(linears["qkv"].outputs)):
        attended = tape.take(WORKING, rows(linears["output"].inputs))
    tape.give(qkv, normed)
    with tape.during(DECODED, decoded("output")):
        added = tape.take(WORKING, rows(config.width))
    tape.give(attended)
    normed = tape.take(WORKING, rows(config.width))
    with tape.during(DECODED, decoded("gate_up")):
        gate_up = tape.take(WORKING, rows(2 * config.ffn_width))
    hidden = tape.take(WORKING, rows(config.ffn_width))
    tape.give(gate_up)
    with tape.during(DECODED, decoded("down")):
        tape.brief(WORKING, rows(config.width))
    tape.give(hidden, added, normed)
    with tape.during(LOGITS, drawn * config.vocab_size * 4):
        tape.brief(LOGITS, drawn * config.vocab_size * 4)
    tape.brief(GRAPHS, drawn * config.num_heads * 8 * (config.head_size + 1) * 4)
    tape.give(x)


def kv_tokens(work: Work, *, running: int) -> int:
    """Tokens of keys and values of `running` completions of full length, in whole blocks."""
    running = min(running, work.num_completions)
    prompts = -(-running // work.group_size)
    block = BLOCK_TOKENS
    each = -(-(work.prompt_tokens % block + work.completion_tokens) // block) * block
    shared = work.prompt_tokens // block * block
    return prompts * shared + running * each + block
