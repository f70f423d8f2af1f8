"""NF4 behind the interface of a weight object: four-bit storage, products on decoded values.

`Quantised` offers what `Dense` offers (matmul, matmul_transposed, dense). It is frozen: it has no
parameter and no weight gradient, and nothing decoded outlives a product, but for the copy that
`cache` makes for the time of a rollout. The format is in kernels/nf4.py, files in nf4_files.py.

Without gradient `matmul` takes one of three forms, by what the card is and how many rows there are,
so that a captured graph and an eager call agree: the fused kernel (kernels/nf4_matmul.py) up to
FUSED_ROWS rows, above that slices decoded to scratch of at most SLICE_BYTES and a library product;
and the library product alone while there is a copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparring.kernels import Capability, capability_of
from sparring.kernels.column_order import BLOCK_K
from sparring.kernels.lora import lora_expand
from sparring.kernels.low_rank import LowRank
from sparring.kernels.matmul import matmul
from sparring.kernels.nf4 import (
    BLOCK,
    NF4Matrix,
    QuantizeScratch,
    dequantize_nf4,
    fuse_nf4,
    quantize_nf4,
)
from sparring.kernels.nf4_matmul import nf4_matmul, takes


def slice_length(other: int, size: int, most_bytes: int, item: int) -> int:
    """Rows (or columns) of a slice: a multiple of STEP, and all slices alike if it goes."""
    fitting = max(STEP, most_bytes // (other * item) // STEP * STEP)
    count = -(-size // fitting)
    return min(size, -(-size // (count * STEP)) * STEP)


Part = NF4Matrix | Tensor
"""One original matrix: packed, or left in the compute dtype."""


FUSED_ROWS = {80: 64, 86: 128, 89: 256, 90: 128, 100: 64, 120: 256}
"""Rows up to which the fused kernel is taken, by architecture."""

SLICE_BYTES = 96 * 2**20
"""Most bytes of decoded weights at a time where a product decodes rows to memory; a 7B's gate_up
takes 3.07 ms so on an H200, 3.42 by 64 MiB and 3.38 by 144.
"""

COLUMN_SLICE_BYTES = 96 * 2**20
"""The same where it decodes columns, for a gradient by the input, which is added up over all rows
at once, so that it is rounded once; 2.82 ms, 2.94 and 3.47.
"""

STEP = 256
"""Rows or columns of a slice are a multiple of this, which the library's tiles divide."""


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
        self.capability = capability or capability_of(device)
        self.part_rows = tuple(part_rows)
        self.num_inputs = num_inputs
        self.device, self.dtype = device, dtype
        self._parts: list[Part | None] = [None] * len(self.part_rows)
        self._whole: NF4Matrix | None = None
        self._cached: Tensor | None = None
        self._plain: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return sum(self.part_rows), self.num_inputs

    @property
    def num_bytes(self) -> int:
        """Bytes that the weight holds."""
        if self._whole is not None:
            return self._whole.num_bytes
        if self._plain is not None:
            return self._plain.numel() * self._plain.element_size()
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
        plain = [part for part in self._parts if isinstance(part, Tensor)]
        if plain and len(plain) == len(self._parts):
            self._plain = plain[0] if len(plain) == 1 else torch.cat(plain)
            self._parts = []

    def quantise(
        self, index: int, weight: Tensor, scratch: QuantizeScratch | None = None
    ) -> Tensor:
        """Quantise one original matrix in the compute dtype on this weight's device and put it in.

        The matrix may lie on the host. One whose rows are no whole blocks of 64 stays as it is.
        scratch: for the weight's device and dtype, where many are quantised in turn.
        Returns numbers that are not finite if one of the matrix is not: its scales' mean, or all.
        """
        if self.num_inputs % BLOCK:
            moved = weight.to(self.device, self.dtype)
            self.fill(index, moved)
            return moved
        packed = quantize_nf4(weight, device=self.device, dtype=self.dtype, scratch=scratch)
        self.fill(index, packed)
        return packed.absmax if packed.offset is None else packed.offset

    def parts(self) -> list[Part]:
        """The original matrices; of a fused weight as views of it."""
        if self._plain is not None:
            return list(self._plain.split(list(self.part_rows)))
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
        if not torch.is_grad_enabled():
            return self.product(x_TI, bias_O, None)
        y_TO: Tensor = _Matmul.apply(x_TI, bias_O, self)  # type: ignore[no-untyped-call]
        return y_TO

    def product(self, x_TI: Tensor, bias_O: Tensor | None, low_rank: LowRank | None) -> Tensor:
        """x W^T + bias + an adapter's part, without gradient."""
        whole = self._whole
        if self.decoded_copy() is not None or not x_TI.is_cuda:
            y_TO = F.linear(x_TI, self.dense(), bias_O)
        elif whole is None:
            y_TO = self._part_by_part(x_TI, bias_O)
        elif takes(x_TI, whole, self.capability) and 0 < len(x_TI) <= self._fused_rows():
            return nf4_matmul(x_TI, whole, bias_O, low_rank, self.capability)
        else:
            y_TO = self._decode_and_multiply(x_TI, bias_O)
        return y_TO if low_rank is None else lora_expand(y_TO, low_rank)

    def reads_order(self, num_rows: int) -> bool:
        """Whether a product of so many rows can take them in the order of column_order.py."""
        whole = self._whole
        return (
            whole is not None
            and self.decoded_copy() is None
            and self.device.type == "cuda"
            and self.capability.tensor_dots
            and self.num_inputs % BLOCK_K == 0
            and self.dtype == whole.dtype
            and self.dtype.itemsize == 2
            and 0 < num_rows <= self._fused_rows()
        )

    def ordered_product(
        self, x_TI: Tensor, bias_O: Tensor | None, low_rank: LowRank | None = None
    ) -> Tensor:
        """`product` of x in that order, where `reads_order` allows it."""
        assert self._whole is not None, "`reads_order` says so"
        return nf4_matmul(x_TI, self._whole, bias_O, low_rank, self.capability, in_order=True)

    def scratch_bytes(self, num_rows: int) -> int:
        """Most bytes that `product` decodes at once for so many rows, where there is no copy."""
        if self._plain is not None or num_rows <= self._fused_rows():
            return 0
        num_outputs, num_inputs = self.shape
        item = self.dtype.itemsize
        return slice_length(num_inputs, num_outputs, SLICE_BYTES, item) * num_inputs * item

    def decoded_copy(self) -> Tensor | None:
        """All rows as an ordinary tensor, where there is one."""
        return self._plain if self._plain is not None else self._cached

    def _part_by_part(self, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        """`product` of a weight of which some matrices are in 16 bits: each goes its own way."""
        if len(x_TI) > self._fused_rows():
            return self._decode_and_multiply(x_TI, bias_O)
        outputs, parts = [], self.parts()
        biases = [None] * len(parts) if bias_O is None else bias_O.split(list(self.part_rows))
        for part, bias in zip(parts, biases, strict=True):
            if isinstance(part, Tensor):
                outputs.append(F.linear(x_TI, part, bias))
            elif takes(x_TI, part, self.capability) and len(x_TI):
                outputs.append(nf4_matmul(x_TI, part, bias, None, self.capability))
            else:
                outputs.append(F.linear(x_TI, self._decode(part), bias))
        return torch.cat(outputs, dim=1)

    def fixed_product(
        self, x_TI: Tensor, bias_O: Tensor | None, low_rank: LowRank | None
    ) -> Tensor:
        """`product`, a row's bits independent of the other rows (kernels/matmul.py)."""
        if self._whole is not None:
            return nf4_matmul(x_TI, self._whole, bias_O, low_rank, self.capability)
        return matmul(x_TI, self.dense(), bias_O, low_rank, self.capability)

    def _fused_rows(self) -> int:
        return FUSED_ROWS.get(self.capability.arch, 64)

    def _decode_and_multiply(self, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        """x W^T + bias through slices of decoded rows in one scratch buffer."""
        y_TO = torch.empty(len(x_TI), self.shape[0], dtype=x_TI.dtype, device=x_TI.device)
        for rows, part in self._row_slices():
            if bias_O is None:
                torch.mm(x_TI, part.T, out=y_TO[:, rows])
            else:
                torch.addmm(bias_O[rows], x_TI, part.T, out=y_TO[:, rows])
        return y_TO

    def _row_slices(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows, those rows decoded) over the weight, each overwriting the one before."""
        num_outputs, num_inputs = self.shape
        if self.decoded_copy() is not None:
            yield slice(0, num_outputs), self.dense()
            return
        step = slice_length(num_inputs, num_outputs, SLICE_BYTES, self.dtype.itemsize)
        scratch = torch.empty(step, num_inputs, dtype=self.dtype, device=self.device)
        start = 0
        for part in self._stored():
            if isinstance(part, Tensor):
                yield slice(start, start + len(part)), part
            else:
                for first in range(0, part.shape[0], step):
                    rows = slice(first, min(first + step, part.shape[0]))
                    decoded = self._decode(part, rows, out=scratch[: rows.stop - first])
                    yield slice(start + first, start + rows.stop), decoded
            start += part.shape[0]

    def _column_slices(self) -> Iterator[tuple[slice, Tensor]]:
        """The same over columns."""
        num_outputs, num_inputs = self.shape
        if self.decoded_copy() is not None or num_inputs % BLOCK:
            yield slice(0, num_inputs), self.dense()
            return
        step = slice_length(num_outputs, num_inputs, COLUMN_SLICE_BYTES, self.dtype.itemsize)
        scratch = torch.empty(num_outputs * step, dtype=self.dtype, device=self.device)
        for first in range(0, num_inputs, step):
            columns = slice(first, min(first + step, num_inputs))
            out = scratch[: num_outputs * (columns.stop - first)].view(num_outputs, -1)
            start = 0
            for part in self._stored():
                rows = slice(start, start + part.shape[0])
                if isinstance(part, Tensor):
                    out[rows] = part[:, columns]
                else:
                    self._decode(part, columns=columns, out=out[rows])
                start = rows.stop
            yield columns, out

    def _stored(self) -> list[Part]:
        """What lies in memory, in the order of rows."""
        return self.parts() if self._whole is None else [self._whole]

    def cache(self) -> None:
        """Keep the decoded weight, the same numbers in 16 bits, until `uncache`."""
        if self._cached is None and self._whole is not None:
            self._cached = self.dense()

    @property
    def cached_address(self) -> int:
        """Where the copy lies; 0 without one."""
        return 0 if self._cached is None else self._cached.data_ptr()

    def uncache(self) -> None:
        """Give the decoded weight's memory back."""
        self._cached = None

    def matmul_transposed(self, dy_TO: Tensor) -> Tensor:
        """dy W: [T, O] -> [T, I], the gradient of `matmul` by its input."""
        dx_TI = torch.empty(len(dy_TO), self.shape[1], dtype=dy_TO.dtype, device=dy_TO.device)
        for columns, part in self._column_slices():
            torch.mm(dy_TO, part, out=dx_TI[:, columns])
        return dx_TI

    def add_matmul_transposed(self, dx_TI: Tensor, dy_TO: Tensor) -> Tensor:
        """dx += dy W in place, rounded once; no gradient."""
        for columns, part in self._column_slices():
            dx_TI[:, columns].addmm_(dy_TO, part)
        return dx_TI

    def dense(self, rows: slice = slice(None)) -> Tensor:
        """The decoded rows (all by default) in the compute dtype, newly made or of the copy; of a
        weight that is not quantised at all a view.
        """
        if self._plain is not None:
            return self._plain[rows]
        if self._cached is not None:
            return self._cached[rows]
        if self._whole is not None:
            return self._decode(self._whole, rows)
        decoded = [
            self._decode(part) if isinstance(part, NF4Matrix) else part for part in self.parts()
        ]
        return torch.cat(decoded)[rows]

    def _decode(
        self,
        part: NF4Matrix,
        rows: slice = slice(None),
        columns: slice = slice(None),
        out: Tensor | None = None,
    ) -> Tensor:
        """Decoded in the dtype that the matrix was quantised from, rounded to the compute dtype."""
        is_direct = part.dtype == self.dtype
        decoded = dequantize_nf4(
            part,
            rows=rows,
            columns=columns,
            out=out if is_direct else None,
            capability=self.capability,
        )
        if is_direct:
            return decoded
        decoded = decoded.to(self.dtype)
        return decoded if out is None else out.copy_(decoded)


def cache_weights(model: nn.Module) -> None:
    """Decode every NF4 weight of a model into a 16-bit copy that its products use."""
    for module in model.modules():
        if isinstance(module, Quantised):
            module.cache()


def uncache_weights(model: nn.Module) -> None:
    """Drop the copies that `cache_weights` made."""
    for module in model.modules():
        if isinstance(module, Quantised):
            module.uncache()


def cached_addresses(model: nn.Module) -> tuple[int, ...]:
    """Where the copies lie; captured graphs that read them are valid as long as this is equal."""
    return tuple(
        module.cached_address
        for module in model.modules()
        if isinstance(module, Quantised) and module.cached_address
    )


def scratch_bytes(model: nn.Module, num_rows: int) -> int:
    """Most bytes that a product of so many rows decodes at once, without gradient or copies."""
    return max(
        (m.scratch_bytes(num_rows) for m in model.modules() if isinstance(m, Quantised)), default=0
    )


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
