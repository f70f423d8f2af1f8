"""Which tokens may be drawn under top-k, top-p and min-p.

Tokens are ranked by s (logits / temperature), equals by index. A token stays where fewer than top_k
tokens rank before it, where the tokens before it hold less than top_p of the probability, and where
its probability is at least min_p of the likeliest token's. All three speak of the whole
distribution (of what is not held back), none of what another one left, so what stays is always a
prefix of the ranking, and the likeliest token always stays.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["CutRules", "cut_reference"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CutRules:
    """The cuts of each row R, read at run time: top_k_R int64 (0: off), top_p_R float64 (1: off)
    and min_p_R float32 (0: off).
    """

    top_k_R: Tensor
    top_p_R: Tensor
    min_p_R: Tensor


def cut_reference(scaled_RV: Tensor, rules: CutRules) -> Tensor:
    """[R, V] s with -inf for every token that may not be drawn; probabilities in float64."""
    sorted_RV, order_RV = scaled_RV.sort(dim=-1, descending=True, stable=True)
    probs_RV = torch.softmax(sorted_RV.double(), dim=-1)
    before_RV = probs_RV.cumsum(dim=-1) - probs_RV
    top_k_R1, top_p_R1, min_p_R1 = (
        of_row[:, None] for of_row in (rules.top_k_R, rules.top_p_R, rules.min_p_R)
    )
    ranks_V = torch.arange(scaled_RV.shape[1], device=scaled_RV.device)
    is_cut_RV = (top_k_R1 > 0) & (ranks_V >= top_k_R1)
    is_cut_RV |= (top_p_R1 < 1) & (before_RV >= top_p_R1)
    is_cut_RV |= sorted_RV - sorted_RV[:, :1] < min_p_R1.log()
    is_cut_RV[:, 0] = False
    is_cut_RV = torch.empty_like(is_cut_RV).scatter_(1, order_RV, is_cut_RV)
    return scaled_RV.masked_fill(is_cut_RV, -torch.inf)
