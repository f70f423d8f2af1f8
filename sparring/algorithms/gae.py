"""Advantages from a critic: what followed a token, against what was expected before it.

Generalised advantage estimation (arXiv 1506.02438), over packed tokens and without padding. With V
the critic's value before a token, rho what the token earned, and the token after a completion's
last of value 0 (also where the length limit cut it):

    e_t = rho_t + gamma V_{t+1} - V_t     A_t = e_t + gamma lam A_{t+1}     return_t = A_t + V_t

A completion's reward is earned by its last loss token. Tokens outside the loss mask (a tool's or an
environment's) are no actions: the recursion steps over them, from one loss token to the next. Sums
run in float64. `__all__` is the registry: `[advantage]` names of a ppo recipe, whose keyword-only
parameters are their knobs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sparring.types import Batch

__all__ = ["gae"]

WHITEN_EPSILON = 1e-8


def gae(
    batches: Sequence[Batch],
    rewards: Sequence[Tensor],
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    kl_coef: float = 0.0,
    whiten: bool = True,
) -> list[Batch]:
    """The batches with advantages_T and returns_T.

    batches: all micro-batches of one set of rollouts, with old_values_T. rewards: per batch [S],
    one a local sequence. kl_coef: takes kl_coef * (old_logprobs - ref_logprobs), the k1 estimate of
    KL(policy || reference), from what each token earns; both streams must be there then. whiten:
    advantages less their mean, over their standard deviation (n - 1), over the loss tokens of all
    batches together; returns are never whitened.
    """
    found = []
    for batch, rewards_S in zip(batches, rewards, strict=True):
        rows_M = batch.loss_mask_T.nonzero().squeeze(1)
        sequences_M = batch.sequence_ids_T[rows_M]
        earned_M = _earned(batch, rewards_S, rows_M, sequences_M, kl_coef)
        assert batch.old_values_T is not None, "an estimate needs the critic's values"
        values_M = batch.old_values_T[rows_M].double()
        advantages_M = estimate(earned_M, values_M, sequences_M, gamma=gamma, lam=lam)
        found.append((rows_M, advantages_M, advantages_M + values_M))
    everything = [advantages_M for _, advantages_M, _ in found]
    shift, scale = _moments(everything) if whiten else (0.0, 1.0)
    return [
        replace(
            batch,
            advantages_T=_spread(batch, rows_M, (advantages_M - shift) * scale),
            returns_T=_spread(batch, rows_M, returns_M),
        )
        for batch, (rows_M, advantages_M, returns_M) in zip(batches, found, strict=True)
    ]


def estimate(
    earned_M: Tensor, values_M: Tensor, sequences_M: Tensor, *, gamma: float, lam: float
) -> Tensor:
    """Advantages [M] of loss tokens that lie one after another, each sequence's rows together.

    The recursion is solved by doubling: after k rounds a token has summed up 2^k of its followers,
    so there are log2(longest) passes over flat tokens and no loop over them.
    """
    num_rows = len(earned_M)
    if not num_rows:
        return earned_M
    goes_on_M = torch.zeros(num_rows, dtype=torch.bool, device=earned_M.device)
    goes_on_M[:-1] = sequences_M[1:] == sequences_M[:-1]
    following_M = torch.zeros_like(values_M)
    following_M[:-1] = values_M[1:]
    advantages_M = earned_M + gamma * torch.where(goes_on_M, following_M, 0.0) - values_M
    weights_M = goes_on_M.to(advantages_M.dtype) * (gamma * lam)
    distance = 1
    while distance < num_rows and bool(weights_M.any()):
        added_M = weights_M[:-distance] * advantages_M[distance:]
        joined_M = weights_M[:-distance] * weights_M[distance:]
        advantages_M = torch.cat([advantages_M[:-distance] + added_M, advantages_M[-distance:]])
        weights_M = torch.cat([joined_M, torch.zeros_like(weights_M[-distance:])])
        distance *= 2
    return advantages_M


def _earned(
    batch: Batch, rewards_S: Tensor, rows_M: Tensor, sequences_M: Tensor, kl_coef: float
) -> Tensor:
    """rho: the completion's reward at its last loss token, less the KL of each token."""
    earned_M = torch.zeros(len(rows_M), dtype=torch.float64, device=rows_M.device)
    if kl_coef:
        assert batch.old_logprobs_T is not None, "a KL term needs old_logprobs_T"
        assert batch.ref_logprobs_T is not None, "a KL term needs ref_logprobs_T"
        difference_T = batch.old_logprobs_T.double() - batch.ref_logprobs_T.double()
        earned_M -= kl_coef * difference_T[rows_M]
    is_last_M = torch.ones(len(rows_M), dtype=torch.bool, device=rows_M.device)
    is_last_M[:-1] = sequences_M[1:] != sequences_M[:-1]
    rewards_M = rewards_S.to(rows_M.device).double()[sequences_M]
    return earned_M + torch.where(is_last_M, rewards_M, 0.0)


def _moments(parts: Sequence[Tensor]) -> tuple[float, float]:
    """What to take away and what to multiply by; a single token is left as it is."""
    everything = torch.cat(list(parts)) if parts else torch.zeros(0)
    if everything.numel() < 2:
        return 0.0, 1.0
    variance, mean = torch.var_mean(everything)
    return float(mean), float((variance + WHITEN_EPSILON).rsqrt())


def _spread(batch: Batch, rows_M: Tensor, values_M: Tensor) -> Tensor:
    stream_T = torch.zeros(len(batch.input_ids_T), device=rows_M.device)
    return stream_T.index_copy(0, rows_M, values_M.float())
