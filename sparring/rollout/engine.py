"""The rollout engine: completions of prompts, on the trainer's own weights, inside a byte budget.

It knows tokens, and one function that decodes them for stop strings. Between calls it keeps the
memory for keys and values and nothing that was computed: weights may change from call to call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparring.errors import MemoryBudgetError, UserError
from sparring.layout import KVPool
from sparring.models.quantised import cache_weights, uncache_weights
from sparring.models.transformer import Decoder, kv_bytes_per_token, new_kv_pool
from sparring.rollout.block_pool import BlockPool, blocks_for
from sparring.rollout.cuda_graph import GraphStats, GraphSteps
from sparring.rollout.generation import Enough, Generation, OnTokens, Progress
from sparring.rollout.sampler import Sampling
from sparring.rollout.scheduler import Scheduler
from sparring.rollout.steps import DecodeSteps, EagerSteps
from sparring.rollout.stopping import Decode
from sparring.types import Prompt, Rollout

_FIRST_GUESS_TOKENS = 128.0
CPU_BLOCK_SIZE = 16
KERNEL_BLOCK_SIZE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """What one generate call did.

    num_prefill_tokens counts recomputed tokens too, and a shared prompt once; num_decode_tokens the
    tokens of decode steps (the first token of a completion comes from the prefill). Crowded steps
    are those during which a sequence waited for a place. Blocks are those that sequences may hold;
    num_free_blocks is taken at the end.
    """

    num_rollouts: int = 0
    num_completion_tokens: int = 0
    num_prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    num_decode_steps: int = 0
    num_decode_tokens: int = 0
    decode_seconds: float = 0.0
    num_crowded_steps: int = 0
    num_crowded_tokens: int = 0
    num_preemptions: int = 0
    num_recomputed_tokens: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    peak_blocks: int = 0

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens sampled in decode steps for each second of them."""
        return self.num_decode_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def mean_rows(self) -> float:
        """Sequences in flight, averaged over decode steps."""
        return self.num_decode_tokens / self.num_decode_steps if self.num_decode_steps else 0.0

    @property
    def mean_crowded_rows(self) -> float:
        """Sequences in flight, averaged over the steps during which others waited."""
        return self.num_crowded_tokens / self.num_crowded_steps if self.num_crowded_steps else 0.0


