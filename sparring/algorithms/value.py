"""The critic's loss: how far its values are from the returns that were found.

`clipped` is the one there is; its keyword-only parameters are keys of the recipe's [value]. The
policy's loss of PPO stands in losses.py: its clipped surrogate, a mean over tokens, is `dapo` with
equal bounds.
"""

from __future__ import annotations

import torch

from sparring.algorithms.streams import inside
from sparring.types import Batch, LossOutput, TokenScores

__all__ = ["clipped"]


def clipped(scores: TokenScores, batch: Batch, *, clip: float = 0.2) -> LossOutput:
    """Half the mean over tokens of max((V - R)^2, (V_clipped - R)^2) (PPO, arXiv 1707.06347).

    V_clipped is V within old_values +- clip, so that a critic which has moved that far since the
    rollouts learns nothing more of a token; clip = 0: plain squared errors. Metrics, parts that add
    up: mean (of V), clip_fraction (of tokens that learn nothing) and error (mean of |V - R|).
    """
    assert scores.values_T is not None, "a value loss needs the critic's values"
    assert batch.returns_T is not None, "a value loss needs returns_T"
    assert batch.old_values_T is not None, "a value loss needs old_values_T"
    values_T, returns_T = inside(scores.values_T, batch), inside(batch.returns_T, batch)
    old_values_T = inside(batch.old_values_T, batch)
    weights_T = batch.loss_mask_T.to(values_T.dtype) / max(batch.num_loss_tokens, 1.0)
    errors_T = (values_T - returns_T).square()
    is_clipped_T = torch.zeros_like(batch.loss_mask_T)
    if clip > 0:
        near_T = torch.clamp(values_T, old_values_T - clip, old_values_T + clip)
        clipped_T = (near_T - returns_T).square()
        is_clipped_T = ((values_T - old_values_T).abs() > clip) & (clipped_T >= errors_T)
        errors_T = torch.where(is_clipped_T, clipped_T, errors_T)
    metrics = {
        "mean": (values_T * weights_T).sum(),
        "error": ((values_T - returns_T).abs() * weights_T).sum(),
        "clip_fraction": (is_clipped_T * weights_T).sum(),
    }
    return LossOutput(
        loss=0.5 * (errors_T * weights_T).sum(),
        metrics={name: value.detach() for name, value in metrics.items()},
    )
