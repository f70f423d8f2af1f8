"""The order of columns in which the NF4 product sums, and how a row is put so.

In a block of 256 columns, step s of the matrix instruction takes columns 4 s to 4 s + 3 of each of
four runs of 64 (kernels/nf4_matmul.py says why): two columns of each run, then the next two.
Whoever writes the rows that such a product reads can write them in this order, which costs a store
of four bytes at a time; the product would otherwise permute them once for every tile of its weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparring.kernels import jit, tl

BLOCK_K = 256
"""Columns that are permuted among themselves: what a turn of the product's loop takes."""


@dataclass(frozen=True, slots=True)
class Written:
    """How a norm or SwiGLU writes rows [T, D], without gradient, for the product that reads them.

    in_order: in the order of this file, D whole blocks. both: as [2, T, D], in that order and as
    they are, for an adapter reads them so. early: on sm_90 and later, in a launch that begins while
    the one before it runs, and lets the next one begin at once.
    """

    in_order: bool = False
    both: bool = False
    early: bool = False

    def of(self, rows: Tensor) -> Tensor:
        """What is written, of rows computed elsewhere."""
        if not self.in_order:
            return rows
        ordered = in_kernel_order(rows)
        return torch.stack([ordered, rows]) if self.both else ordered

    def options(self) -> dict[str, bool]:
        """A kernel's arguments for it."""
        early = {"launch_pdl": True} if self.early else {}
        return {"IN_ORDER": self.in_order, "BOTH": self.both, "EARLY": self.early, **early}


AS_THEY_ARE = Written()


def in_kernel_order(matrix: Tensor) -> Tensor:
    """Columns of [N, K] in the order in which the kernel sums, zeros up to whole blocks."""
    padded = torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % BLOCK_K))
    runs = padded.view(len(matrix), -1, 4, BLOCK_K // 16, 2, 2)
    return runs.permute(0, 1, 3, 4, 2, 5).reshape(padded.shape)


def out_of_kernel_order(matrix: Tensor) -> Tensor:
    """The inverse of `in_kernel_order` for whole blocks."""
    steps = matrix.reshape(len(matrix), -1, BLOCK_K // 16, 2, 4, 2)
    return steps.permute(0, 1, 4, 2, 3, 5).reshape(matrix.shape)


@jit
def place_of(column):
    """Where `in_kernel_order` puts a column."""
    BLOCK: tl.constexpr = 256
    step = column // 4 % 16
    half = column // 2 % 2
    run = column // 64 % 4
    return column // BLOCK * BLOCK + step * 16 + half * 8 + run * 2 + column % 2
