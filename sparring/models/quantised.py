"""NF4 behind the interface of a weight object: four-bit storage, products on decoded values.

`Quantised` offers what `Dense` offers (matmul, matmul_transposed, dense). It is frozen: it has no
parameter and no weight gradient, and nothing decoded outlives a product. The format is in
kernels/nf4.py, files in nf4_files.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparring.kernels import Capability
from sparring.kernels.nf4 import BLOCK, NF4Matrix, dequantize_nf4, fuse_nf4, quantize_nf4

Part = NF4Matrix | Tensor
"""One original matrix: packed, or left in the compute dtype."""


class Quantised(nn.Module):
    """A frozen weight [O, I] made of matrices stacked by rows, most of them in NF4.

    part_rows: outputs of each original matrix, in order. Empty at first; `fill` puts the matrices
    in one by one. Each original matrix is quantised by itself, so numbers do not depend on fusion.
    capability: the model's.
    """

    def __init__(
        self,
        part_rows: Sequence[int],
        num_inputs: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        capability: Capability | None = None,
    ) -> None:
        super().__init__()
        self.capability = capability
        self.part_rows = tuple(part_rows)
        self.num_inputs = num_inputs
        self.device, self.dtype = device, dtype
        self._parts: list[Part | None] = [None] * len(self.part_rows)
        self._whole: NF4Matrix | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return sum(self.part_rows), self.num_inputs

    @property
    def num_bytes(self) -> int:
        """Bytes that the weight holds."""
        if self._whole is not None:
            return self._whole.num_bytes
        total = 0
        for part in self._parts:
            if isinstance(part, NF4Matrix):
                total += part.num_bytes
            elif part is not None:
                total += part.numel() * part.element_size()
        return total

    def fill(self, index: int, part: Part) -> None:
        """Put one original matrix [O_i, I] in; once all are there they are fused if they can be."""
        shape = (self.part_rows[index], self.num_inputs)
        assert tuple(part.shape) == shape, f"part {index} is {tuple(part.shape)}, not {shape}"
        self._parts[index] = part
        packed = [part for part in self._parts if isinstance(part, NF4Matrix)]
        if len(packed) == len(self._parts) and len({part.dtype for part in packed}) == 1:
            self._whole = packed[0] if len(packed) == 1 else fuse_nf4(packed)
            self._parts = []

    def quantise(self, index: int, weight: Tensor) -> None:
        """Quantise one original matrix in the compute dtype on this weight's device and put it in.

        The matrix may lie on the host. One whose rows are no whole blocks of 64 stays as it is.
        """
        if self.num_inputs % BLOCK:
            self.fill(index, weight.to(self.device, self.dtype))
        else:
            self.fill(index, quantize_nf4(weight, device=self.device, dtype=self.dtype))

    def parts(self) -> list[Part]:
        """The original matrices; of a fused weight as views of it."""
        if self._whole is None:
            assert all(part is not None for part in self._parts), "a matrix is missing"
            return [part for part in self._parts if part is not None]
        found: list[Part] = []
        whole, start = self._whole, 0
        for rows in self.part_rows:
            found.append(_slice(whole, start, rows))
            start += rows
        return found

    def matmul(self, x_TI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """x W^T + bias: [T, I] -> [T, O]; differentiable in x and the bias."""
        y_TO: Tensor = _Matmul.apply(x_TI, bias_O, self)  # type: ignore[no-untyped-call]
        return y_TO

    def matmul_transposed(self, dy_TO: Tensor) -> Tensor:
        """dy W: [T, O] -> [T, I], the gradient of `matmul` by its input."""
        return dy_TO @ self.dense()

    def add_matmul(self, y_TO: Tensor, x_TI: Tensor) -> Tensor:
        """y += x W^T in place, rounded once; no gradient."""
        return y_TO.addmm_(x_TI, self.dense().T)

    def add_matmul_transposed(self, dx_TI: Tensor, dy_TO: Tensor) -> Tensor:
        """dx += dy W in place, rounded once; no gradient."""
        return dx_TI.addmm_(dy_TO, self.dense())

    def dense(self, rows: slice = slice(None)) -> Tensor:
        """The decoded rows (all by default) in the compute dtype, newly made."""
        if self._whole is not None:
            return self._decode(self._whole, rows)
        decoded = [
            self._decode(part) if isinstance(part, NF4Matrix) else part for part in self.parts()
        ]
        return torch.cat(decoded)[rows]

    def _decode(self, part: NF4Matrix, rows: slice = slice(None)) -> Tensor:
        return dequantize_nf4(part, rows=rows, capability=self.capability).to(self.dtype)


def cache_weights(model: nn.Module) -> None:
    """Decode every NF4 weight of a model into a 16-bit copy that its products use."""
    raise NotImplementedError("products do not use copies of decoded weights yet")


def uncache_weights(model: nn.Module) -> None:
    """Drop the copies that `cache_weights` made."""
    raise NotImplementedError("products do not use copies of decoded weights yet")


def cached_addresses(model: nn.Module) -> tuple[int, ...]:
    """Where the copies lie; captured graphs that read them are valid as long as this is equal."""
    return ()


def _slice(whole: NF4Matrix, first: int, rows: int) -> NF4Matrix:
    """Rows of a fused matrix that were one matrix before: its scale groups are whole."""
    columns = whole.shape[1]
    blocks = slice(first * columns // BLOCK, (first + rows) * columns // BLOCK)
    groups = slice(-(-blocks.start // 256), -(-blocks.stop // 256))
    return NF4Matrix(
        packed=whole.packed[blocks.start * BLOCK // 2 : blocks.stop * BLOCK // 2],
        absmax=whole.absmax[blocks],
        absmax2=None if whole.absmax2 is None else whole.absmax2[groups],
        offset=None if whole.offset is None else whole.offset[groups],
        shape=(rows, columns),
        dtype=whole.dtype,
    )


class _Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: Quantised) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight.dense(), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        dy, weight = grads[0], ctx.weight
        dx = weight.matmul_transposed(dy) if ctx.needs_input_grad[0] else None
        db = dy.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return dx, db, None
