"""Attention over blocks by the project's own kernels: what a GPU uses in 16 bits.

A plan serves every layer of a step. It is made from a PagedLayout, or, for a captured decode step,
from tensors that stay in place while their contents change from step to step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparring.kernels import Capability, few_rows_attention
from sparring.kernels.column_order import AS_THEY_ARE, Written
from sparring.kernels.paged_attention import paged_decode_triton, rotate_decode_triton
from sparring.kernels.paged_plan import DecodeWorkspace, PrefillTiles, sharing_pays, split_of
from sparring.kernels.paged_prefill import paged_prefill_triton
from sparring.kernels.rotate_write import num_heads_of, rotate_write_triton, write_slots
from sparring.kernels.shared_decode import chunk_of, shared_splits
from sparring.kernels.split_attention import split_attention_paged
from sparring.layout import DecodeLayout, KVPool, PagedLayout


class PagedKernelPlan:
    """One step over a KVPool: every row one new token (decode), or tiles of new tokens (prefill).

    tables_RN [R, N] and lengths_R [R] int32, slots_T [T] int64 on the pool's device; max_splits: of
    the longest row that may come (`max_splits_for`). workspace: where splits meet; None: made at
    the first use. tiles: of a prefill step, None when every row has one new token. bitwise: prefill
    gives the bits that decoding gives. shares_prompts: decoding computes a prompt's splits once for
    neighbouring rows of its group, where no window is (None: where that pays); no bit changes.
    """

    def __init__(
        self,
        kv_pool: KVPool,
        *,
        tables_RN: Tensor,
        lengths_R: Tensor,
        slots_T: Tensor,
        max_splits: int,
        capability: Capability,
        workspace: DecodeWorkspace | None = None,
        tiles: PrefillTiles | None = None,
        bitwise: bool = False,
        shares_prompts: bool | None = False,
    ) -> None:
        assert not torch.is_grad_enabled(), "attention over blocks has no gradient"
        assert kv_pool.address is not None, "kernels find the pool through its address"
        self.pool = kv_pool
        self.tables_RN, self.lengths_R, self.slots_T = tables_RN, lengths_R, slots_T
        self.max_splits, self.workspace, self.tiles = max_splits, workspace, tiles
        self.capability, self.bitwise = capability, bitwise
        self._shares_prompts = False if tiles is not None else shares_prompts
        self._shared_R: Tensor | None = None

    @classmethod
    def of_layout(
        cls,
        layout: PagedLayout | DecodeLayout,
        kv_pool: KVPool,
        capability: Capability,
        *,
        workspace: DecodeWorkspace | None = None,
        bitwise: bool = False,
    ) -> PagedKernelPlan:
        """The plan of one step; of a DecodeLayout it may be captured."""
        size = int(kv_pool.data.shape[5])
        if isinstance(layout, DecodeLayout):
            return cls(
                kv_pool,
                tables_RN=layout.block_tables_RN,
                lengths_R=layout.kv_lengths_R,
                slots_T=layout.slots_R,
                max_splits=max_splits_for(capability, size, layout.max_kv_length),
                capability=capability,
                workspace=workspace,
                bitwise=bitwise,
                shares_prompts=None,
            )
        is_decode = layout.cu_seqlens == tuple(range(len(layout.kv_lengths) + 1))
        tiles = PrefillTiles(layout.cu_seqlens, layout.kv_lengths, layout.slots_T.device)
        return cls(
            kv_pool,
            tables_RN=layout.block_tables_RN.to(torch.int32).contiguous(),
            lengths_R=layout.kv_lengths_R.to(torch.int32),
            slots_T=layout.slots_T,
            max_splits=max_splits_for(capability, size, max(layout.kv_lengths)),
            capability=capability,
            tiles=None if is_decode else tiles,
            bitwise=bitwise,
        )

    @staticmethod
    def serves(kv_pool: KVPool, dtype: torch.dtype, head_size: int, capability: Capability) -> bool:
        """Whether the kernels run for this pool and queries of this dtype and head size."""
        is_half = dtype in (torch.bfloat16, torch.float16)
        known = kv_pool.data.dtype == dtype or kv_pool.scales is not None
        fits = head_size <= 256 and kv_pool.address is not None
        return is_half and known and fits and kv_pool.data.is_cuda and capability.tensor_dots

    def attend(
        self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, layer: int, window: int
    ) -> Tensor:
        """Write k and v to their slots, then attend: [T, H, E]; `window` > 0 as in PackedPlan."""
        write_slots(torch.stack((k_TKE, v_TKE), 1), self.slots_T, self.pool, layer)
        return self._attend_written(q_THE, layer, window)

    def attend_rotated(
        self,
        qkv_TC: Tensor,
        cos: Tensor,
        sin: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
        layer: int,
        window: int,
        *,
        chained: bool = False,
        overlaps: bool = False,
        written: Written = AS_THEY_ARE,
    ) -> Tensor:
        """Norm and rotate the projection qkv [T, (H + 2K) E], write and attend: [T, H, E].

        A decode step is one launch. chained: it is one of models/few_rows.py, whose order of sums
        is its own. overlaps: of a decode step only, see kernels/chain.py. written: how rows of
        H E values are written, [2, T, H, E] with both.
        """
        block_size, size = self.pool.data.shape[4:]
        max_keys = self.max_splits * split_of(self.capability, size)["SPLIT"]
        if chained and few_rows_attention.serves(
            qkv_TC,
            self.pool,
            self.capability.arch,
            # what a table holds, not what this step needs: rows' bits keep to one kernel
            self.tables_RN.shape[1] * block_size,
            has_norm=q_norm is not None,
            window=window,
        ):
            assert written == AS_THEY_ARE, "a chain's products read rows as they are"
            return few_rows_attention.attend(
                qkv_TC,
                cos,
                sin,
                self.slots_T,
                self.pool,
                layer,
                self.tables_RN,
                self.lengths_R,
                max_keys=min(max_keys, self.tables_RN.shape[1] * block_size),
                overlaps=overlaps,
            )
        if self.tiles is None:
            num_heads = num_heads_of(qkv_TC, self.pool)
            return rotate_decode_triton(
                qkv_TC,
                cos,
                sin,
                q_norm,
                k_norm,
                eps,
                self.slots_T,
                self.pool,
                layer,
                self.tables_RN,
                self.lengths_R,
                max_splits=self.max_splits,
                capability=self.capability,
                window=window,
                workspace=self._decode_workspace(num_heads),
                shared_R=self._shared_splits(num_heads, window),
                overlaps=overlaps,
                written=written,
            )
        q_THE = rotate_write_triton(
            qkv_TC, cos, sin, q_norm, k_norm, eps, self.slots_T, self.pool, layer
        )
        out_THE = self._attend_written(q_THE, layer, window)
        rows: Tensor = written.of(out_THE.flatten(1))
        return rows.view(*rows.shape[:-1], *out_THE.shape[1:])

    def _attend_written(self, q_THE: Tensor, layer: int, window: int) -> Tensor:
        if self.tiles is not None:
            prefill = split_attention_paged if self.bitwise else paged_prefill_triton
            return prefill(
                q_THE,
                self.pool,
                layer,
                self.tables_RN,
                self.tiles,
                capability=self.capability,
                window=window,
            )
        return paged_decode_triton(
            q_THE,
            self.pool,
            layer,
            self.tables_RN,
            self.lengths_R,
            max_splits=self.max_splits,
            capability=self.capability,
            window=window,
            workspace=self._decode_workspace(q_THE.shape[1]),
            shared_R=self._shared_splits(q_THE.shape[1], window),
        )

    def _shared_splits(self, num_heads: int, window: int) -> Tensor | None:
        """Counted at the first use, for every layer; None where rows share nothing."""
        num_kv_heads, block_size, size = self.pool.data.shape[3:]
        group = num_heads // num_kv_heads
        chunk, split = chunk_of(group), split_of(self.capability, size)["SPLIT"]
        shares = self._shares_prompts
        if shares is None:
            shares = sharing_pays(self.capability, len(self.lengths_R) * num_kv_heads, group)
        is_possible = chunk > 1 and self.max_splits > 1 and split % block_size == 0
        if not shares or window or not is_possible:
            return None
        if self._shared_R is None:
            self._shared_R = shared_splits(
                self.tables_RN,
                self.lengths_R,
                chunk=chunk,
                block_size=block_size,
                split=split,
                max_splits=self.max_splits,
            )
        return self._shared_R

    def _decode_workspace(self, num_heads: int) -> DecodeWorkspace:
        if self.workspace is None:
            num_kv_heads, _, size = self.pool.data.shape[3:]
            self.workspace = DecodeWorkspace.new(
                len(self.lengths_R),
                num_heads,
                num_kv_heads,
                size,
                self.max_splits,
                self.lengths_R.device,
            )
        return self.workspace


def max_splits_for(capability: Capability, head_size: int, max_tokens: int) -> int:
    """Splits of a row of `max_tokens` keys: the third size of a decode workspace."""
    return max(1, -(-max_tokens // split_of(capability, head_size)["SPLIT"]))
