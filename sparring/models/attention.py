"""Attention in plain torch, for packed training batches and for paged generation.

A plan is built once per batch from its layout (who attends to whom, as index tensors) and then
serves every layer. The model's streams stay flat; inside a plan, segments of similar length are
laid into dense scratch blocks of bounded size, because that is what matrix units are fast at.
On a GPU in 16 bits the project's own kernels serve both kinds of batch instead. There is no rotary
embedding here and no projection.
"""

from __future__ import annotations

import torch

from sparring.kernels import INTERPRETER, Capability
from sparring.layout import DecodeLayout, KVPool, Layout, PackedLayout
from sparring.models.attention_packed import PackedPlan
from sparring.models.attention_paged import PagedPlan, paged_layout
from sparring.models.attention_paged_kernel import PagedKernelPlan
from sparring.models.attention_shared import KernelPlan

AttentionPlan = PackedPlan | PagedPlan | PagedKernelPlan | KernelPlan


def plan_attention(
    layout: Layout,
    kv_pool: KVPool | None,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    head_size: int = 0,
    capability: Capability = INTERPRETER,
    bitwise: bool = False,
) -> AttentionPlan:
    """Index tensors for one batch; `kv_pool` is given with a PagedLayout and only then.

    dtype, head_size: of the queries. capability: the model's; where it allows the project's own
    kernel, and the kernel serves the queries, that is taken. bitwise: decoding, prefill and the
    training forward of the project's own kernels give the same bits.
    """
    if isinstance(layout, PackedLayout):
        assert kv_pool is None, "a packed layout keeps no keys and values"
        if head_size and KernelPlan.serves(device, dtype, head_size, capability):
            return KernelPlan(layout, device, capability, bitwise=bitwise)
        return PackedPlan(layout, device)
    assert kv_pool is not None, "a paged layout needs the pool that holds its keys and values"
    if head_size and PagedKernelPlan.serves(kv_pool, dtype, head_size, capability):
        return PagedKernelPlan.of_layout(layout, kv_pool, capability, bitwise=bitwise)
    if isinstance(layout, DecodeLayout):
        layout = paged_layout(layout)
    return PagedPlan(layout, kv_pool)
