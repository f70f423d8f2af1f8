"""Decode steps, computed one at a time in plain torch: what a CPU uses, and a GPU without kernels.

A burst is one or several steps between two looks at the result. cuda_graph.py computes bursts of
captured steps with the same interface. No scheduling happens here.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from sparring.layout import KVPool
from sparring.models.transformer import Decoder
from sparring.rollout.rows import DecodeRows
from sparring.rollout.sampler import Sampling, end_id_tensor, sample_tokens
from sparring.rollout.scheduler import SequenceState


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Burst:
    """What a burst of N steps drew for R rows, on the CPU.

    tokens_NR int64: -1 from the step on before which the row had ended. logprobs_NR float32.
    """

    tokens_NR: Tensor
    logprobs_NR: Tensor


MayGoOn = Callable[[int], bool]
"""Asked before a further burst of the same rows is queued, with the tokens that every row may have
by its end beyond those known: whether none waits for a place and there is memory; it is reserved.
"""


class DecodeSteps(Protocol):
    """Computes the decode steps of one generate call."""

    @property
    def num_steps(self) -> int:
        """Most steps of a burst; the scheduler reserves memory for so many tokens a row."""

    def run(
        self,
        running: Sequence[SequenceState],
        token_ids: Sequence[Sequence[int]],
        sample_ids: Sequence[tuple[int, int]],
        may_go_on: MayGoOn,
    ) -> Generator[Burst, None, None]:
        """Bursts for the running sequences, at least one, until their number or rows must change.

        token_ids and sample_ids by a sequence's index; what a burst drew is taken note of before
        the next one is asked for.
        """


class EagerSteps:
    """One step a burst, with rows that are kept from step to step."""

    num_steps = 1

    def __init__(
        self,
        model: Decoder,
        kv_pool: KVPool,
        *,
        adapter: str | None,
        sampling: Sampling,
        stop_ids: Sequence[int],
    ) -> None:
        self._model, self._kv_pool, self._adapter = model, kv_pool, adapter
        self._sampling = sampling
        self._end_ids = end_id_tensor(stop_ids, model.config.vocab_size, model.device)
        self._rows = DecodeRows(block_size=kv_pool.block_size, device=model.device)

    def run(
        self,
        running: Sequence[SequenceState],
        token_ids: Sequence[Sequence[int]],
        sample_ids: Sequence[tuple[int, int]],
        may_go_on: MayGoOn,  # noqa: ARG002 - one step at a time: nothing is queued ahead
    ) -> Generator[Burst, None, None]:
        """One token for every running sequence."""
        rows = self._rows
        rows.follow(running, token_ids, sample_ids)
        hidden_RD = self._model(
            rows.tokens_R, rows.positions_R, rows.layout(), self._kv_pool, adapter=self._adapter
        )
        logits_RV = self._model.logits(hidden_RD)
        tokens_R, logprobs_R = sample_tokens(
            logits_RV, self._sampling, rows.sample_ids_R2, rows.draws_R, self._end_ids
        )
        rows.advance(tokens_R)
        order = rows.order_of(running)
        yield Burst(
            tokens_NR=tokens_R[None].cpu()[:, order], logprobs_NR=logprobs_R[None].cpu()[:, order]
        )