class Engine:
    """Samples completions with a paged key/value memory of fixed size.

    kv_bytes: hard budget for keys and values. stop_ids: token ids that end a completion. decode:
    token ids -> text without special tokens. max_tokens: most tokens of prompt and completion
    together. max_running: most completions in flight. max_prefill_tokens: most tokens of one
    prefill step. adapter: as in `Decoder.forward`. block_size: tokens of a block; by default 64
    where the project's own kernels read the blocks, else 16. On a GPU decode steps are captured
    CUDA graphs of `steps_per_sync` steps between two looks at the result; cuda_graphs False: the
    same without capture, to the same tokens. caches_weights: keep four-bit weights decoded while
    generating (the same numbers in 16 bits), until `sleep`. kv_dtype: "auto" (the model's), or
    "int8" or "fp8" with a scale a token and head. Raises UserError or MemoryBudgetError.

    policy_version keys the noise and is recorded in every rollout; stats are of the last call that
    ended.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        kv_bytes: int,
        stop_ids: Sequence[int],
        decode: Decode,
        max_tokens: int,
        max_running: int = 256,
        block_size: int | None = None,
        max_prefill_tokens: int = 8192,
        adapter: str | None = "policy",
        cuda_graphs: bool = True,
        steps_per_sync: int = 16,
        caches_weights: bool = False,
        kv_dtype: Literal["auto", "int8", "fp8"] = "auto",
    ) -> None:
        on_kernels = has_kernels(model)
        if block_size is None:
            block_size = KERNEL_BLOCK_SIZE if on_kernels else CPU_BLOCK_SIZE
        _require_at_least(2, max_tokens=max_tokens)
        _require_at_least(
            1,
            kv_bytes=kv_bytes,
            max_running=max_running,
            block_size=block_size,
            max_prefill_tokens=max_prefill_tokens,
            steps_per_sync=steps_per_sync,
        )
        self.model = model
        self.stop_ids = tuple(stop_ids)
        self.decode = decode
        self.max_tokens = max_tokens
        self.max_running = max_running
        self.block_size = block_size
        self.max_prefill_tokens = max_prefill_tokens
        self.adapter = adapter
        self.policy_version = 0
        self.stats = EngineStats()
        self.kv_dtype = find_kv_dtype(model, kv_dtype)
        self.block_bytes = kv_bytes_per_token(model.config, self.kv_dtype) * block_size
        most_useful = 1 + max_running * blocks_for(max_tokens, block_size)
        self.num_blocks = min(kv_bytes // self.block_bytes, most_useful)
        if self.num_blocks < 2:
            raise MemoryBudgetError(
                f"{kv_bytes:,} bytes for keys and values hold {self.num_blocks} blocks of "
                f"{block_size} tokens ({self.block_bytes:,} bytes each); at least 2 are needed "
                f"(one is a spare). Give them {2 * self.block_bytes:,} bytes or more."
            )
        self._kv_pool: KVPool | None = None
        self._address: Tensor | None = None
        self._captures, self._caches_weights = cuda_graphs, caches_weights
        self._num_steps = steps_per_sync
        self._graph_steps: GraphSteps | None = None
        if on_kernels:
            num_places = 2 if self.kv_dtype.itemsize == 1 else 1
            self._address = torch.zeros(num_places, dtype=torch.int64, device=model.device)
        self._mean_completion_tokens = _FIRST_GUESS_TOKENS

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        num_samples: int = 1,
        limits: Sequence[Sequence[int]] | None = None,
        on_progress: Progress | None = None,
        on_tokens: OnTokens | None = None,
        enough: Enough | None = None,
    ) -> list[list[Rollout]]:
        """`num_samples` rollouts of each prompt, in the order of the prompts and of the samples.

        limits: completion limits by prompt and sample, beside those of `sampling` and max_tokens.
        on_progress: called after every step with (finished, all, tokens so far); on_tokens with
        (prompt, sample, its new tokens) as they arrive, the end token included. enough: called with
        (prompt, its rollouts) once all of a prompt's are complete; once it returns True the rest is
        left, and prompts that are not complete get an empty list. What is sampled
        depends on seed, policy version, prompt id and sample index alone; prompts of the same id in
        one call are samples of one prompt and differ. Raises UserError for a prompt that is empty,
        too long or holds unknown ids, MemoryBudgetError for one that can never fit, RunError where
        the model's logits are not finite; before any token is sampled but for the last.
        """
        _require_at_least(1, num_samples=num_samples)
        limits_PG = self._completion_limits(prompts, sampling, num_samples, limits)
        pool = BlockPool(self.num_blocks, self.block_size, self.block_bytes)
        scheduler = Scheduler(
            pool,
            max_running=self.max_running,
            max_prefill_tokens=self.max_prefill_tokens,
            expected_completion_tokens=min(
                self._mean_completion_tokens, sampling.max_completion_tokens
            ),
        )
        with torch.no_grad():
            self._reserve(prompts, limits_PG)
            self.wake()
            kv_pool = self._kv_pool
            assert kv_pool is not None, "the engine is awake"
            generation = Generation(
                self.model,
                kv_pool,
                scheduler,
                adapter=self.adapter,
                prompts=prompts,
                limits=limits_PG,
                sampling=sampling,
                stop_ids=self.stop_ids,
                decode=self.decode,
                policy_version=self.policy_version,
                steps=self._steps(kv_pool, sampling),
            )
            rollouts = generation.run(on_progress, on_tokens, enough)
        self._keep_stats(generation, pool)
        return rollouts

    def weights_changed(self, *, policy_version: int) -> None:
        """The model's weights are those of another policy version from now on."""
        _require_at_least(0, policy_version=policy_version)
        self.policy_version = policy_version

    def sleep(self) -> None:
        """Gives the memory for keys and values, and of decoded weights, to whoever computes next.

        Captured graphs stay valid; the next generate call, or `wake`, takes the memory again.
        """
        self._kv_pool = None
        if self._caches_weights:
            uncache_weights(self.model)

    def make_room(self) -> None:
        """Sleeps where training lives in the bytes of keys and values: on a card of its own."""
        if self.model.device.type != "cpu":
            self.sleep()

    def wake(self) -> None:
        """Takes the memory that `sleep` gave away."""
        if self._caches_weights:
            cache_weights(self.model)
        if self._kv_pool is None:
            self._kv_pool = new_kv_pool(
                self.model.config,
                self.num_blocks,
                self.block_size,
                self.kv_dtype,
                self.model.device,
                self._address,
            )

    @property
    def graph_stats(self) -> GraphStats:
        """The graphs captured so far; none on a CPU."""
        return self._graph_steps.stats if self._graph_steps else GraphStats(0, 0, 0.0)

    def _reserve(self, prompts: Sequence[Prompt], limits_PG: Sequence[Sequence[int]]) -> None:
        """Has memory for the graphs of a call, taken before the one of keys and values.

        Where it must grow, keys and values make way and are taken again behind it.
        """
        if self._address is None or not prompts:
            return
        if self._graph_steps is None:
            self._graph_steps = GraphSteps(
                self.model,
                adapter=self.adapter,
                stop_ids=self.stop_ids,
                max_rows=self.max_running,
                max_tokens=self.max_tokens,
                block_size=self.block_size,
                num_steps=self._num_steps,
                captures=self._captures,
                caches_weights=self._caches_weights,
            )
        rows = min(self.max_running, sum(map(len, limits_PG)))
        longest = max(
            len(prompt.token_ids) + max(limits_G, default=0)
            for prompt, limits_G in zip(prompts, limits_PG, strict=True)
        )
        if not self._graph_steps.has_room(rows, longest):
            self.sleep()
            self._graph_steps.reserve(rows, longest)

    def _steps(self, kv_pool: KVPool, sampling: Sampling) -> DecodeSteps:
        if self._graph_steps is None:
            return EagerSteps(
                self.model, kv_pool, adapter=self.adapter, sampling=sampling, stop_ids=self.stop_ids
            )
        self._graph_steps.aim(kv_pool, sampling)
        return self._graph_steps

    def _completion_limits(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        num_samples: int,
        limits: Sequence[Sequence[int]] | None,
    ) -> list[list[int]]:
        """[P][G] most completion tokens of every sample, after checking the prompts."""
        if limits is not None:
            sizes = [len(limits_G) for limits_G in limits]
            if sizes != [num_samples] * len(prompts) or min(map(min, limits), default=1) < 1:
                raise UserError(
                    f"limits must hold {num_samples} numbers from 1 up for each of {len(prompts)} "
                    f"prompts; got lists of {sorted(set(sizes))} numbers for {len(sizes)} prompts."
                )
        limits_PG: list[list[int]] = []
        for i, prompt in enumerate(prompts):
            self._check_prompt(prompt)
            most = min(sampling.max_completion_tokens, self.max_tokens - len(prompt.token_ids))
            wanted = [most] * num_samples if limits is None else limits[i]
            limits_PG.append([min(most, limit) for limit in wanted])
        return limits_PG

    def _check_prompt(self, prompt: Prompt) -> None:
        length, vocab_size = len(prompt.token_ids), self.model.config.vocab_size
        if length == 0:
            raise UserError(
                f"prompt {prompt.id} has no tokens; a prompt has at least one. Give it some text, "
                "or a template that opens with a token."
            )
        if length > self.max_tokens - 1:
            raise UserError(
                f"prompt {prompt.id} has {length} tokens, but max_tokens = {self.max_tokens} "
                f"leaves room for at most {self.max_tokens - 1} and a completion. Shorten the "
                "prompt or raise max_tokens."
            )
        low, high = min(prompt.token_ids), max(prompt.token_ids)
        if low < 0 or high >= vocab_size:
            raise UserError(
                f"prompt {prompt.id} holds token id {high if high >= vocab_size else low}; this "
                f"model knows 0 to {vocab_size - 1}. Tokenise it with the model's own tokenizer."
            )

    def _keep_stats(self, generation: Generation, pool: BlockPool) -> None:
        num_rollouts = len(generation.owners)
        if num_rollouts:
            self._mean_completion_tokens = generation.num_completion_tokens / num_rollouts
        assert pool.num_free == pool.num_usable, "every block is free again after the last rollout"
        self.stats = EngineStats(
            num_rollouts=num_rollouts,
            num_completion_tokens=generation.num_completion_tokens,
            num_prefill_tokens=generation.num_prefill_tokens,
            prefill_seconds=generation.prefill_seconds,
            num_decode_steps=generation.num_decode_steps,
            num_decode_tokens=generation.num_decode_tokens,
            decode_seconds=generation.decode_seconds,
            num_crowded_steps=generation.num_crowded_steps,
            num_crowded_tokens=generation.num_crowded_tokens,
            num_preemptions=generation.scheduler.num_preemptions,
            num_recomputed_tokens=generation.scheduler.num_recomputed_tokens,
            num_blocks=pool.num_usable,
            num_free_blocks=pool.num_free,
            peak_blocks=pool.peak_used,
        )


