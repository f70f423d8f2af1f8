"""The running rows of a decode step as tensors on the model's device, kept from step to step.

Follows the scheduler's bookkeeping: rows that left are dropped, new ones added, new blocks written
into the block tables. No decision is taken here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sparring.kernels.upload import upload
from sparring.layout import PagedLayout
from sparring.rollout.block_pool import SPARE_BLOCK, blocks_for
from sparring.rollout.scheduler import PrefillChunk, SequenceState


class DecodeRows:
    """One row for each running sequence R; every tensor's first dimension is the row.

    tokens_R: the newest token, whose keys and values are not computed yet. positions_R: its place
    in prompt + completion. draws_R: the place in the completion of the token to draw next.
    sample_ids_R2: what keys the row's noise.
    """

    def __init__(self, *, block_size: int, device: torch.device) -> None:
        self.block_size = block_size
        self.device = device
        self.sequences: list[SequenceState] = []
        self.tokens_R = self._integers([])
        self.positions_R = self._integers([])
        self.draws_R = self._integers([])
        self.sample_ids_R2 = torch.empty((0, 2), dtype=torch.int64, device=device)
        self._tables_RN = torch.empty((0, 1), dtype=torch.int64, device=device)
        self._num_written: list[int] = []

    def _integers(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def follow(
        self,
        running: Sequence[SequenceState],
        newest_tokens: Sequence[Sequence[int]],
        sample_ids: Sequence[tuple[int, int]],
    ) -> None:
        """Makes the rows those of `running`.

        newest_tokens and sample_ids are looked up by a sequence's index.
        """
        wanted = {sequence.index for sequence in running}
        if any(sequence.index not in wanted for sequence in self.sequences):
            self._keep([i for i, s in enumerate(self.sequences) if s.index in wanted])
        if len(self.sequences) < len(running):
            present = {sequence.index for sequence in self.sequences}
            self._append([s for s in running if s.index not in present], newest_tokens, sample_ids)
        self._write_new_blocks()

    def _keep(self, rows: list[int]) -> None:
        keep = self._integers(rows)
        self.sequences = [self.sequences[i] for i in rows]
        self._num_written = [self._num_written[i] for i in rows]
        self.tokens_R = self.tokens_R[keep]
        self.positions_R = self.positions_R[keep]
        self.draws_R = self.draws_R[keep]
        self.sample_ids_R2 = self.sample_ids_R2[keep]
        self._tables_RN = self._tables_RN[keep]

    def _append(
        self,
        new: list[SequenceState],
        newest_tokens: Sequence[Sequence[int]],
        sample_ids: Sequence[tuple[int, int]],
    ) -> None:
        self.sequences += new
        self._num_written += [0] * len(new)
        tokens = self._integers([newest_tokens[s.index][-1] for s in new])
        positions = self._integers([s.num_cached for s in new])
        draws = self._integers([s.num_completion_tokens for s in new])
        ids = self._integers([word for s in new for word in sample_ids[s.index]]).view(-1, 2)
        self.tokens_R = torch.cat([self.tokens_R, tokens])
        self.positions_R = torch.cat([self.positions_R, positions])
        self.draws_R = torch.cat([self.draws_R, draws])
        self.sample_ids_R2 = torch.cat([self.sample_ids_R2, ids])
        empty = self._tables_RN.new_full((len(new), self._tables_RN.shape[1]), SPARE_BLOCK)
        self._tables_RN = torch.cat([self._tables_RN, empty])

    def _write_new_blocks(self) -> None:
        rows: list[int] = []
        columns: list[int] = []
        blocks: list[int] = []
        for row, sequence in enumerate(self.sequences):
            written, owned = self._num_written[row], len(sequence.block_table)
            if written < owned:
                rows += [row] * (owned - written)
                columns += range(written, owned)
                blocks += sequence.block_table[written:]
                self._num_written[row] = owned
        if not rows:
            return
        missing = max(columns) + 1 - self._tables_RN.shape[1]
        if missing > 0:
            grow = max(missing, self._tables_RN.shape[1])
            self._tables_RN = torch.nn.functional.pad(self._tables_RN, (0, grow), value=SPARE_BLOCK)
        where, blocks_new = self._integers([*rows, *columns]).view(2, -1), self._integers(blocks)
        self._tables_RN[where[0], where[1]] = blocks_new

    def order_of(self, running: Sequence[SequenceState]) -> list[int]:
        """The row of each given sequence."""
        places = {sequence.index: row for row, sequence in enumerate(self.sequences)}
        return [places[sequence.index] for sequence in running]

    def layout(self) -> PagedLayout:
        """The layout of a step that computes every row's newest token."""
        kv_lengths = tuple(sequence.num_cached + 1 for sequence in self.sequences)
        width = blocks_for(max(kv_lengths), self.block_size)
        tables_RN = self._tables_RN[:, :width]
        columns_R = torch.div(self.positions_R, self.block_size, rounding_mode="floor")
        blocks_R = tables_RN.gather(1, columns_R[:, None])[:, 0]
        return PagedLayout(
            cu_seqlens=tuple(range(len(kv_lengths) + 1)),
            kv_lengths=kv_lengths,
            kv_lengths_R=self.positions_R + 1,
            block_tables_RN=tables_RN,
            slots_T=blocks_R * self.block_size + self.positions_R % self.block_size,
            block_size=self.block_size,
        )

    def advance(self, tokens_R: Tensor) -> None:
        """Every row drew the given token [R]."""
        self.tokens_R = tokens_R
        self.positions_R = self.positions_R + 1
        self.draws_R = self.draws_R + 1


def prefill_layout(
    chunks: Sequence[PrefillChunk], *, block_size: int, device: torch.device
) -> tuple[PagedLayout, Tensor]:
    """The layout of a prefill step and the positions [T] of its tokens."""
    cu_seqlens = [0]
    positions: list[np.ndarray] = []
    slots: list[np.ndarray] = []
    kv_lengths: list[int] = []
    for chunk in chunks:
        table = np.asarray(chunk.sequence.block_table, dtype=np.int64)
        span = np.arange(chunk.start, chunk.start + chunk.length)
        positions.append(span)
        slots.append(table[span // block_size] * block_size + span % block_size)
        kv_lengths.append(chunk.start + chunk.length)
        cu_seqlens.append(cu_seqlens[-1] + chunk.length)
    width = blocks_for(max(kv_lengths), block_size)
    tables = [(chunk.sequence.block_table + [SPARE_BLOCK] * width)[:width] for chunk in chunks]
    layout = PagedLayout(
        cu_seqlens=tuple(cu_seqlens),
        kv_lengths=tuple(kv_lengths),
        kv_lengths_R=upload(kv_lengths, device),
        block_tables_RN=upload(tables, device),
        slots_T=upload(np.concatenate(slots), device),
        block_size=block_size,
    )
    return layout, upload(np.concatenate(positions), device)
