"""One generate call from its first prefill to its last token.

Holds what lives only that long: the scheduler's books, the tokens so far, the rows of the decode
step. An interrupted call leaves nothing behind but the memory for keys and values itself.
"""

from __future__ import annotations

import itertools
import math
import time
from array import array
from collections.abc import Callable, Sequence
from contextlib import closing

import torch
from torch import Tensor

from sparring.errors import RunError
from sparring.kernels.upload import upload
from sparring.layout import KVPool
from sparring.models.transformer import Decoder
from sparring.rollout.device_rows import Fetched, fetch
from sparring.rollout.rows import prefill_layout
from sparring.rollout.sampler import Sampling, end_id_tensor, sample_id, sample_tokens
from sparring.rollout.scheduler import PrefillChunk, Scheduler, SequenceState
from sparring.rollout.steps import DecodeSteps
from sparring.rollout.stopping import Decode, StopRule
from sparring.types import FinishReason, Prompt, Rollout

Progress = Callable[[int, int, int], None]
"""Called after every step with (finished completions, all completions, tokens sampled so far)."""

OnTokens = Callable[[int, int, Sequence[int]], None]
"""Called with (prompt, sample, its new tokens) as they arrive: a few at a time, never twice."""


Enough = Callable[[int, list[Rollout]], bool]
"""Called with a prompt's place and its rollouts once the last is complete; True: that is enough."""


def queues_ahead(device: torch.device) -> bool:
    """Whether a prefill step is queued before the last one's tokens are read."""
    return device.type != "cpu"


