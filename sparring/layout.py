"""Who is in the batch: handed to the model as an argument, never kept as state.

`PackedLayout` describes training and scoring: segments laid end to end, each attending to itself
and, where it has a parent, to the whole of that parent (a prompt computed once for its group).
`PagedLayout` describes generation: the new tokens of each row and the blocks that hold its keys and
values. No model code and no sampling lives here.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedLayout:
    """Segments of a packed batch, in order, as plain integers.

    cu_seqlens: S + 1 ascending offsets into T; segment s is the tokens cu_seqlens[s] to
    cu_seqlens[s + 1], never empty. parents: per segment the index of an earlier segment without a
    parent that it attends to in whole, or -1. Within a segment attention is causal. A child's
    positions go on where its parent ends; positions themselves are the batch's positions_T.
    """

    cu_seqlens: tuple[int, ...]
    parents: tuple[int, ...]

    @property
    def num_segments(self) -> int:
        """Number of segments S."""
        return len(self.parents)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PagedLayout:
    """Rows of a generation step: new tokens now, earlier keys and values in blocks.

    cu_seqlens: R + 1 offsets into the T new tokens, row by row (decode: one token a row).
    kv_lengths_R [R] int64: tokens of the row whose keys and values are in the pool AFTER this
    step's are written. block_tables_RN [R, N] int64: the row's blocks in order, unused entries 0.
    slots_T [T] int64: where each new token's key and value go (block * block_size + offset).
    kv_lengths: the same as kv_lengths_R as plain integers.
    shared_prefix: per row the number of leading blocks it shares with the row before (0: none); a
    hint that attention may use to read them once, never needed for the result.
    """

    cu_seqlens: tuple[int, ...]
    kv_lengths: tuple[int, ...]
    kv_lengths_R: Tensor
    block_tables_RN: Tensor
    slots_T: Tensor
    block_size: int
    shared_prefix: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DecodeLayout:
    """Rows of one new token each, told by device tensors alone: a captured step is replayed on it.

    kv_lengths_R [R] int32: tokens whose keys and values are in the pool after this step's are
    written; 0: the row is empty, nothing is attended to and its output is 0. block_tables_RN [R, N]
    int32. slots_R [R] int64: where each row's key and value go; an empty row's into block 0.
    max_kv_length: no row is longer; grids are made for it.
    """

    kv_lengths_R: Tensor
    block_tables_RN: Tensor
    slots_R: Tensor
    block_size: int
    max_kv_length: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class KVPool:
    """Keys and values of all layers in one tensor.

    data [L, N, 2, K, B, E]: layer, block, key or value, key/value head, slot in block, head size;
    one head's keys of one block are contiguous. address: int64 [1] on the pool's device that holds
    data.data_ptr(), None where no kernel reads the pool. Kernels find the pool through it, so a
    captured CUDA graph stays valid when the pool is freed and allocated elsewhere, provided this
    same tensor is rewritten in place. scales [L, N, 2, K, B] float32: where data holds 8-bit
    numbers (int8 or float8_e4m3fn), what each token's key or value of a head is multiplied by;
    address is then [2], the second number being scales.data_ptr().
    """

    data: Tensor
    address: Tensor | None = None
    scales: Tensor | None = None

    @property
    def num_blocks(self) -> int:
        """Number of blocks N."""
        return int(self.data.shape[1])

    @property
    def block_size(self) -> int:
        """Tokens a block holds."""
        return int(self.data.shape[4])


Layout = PackedLayout | PagedLayout | DecodeLayout
