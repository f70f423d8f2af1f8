"""Rows of a table that lies in page-locked host memory, read by the GPU over the bus.

Shapes: table [V, D] on the host, ids int64 [T] on the GPU -> [T, D] on the GPU. Page-locked memory
has one address for both, so the kernel reads just the rows that are asked for: 2 T D bytes over the
bus for 16-bit values, no copy engine, no synchronisation, and nothing that a CUDA graph would
mind. Without gradient: such a table is frozen.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparring.kernels import jit, tl, triton

BLOCK_D = 1024
NUM_WARPS = 4


def host_rows_reference(table_VD: Tensor, ids_T: Tensor) -> Tensor:
    """table[ids] by the host: [T, D] on the ids' device."""
    return F.embedding(ids_T.to(table_VD.device), table_VD.detach()).to(ids_T.device)


@jit
def _gather_kernel(table_ptr, ids_ptr, out_ptr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < D
    row = tl.load(ids_ptr + token)
    values = tl.load(table_ptr + row * D + columns, mask=inside, other=0.0)
    tl.store(out_ptr + token * D + columns, values, mask=inside)


def host_rows_triton(table_VD: Tensor, ids_T: Tensor) -> Tensor:
    """`host_rows_reference` by a kernel that reads the page-locked table itself."""
    width = table_VD.shape[1]
    out = torch.empty(len(ids_T), width, dtype=table_VD.dtype, device=ids_T.device)
    if len(ids_T):
        _gather_kernel[(len(ids_T), triton.cdiv(width, BLOCK_D))](
            table_VD.detach(), ids_T.contiguous(), out,
            D=width, BLOCK_D=BLOCK_D, num_warps=NUM_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def host_rows(table_VD: Tensor, ids_T: Tensor) -> Tensor:
    """table[ids] of a table in (for a GPU: page-locked) host memory: [T, D] on the ids' device."""
    is_card = ids_T.is_cuda and triton is not None
    return (host_rows_triton if is_card else host_rows_reference)(table_VD, ids_T)
