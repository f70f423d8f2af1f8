"""Sums over the packed streams of a batch, by token and by sequence. What is summed is not known
here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparring.types import Batch


def inside(stream_T: Tensor, batch: Batch) -> Tensor:
    """The stream with 0, and no gradient, outside the loss mask."""
    return torch.where(batch.loss_mask_T, stream_T, 0.0)


def sum_by_sequence(values_T: Tensor, batch: Batch) -> Tensor:
    """[S] sums over each sequence's rows; values_T is 0 outside the loss mask.

    Sums run in float64: the order of a GPU's atomic additions then vanishes in the rounding.
    """
    sums_S = values_T.new_zeros(max(batch.num_local_sequences, 1), dtype=torch.float64)
    sums_S = sums_S.index_add(0, batch.sequence_ids_T.clamp(min=0), values_T.double())
    return sums_S.to(values_T.dtype)