class Generation:
    """Samples the completions of some prompts.

    kv_pool is written to; scheduler is fresh and keeps its books on that pool. limits: for each
    prompt the completion limit of each of its samples. steps: computes the decode steps.
    """

    def __init__(
        self,
        model: Decoder,
        kv_pool: KVPool,
        scheduler: Scheduler,
        *,
        adapter: str | None,
        prompts: Sequence[Prompt],
        limits: Sequence[Sequence[int]],
        sampling: Sampling,
        stop_ids: Sequence[int],
        decode: Decode,
        policy_version: int,
        steps: DecodeSteps,
    ) -> None:
        self.model = model
        self.steps = steps
        self.kv_pool = kv_pool
        self.scheduler = scheduler
        self.adapter = adapter
        self.prompts = prompts
        self.limits = limits
        self.sampling = sampling
        self.policy_version = policy_version
        self.stop_rule = StopRule(
            stop_ids=stop_ids,
            stop=sampling.stop,
            min_completion_tokens=sampling.min_completion_tokens,
            decode=lambda token_ids: decode(list(token_ids)),
        )
        self.end_ids = end_id_tensor(stop_ids, model.config.vocab_size, model.device)
        self.owners: list[Prompt] = []
        self.places: list[tuple[int, int]] = []
        self.sample_ids: list[tuple[int, int]] = []
        for place, (prompt, noise_offset, limits_G) in enumerate(
            zip(prompts, _noise_offsets(prompts, limits), limits, strict=True)
        ):
            scheduler.add(prompt_length=len(prompt.token_ids), max_completion_tokens=limits_G)
            for sample_index in range(len(limits_G)):
                self.owners.append(prompt)
                self.places.append((place, sample_index))
                noise_index = noise_offset + sample_index
                self.sample_ids.append(sample_id(policy_version, prompt.id, noise_index))
        # arrays: a rollout's tensors are then made without a conversion at the end
        self.token_ids = [array("q") for _ in self.owners]
        self.logprobs = [array("f") for _ in self.owners]
        self.finish_reasons: list[FinishReason | None] = [None] * len(self.owners)
        self._on_tokens: OnTokens | None = None
        self._num_left = [len(limits_G) for limits_G in limits]
        self._first = [0, *itertools.accumulate(self._num_left)]
        self._completed: list[int] = []
        self.num_finished = 0
        self.num_completion_tokens = 0
        self.num_prefill_tokens = 0
        self.num_decode_steps = 0
        self.num_decode_tokens = 0
        self.num_crowded_steps = 0
        self.num_crowded_tokens = 0
        self._has_cut = False
        self.prefill_seconds = 0.0
        self.decode_seconds = 0.0

    def run(
        self,
        on_progress: Progress | None = None,
        on_tokens: OnTokens | None = None,
        enough: Enough | None = None,
    ) -> list[list[Rollout]]:
        """The rollouts by prompt and sample, in the order asked for.

        Once `enough` says so, prompts that are not complete are left out whole: an empty list.
        """
        self._on_tokens = on_tokens
        scheduler = self.scheduler
        while scheduler.has_work:
            self._prefill_all(on_progress)
            if running := scheduler.next_decode(self.steps.num_steps):
                self._decode(running, on_progress, enough)
            if enough is not None and self._is_enough(enough):
                scheduler.abandon()
        return self._rollouts()

    def _is_enough(self, enough: Enough) -> bool:
        """Asks about every prompt that is complete since the last time."""
        completed, self._completed = self._completed, []
        answers = [enough(place, self._rollouts_of(place)) for place in completed]
        return any(answers)

    def _report(self, on_progress: Progress | None) -> None:
        if on_progress is not None:
            on_progress(self.num_finished, len(self.owners), self.num_completion_tokens)

    def _prefill_all(self, on_progress: Progress | None) -> None:
        """Every prefill step that there is now.

        On a GPU the next step is queued before what the last one drew is read, so the device does
        not wait for the host's books. It never needs those tokens: of a group whose sequences have
        just drawn, none can enter before one of those in memory has ended, which reading tells.
        """
        started, drawn = time.perf_counter(), None
        is_ahead = queues_ahead(self.model.device)
        while (chunks := self.scheduler.next_prefill()) or drawn is not None:
            following = self._prefill(chunks) if chunks else None
            if drawn is not None:
                self._take_drawn(*drawn, on_progress)
            drawn = following
            if drawn is not None and not is_ahead:
                self._take_drawn(*drawn, on_progress)
                drawn = None
        self.prefill_seconds += time.perf_counter() - started

    def _take_drawn(
        self, drawing: Sequence[SequenceState], drawn: Fetched, on_progress: Progress | None
    ) -> None:
        """Notes the tokens that a prefill step drew."""
        drawn.wait()
        self._record(drawing, drawn.tokens_NR, drawn.logprobs_NR, is_cached=False)
        self._report(on_progress)

    def _prefill(
        self, chunks: Sequence[PrefillChunk]
    ) -> tuple[Sequence[SequenceState], Fetched] | None:
        """Computes prompts (and what preempted sequences had written); draws where one ends.

        A prompt's last logits are computed once; every sequence of its group draws from them.
        Returns who draws and what, on its way to the CPU; None if no prompt ends.
        """
        device = self.model.device
        layout, positions_T = prefill_layout(
            chunks, block_size=self.kv_pool.block_size, device=device
        )
        tokens = [token for chunk in chunks for token in self._chunk_tokens(chunk)]
        hidden_TD = self.model(
            upload(tokens, device), positions_T, layout, self.kv_pool, adapter=self.adapter
        )
        self._copy_blocks(self.scheduler.complete_prefill(chunks))
        self.num_prefill_tokens += len(tokens)
        last_rows: list[int] = []
        drawing: list[SequenceState] = []
        row_of: list[int] = []
        for chunk, end in zip(chunks, layout.cu_seqlens[1:], strict=True):
            if chunk.drawing:
                row_of += [len(last_rows)] * len(chunk.drawing)
                drawing += chunk.drawing
                last_rows.append(end - 1)
        if not drawing:
            return None
        logits_SV = self.model.logits(hidden_TD[upload(last_rows, device)])
        tokens_R, logprobs_R = sample_tokens(
            logits_SV[upload(row_of, device)],
            self.sampling,
            upload([self.sample_ids[s.index] for s in drawing], device),
            upload([s.num_completion_tokens for s in drawing], device),
            self.end_ids,
        )
        return drawing, fetch(tokens_R[None], logprobs_R[None])

    def _chunk_tokens(self, chunk: PrefillChunk) -> Sequence[int]:
        index = chunk.sequence.index
        prompt_ids = self.owners[index].token_ids
        end = chunk.start + chunk.length
        if end <= len(prompt_ids):
            return prompt_ids[chunk.start : end]
        return [*prompt_ids, *self.token_ids[index]][chunk.start : end]

    def _copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        if not copies:
            return
        data = self.kv_pool.data
        sources, targets = upload(copies, data.device).T
        data[:, targets] = data[:, sources]
        if self.kv_pool.scales is not None:
            self.kv_pool.scales[:, targets] = self.kv_pool.scales[:, sources]

    def _decode(
        self,
        running: Sequence[SequenceState],
        on_progress: Progress | None,
        enough: Enough | None,
    ) -> None:
        """Bursts of decode steps for the running sequences, until their rows must change."""
        started = time.perf_counter()
        is_crowded = self.scheduler.has_waiting
        self._has_cut = False

        def may_go_on(num_tokens: int) -> bool:
            """A row that only the host knows to have ended would write into blocks given away."""
            if self._has_cut or self.scheduler.has_waiting or (enough and self._completed):
                return False
            return self.scheduler.reserve_ahead(running, num_tokens)

        with closing(self.steps.run(running, self.token_ids, self.sample_ids, may_go_on)) as bursts:
            for burst in bursts:
                num_tokens = self._record(
                    running, burst.tokens_NR, burst.logprobs_NR, is_cached=True
                )
                self.num_decode_steps += len(burst.tokens_NR)
                self.num_decode_tokens += num_tokens
                if is_crowded:
                    self.num_crowded_steps += len(burst.tokens_NR)
                    self.num_crowded_tokens += num_tokens
                self._report(on_progress)
        self.decode_seconds += time.perf_counter() - started

    def _record(
        self,
        drawing: Sequence[SequenceState],
        tokens_NR: Tensor,
        logprobs_NR: Tensor,
        *,
        is_cached: bool,
    ) -> int:
        """Notes the tokens each sequence drew; completions that end leave the scheduler.

        tokens [N, R] and logprobs [N, R] are on the CPU; -1: the row had ended before that step.
        Tokens behind a stop string are dropped. is_cached: each step computed the keys and values
        of the row's newest token. Returns how many tokens were taken.
        """
        counts = (tokens_NR >= 0).sum(0).tolist()
        may_be_nan = bool(torch.isnan(logprobs_NR).any())
        total = 0
        for sequence, num_drawn, tokens, logprobs in zip(
            drawing, counts, tokens_NR.T.tolist(), logprobs_NR.T.tolist(), strict=True
        ):
            if not num_drawn or sequence.is_finished:
                continue  # it had ended when this burst was queued
            count, reason = self._take(sequence, tokens[:num_drawn])
            taken = logprobs[:count]
            if may_be_nan and any(map(math.isnan, taken)):
                self._refuse_nan(sequence.index)
            self.logprobs[sequence.index].extend(taken)
            sequence.num_completion_tokens += count
            total += count
            if self._on_tokens is not None:
                self._on_tokens(*self.places[sequence.index], tokens[:count])
            if is_cached:
                sequence.num_cached += count
            if reason is not None:
                self._finish(sequence, reason)
        self.num_completion_tokens += total
        return total

    def _finish(self, sequence: SequenceState, reason: FinishReason) -> None:
        self.finish_reasons[sequence.index] = reason
        self.scheduler.finish(sequence)
        self._has_cut = self._has_cut or bool(self.sampling.stop)
        self.num_finished += 1
        place = self.places[sequence.index][0]
        self._num_left[place] -= 1
        if self._num_left[place] == 0:
            self._completed.append(place)

    def _take(self, sequence: SequenceState, tokens: list[int]) -> tuple[int, FinishReason | None]:
        """Appends new tokens up to the end of the completion: how many, and why it ended."""
        token_ids = self.token_ids[sequence.index]
        length = len(token_ids)
        pieces = [[token] for token in tokens] if self.sampling.stop else [tokens]
        reason = None
        for piece in pieces:
            token_ids.extend(piece)
            reason = self.stop_rule.reason(token_ids, sequence.max_completion_tokens)
            if reason is not None:
                break
        return len(token_ids) - length, reason

    def _refuse_nan(self, index: int) -> None:
        raise RunError(
            f"the model's logits are not finite after prompt {self.owners[index].id} and "
            f"{len(self.token_ids[index])} completion tokens (policy version "
            f"{self.policy_version}), so no token can be drawn. The policy has diverged or its "
            "numbers overflow: go back to an earlier checkpoint with a lower learning rate, or use "
            "bfloat16 or float32 in place of float16."
        )

    def _rollouts(self) -> list[list[Rollout]]:
        return [
            [] if self._num_left[place] else self._rollouts_of(place)
            for place in range(len(self.prompts))
        ]

    def _rollouts_of(self, place: int) -> list[Rollout]:
        first = self._first[place]
        return [
            self._rollout(self.prompts[place], sample_index, first + sample_index)
            for sample_index in range(len(self.limits[place]))
        ]

    def _rollout(self, prompt: Prompt, sample_index: int, index: int) -> Rollout:
        token_ids, reason = self.token_ids[index], self.finish_reasons[index]
        assert reason is not None, "every sequence finishes"
        return Rollout(
            prompt=prompt,
            sample_index=sample_index,
            token_ids=torch.frombuffer(token_ids, dtype=torch.int64),
            logprobs=torch.frombuffer(self.logprobs[index], dtype=torch.float32),
            loss_mask=torch.ones(len(token_ids), dtype=torch.bool),
            text=self.stop_rule.text(token_ids),
            finish_reason=reason,
            policy_version=self.policy_version,
            temperature=self.sampling.logprob_temperature,
        )


def _noise_offsets(prompts: Sequence[Prompt], limits: Sequence[Sequence[int]]) -> list[int]:
    """Where the noise of each prompt's samples starts: past those of the same prompt before it."""
    taken: dict[int, int] = {}
    offsets: list[int] = []
    for prompt, limits_G in zip(prompts, limits, strict=True):
        offsets.append(taken.get(prompt.id, 0))
        taken[prompt.id] = offsets[-1] + len(limits_G)
    return offsets
