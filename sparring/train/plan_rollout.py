"""The memory of a rollout as a tape: prefill, decode steps and what the engine keeps for them.

It mirrors rollout/engine.py on a GPU in 16 bits. The KV pool is taken last and is as large as it is
told; everything else depends on the model and on how many rows run.
"""

from __future__ import annotations

from sparring.models.quantised import FUSED_ROWS
from sparring.rollout.cuda_graph import context_bucket, row_bucket
from sparring.rollout.engine import KERNEL_BLOCK_SIZE
from sparring.rollout.graph_memory import SMALL_BYTES, SMALL_PIECES, step_bytes
from sparring.train.allocator import MIDDLE_SEGMENT
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


def rows_at_once(work: Work, kv_bytes: int, kv_bytes_per_token: int, most: int) -> int:
    """Completions that the engine lets run together: all of a step's, more (in evaluations) as far
    as they fit the KV pool at full length, at most `most`.
    """
    each = work.prompt_tokens / work.group_size + work.completion_tokens
    fitting = int(kv_bytes / (kv_bytes_per_token * each))
    return max(1, min(most, max(work.num_completions, fitting)))


def take_graphs(
    tape: Tape, model: Trained, work: Work, settings: Settings, rows: int, *, arch: int,
    workspace: int,
) -> None:  # fmt: skip
    """What captured decode steps of so many rows keep: a step's tensors and a library workspace.

    They have a memory pool of their own, in pages of its own.
    """
    rows = row_bucket(rows, rows)
    scratch = 0
    if not settings.caches_weights and rows > FUSED_ROWS.get(arch, 64):
        scratch = max(size.decoded_rows(model.item) for size in model.linears().values())
    longest = work.prompt_tokens + work.completion_tokens
    step = step_bytes(
        model.config, rows, context_bucket(longest, longest), item=model.item, scratch=scratch
    )
    tape.take(GRAPHS, -(-(workspace + step) // MIDDLE_SEGMENT) * MIDDLE_SEGMENT)
    tape.take(GRAPHS, SMALL_BYTES * SMALL_PIECES)


def take_rollout(tape: Tape, model: Trained, work: Work, settings: Settings) -> None:
    """KV pool, decoded weights and a prefill step; everything is given back at the end."""
    item, linears = model.item, model.linears()
    cached: list[int] = []
    pool = tape.take(KV, settings.kv_bytes)
    if settings.caches_weights:
        for _ in range(model.config.num_layers):
            cached += [
                tape.take(DECODED, size.decoded(item))
                for size in linears.values()
                if size.is_quantised
            ]
    tokens = max(1, min(PREFILL_TOKENS, work.prompts * work.prompt_tokens))
    prompts = min(work.prompts, max(1, tokens // work.prompt_tokens))
    _prefill(tape, model, tokens, prompts, work.group_size, settings)
    tape.give(pool, *cached)


def _prefill(
    tape: Tape, model: Trained, tokens: int, prompts: int, samples: int, settings: Settings
) -> None:
    """A prefill step without gradient; every sample draws from the last row of its prompt."""
    config, item = model.config, model.item
    width = tokens * config.width * item

    def product(name: str) -> int:
        size = model.linears()[name]
        y = tape.take(WORKING, tokens * size.outputs * item)
        if not settings.caches_weights and size.is_quantised:
            tape.brief(DECODED, size.decoded_rows(item))
        return y

    heads = tokens * config.num_heads * config.head_size * item
    tape.brief(WORKING, tokens * config.head_size * 4 * 3)  # angles
    x, normed = tape.take(WORKING, width), tape.take(WORKING, width)
    qkv = product("qkv")
    with tape.during(WORKING, heads):
        attended = tape.take(WORKING, heads)
    added = product("output")
    tape.give(qkv, attended, normed)
    normed, summed = tape.take(WORKING, width), tape.take(WORKING, width)
    tape.give(added, x)
    gate_up = product("gate_up")
    hidden = tape.take(WORKING, tokens * config.ffn_width * item)
    tape.give(gate_up)
    down = product("down")
    tape.give(hidden, normed)
    with tape.during(WORKING, width):
        tape.give(down, summed)
        with tape.during(LOGITS, prompts * config.vocab_size * 4):
            tape.brief(LOGITS, prompts * samples * config.vocab_size * 4)


def kv_tokens(work: Work, running: int) -> int:
    """Tokens of keys and values of `running` completions of full length, in whole blocks."""
    prompts = -(-running // work.group_size)
    block = KERNEL_BLOCK_SIZE
    each = -(-(work.prompt_tokens % block + work.completion_tokens) // block) * block
    shared = work.prompt_tokens // block * block
    return prompts * shared + running * each + block
