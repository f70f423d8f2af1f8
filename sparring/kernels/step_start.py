"""The start of a decode step in one launch: embeddings, their squares, angles of the positions.

Shapes: table [V, D], ids and positions int64 [T], frequencies float32 [E / 2] -> x [T, D], its sums
of squares (few_rows.py), cosines and sines float32 [T, E / 2] of position times frequency. Angles
are a float32 product, and their cosine and sine right to 2 units in the last place, as torch's
are. Bytes: 4 D a row of 16-bit values. No gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparring.kernels import jit, tl, triton, uses_triton
from sparring.kernels.few_rows import Squares

__all__ = ["start_step", "start_step_reference", "start_step_triton"]


def start_step_reference(
    table_VD: Tensor, ids_T: Tensor, positions_T: Tensor, frequencies_E2: Tensor
) -> tuple[Tensor, Squares, Tensor, Tensor]:
    """(x [T, D], its squares, cosines [T, E / 2], sines [T, E / 2])."""
    x_TD = F.embedding(ids_T, table_VD)
    angles = positions_T.float().unsqueeze(1) * frequencies_E2
    return x_TD, Squares(x_TD.float().square().sum(1)[None]), angles.cos(), angles.sin()


@jit
def _start_kernel(
    table_ptr, ids_ptr, positions_ptr, frequencies_ptr, x_ptr, parts_ptr, cos_ptr, sin_ptr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    inside = columns < D
    row = tl.load(ids_ptr + token)
    position = tl.load(positions_ptr + token).to(tl.float32)
    pair = tl.arange(0, BLOCK_E)
    there = pair < HALF
    angle = position * tl.load(frequencies_ptr + pair, mask=there, other=0.0)
    x = tl.load(table_ptr + row * D + columns, mask=inside, other=0.0)
    tl.store(x_ptr + token * D + columns, x, mask=inside)
    wide = x.to(tl.float32)
    tl.store(parts_ptr + token, tl.sum(wide * wide, axis=0))
    tl.store(cos_ptr + token * HALF + pair, tl.cos(angle), mask=there)
    tl.store(sin_ptr + token * HALF + pair, tl.sin(angle), mask=there)


def tile_of(width: int, half: int) -> dict[str, int]:
    """Launch table."""
    block = max(16, triton.next_power_of_2(width))
    pairs = max(16, triton.next_power_of_2(half))
    return {"BLOCK_D": block, "BLOCK_E": pairs, "num_warps": 4 if block <= 2048 else 8}


def start_step_triton(
    table_VD: Tensor, ids_T: Tensor, positions_T: Tensor, frequencies_E2: Tensor
) -> tuple[Tensor, Squares, Tensor, Tensor]:
    """`start_step_reference` in one launch."""
    device, num_rows = ids_T.device, len(ids_T)
    width, half = table_VD.shape[1], len(frequencies_E2)
    x_TD = torch.empty(num_rows, width, dtype=table_VD.dtype, device=device)
    parts = torch.empty(1, num_rows, dtype=torch.float32, device=device)
    cos = torch.empty(num_rows, half, dtype=torch.float32, device=device)
    sin = torch.empty_like(cos)
    if num_rows:
        _start_kernel[(num_rows,)](
            table_VD, ids_T.contiguous(), positions_T.contiguous(), frequencies_E2, x_TD, parts,
            cos, sin, D=width, HALF=half, enable_fp_fusion=False, **tile_of(width, half),
        )  # fmt: skip
    return x_TD, Squares(parts), cos, sin


def start_step(
    table_VD: Tensor, ids_T: Tensor, positions_T: Tensor, frequencies_E2: Tensor
) -> tuple[Tensor, Squares, Tensor, Tensor]:
    """(x [T, D], its squares, cosines [T, E / 2], sines [T, E / 2]) of tokens at positions."""
    chosen = start_step_triton if uses_triton(table_VD) else start_step_reference
    return chosen(table_VD, ids_T, positions_T, frequencies_E2)
