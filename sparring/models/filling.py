"""From a checkpoint's tensors into a model's weights, one by one, quantised on the way.

A tensor is moved and forgotten before the next one is read; what is quantised is moved in slices,
through one scratch buffer. So beside the model there is never more than the largest part of a layer
on the device, and nothing but the files' own pages on the host. Which names there are is
checkpoint.py's affair.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from sparring.errors import CheckpointError
from sparring.kernels.nf4 import NF4Matrix, QuantizeScratch
from sparring.models import nf4_files
from sparring.models.quantised import Quantised
from sparring.models.storage import EightBitTable, Storage

_IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)
HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"

Place = tuple[Quantised, int]
"""A weight, and which of the matrices fused in it."""


@dataclass(slots=True)
class Places:
    """Where a model's tensors go, by Hugging Face name; which are still to come, what was wrong."""

    views: Mapping[str, Tensor]
    matrices: Mapping[str, Place]
    tables: Mapping[str, EightBitTable]
    storage: Storage
    left: set[str] = field(default_factory=set)
    unexpected: list[str] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)
    scratch: QuantizeScratch | None = None

    def __post_init__(self) -> None:
        self.left = {*self.views, *self.matrices, *self.tables}

    def put(self, name: str, tensor: Tensor, *, is_stored: bool) -> None:
        """A plain tensor. is_stored: the checkpoint is quantised, this one left so on purpose."""
        known = name in self.views or name in self.matrices or name in self.tables
        if name == HEAD and not known:
            if EMBED not in self.left:
                return
            name, known = EMBED, True
        if not known:
            if not name.endswith(_IGNORED_SUFFIXES):
                self.unexpected.append(name)
            return
        if name in self.matrices:
            self.put_matrix(name, tensor, is_plain=is_stored)
            return
        table = self.tables.get(name)
        wanted = self.views[name].shape if table is None else table.shape
        if self._fits(name, tensor.shape, wanted):
            if table is None:
                _copy(self.views[name], tensor, name)
            else:
                table.fill(tensor)
                _check_finite(table.table.scale, tensor.dtype, table.dtype, name)

    def put_matrix(self, name: str, matrix: NF4Matrix | Tensor, *, is_plain: bool = False) -> None:
        """A matrix of a quantised layer, packed or to be quantised; is_plain: leave it as it is."""
        if name not in self.matrices:
            self.unexpected.append(name)
            return
        weight, index = self.matrices[name]
        if not self._fits(name, matrix.shape, (weight.part_rows[index], weight.num_inputs)):
            return
        is_kept = self.storage.keeps(name.removesuffix(".weight"))
        if isinstance(matrix, NF4Matrix):
            if is_kept:
                raise CheckpointError(
                    f"keep_16bit names {name}, but this checkpoint holds it in four bits only; give"
                    " the checkpoint in 16 bits, or leave that name out"
                )
            weight.fill(index, matrix)
        elif is_plain or is_kept:
            moved = matrix.to(weight.device, weight.dtype)
            _check_finite(moved, matrix.dtype, weight.dtype, name)
            weight.fill(index, moved)
        else:
            if self.scratch is None or not self.scratch.suits(weight.device, weight.dtype):
                self.scratch = QuantizeScratch.build(weight.device, weight.dtype)
            scales = weight.quantise(index, matrix, self.scratch)
            _check_finite(scales, matrix.dtype, weight.dtype, name)

    def _fits(self, name: str, shape: Sequence[int], wanted: Sequence[int]) -> bool:
        self.left.discard(name)
        if tuple(shape) == tuple(wanted):
            return True
        self.shapes.append(f"{name} is {list(shape)}, config.json says {list(wanted)}")
        return False


def fill(
    places: Places,
    tensors: Iterable[tuple[str, Tensor]],
    folder: Path,
    device: torch.device,
    *,
    is_stored: bool,
) -> None:
    """Put every tensor where it belongs; is_stored: NF4 matrices may be among them.

    Raises CheckpointError where a tensor is missing, unexpected, of another shape or damaged.
    """
    collector = nf4_files.Collector(device)
    for name, tensor in tensors:
        if tensor.dtype == torch.uint8 or name.endswith(nf4_files.SUFFIXES):
            whole = collector.add(name, tensor)
            if whole is not None:
                places.put_matrix(*whole)
        else:
            places.put(name, tensor, is_stored=is_stored)
    problems = []
    for title, found in (
        ("missing", sorted(places.left)),
        ("unexpected", [*places.unexpected, *collector.missing()]),
        ("of another shape", places.shapes),
    ):
        if found:
            shown = ", ".join(found[:6]) + (", ..." if len(found) > 6 else "")
            problems.append(f"{len(found)} tensors {title}: {shown}")
    if problems:
        raise CheckpointError(
            f"{folder.resolve()}: the weights do not match config.json: {'; '.join(problems)}; "
            "download the checkpoint again, or give the config.json that belongs to it"
        )


def _copy(view: Tensor, tensor: Tensor, name: str) -> None:
    view.copy_(tensor)
    _check_finite(view, tensor.dtype, view.dtype, name)


def _check_finite(moved: Tensor, before: torch.dtype, now: torch.dtype, name: str) -> None:
    if now == torch.float16 != before and not bool(moved.isfinite().all()):
        raise CheckpointError(
            f"{name} holds values beyond float16's range; load it as bfloat16 or float32"
        )