def has_kernels(model: Decoder) -> bool:
    """Whether decode steps run on the project's own kernels, and so may be captured."""
    is_half = model.dtype in (torch.bfloat16, torch.float16)
    is_gpu = model.device.type == "cuda"
    return is_gpu and is_half and model.capability.tensor_dots and model.config.head_size <= 256


def find_kv_dtype(model: Decoder, name: str) -> torch.dtype:
    """The dtype of keys and values; raises UserError for 8 bits where they cannot be."""
    names = {"auto": model.dtype, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
    if name not in names:
        raise UserError(f"kv_dtype is {name!r}; it takes {', '.join(map(repr, names))}.")
    if name == "auto":
        return model.dtype
    reason = ""
    if not has_kernels(model):
        reason = "a GPU with tensor cores and a model in 16 bits"
    elif name == "fp8" and model.capability.arch < 89:
        reason = "a card of compute capability 8.9 or later"
    elif model.is_bitwise:
        reason = "run.bitwise = false: the trainer's keys are in 16 bits"
    if reason:
        raise UserError(f"kv_dtype = {name!r} needs {reason}; leave it at 'auto'.")
    return names[name]


def _require_at_least(low: int, **values: int) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise UserError(f"{name} is {value!r}; it must be an integer from {low} up.")
