"""Losses: pure functions of what the model says (`TokenScores`) and of the batch.

`__all__` is the registry: each name is a `[loss]` name of the recipe, and a function's keyword-only
parameters are its knobs. Every loss is to be minimised and divides by counts of the WHOLE optimizer
step (`num_loss_tokens`, `num_sequences`), so the parts of all micro-batches and ranks add up to the
same loss and gradient however the step is packed. A step without loss tokens is 0 with a graph.

Symbols: l = logprobs - old_logprobs (0 with gradient where the update is on-policy), ratio = e^l,
A = advantage. Losses with `kl_coef` add kl_coef * k3 a token, k3 = e^-d - 1 + d with
d = logprobs - ref_logprobs, averaged as the loss averages. kl_unbiased: k3 is multiplied by the
ratio, whose gradient makes the term's own that of KL(policy || reference); k3's alone is not
(arXiv 2512.02556). l is not clamped, which would silence the gradient: l <= -old_logprobs, and no
sampled token is so unlikely that e^l overflows.

Metrics, parts that add up over micro-batches: policy_loss (without the KL term), entropy, kl,
ratio_mean, ratio_max (by maximum), clip_low_fraction (A < 0 and the ratio below its bound) and
clip_high_fraction (A > 0 and above). Means are over the step's loss tokens, also where a
sequence has one ratio (gspo).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparring.algorithms.streams import inside, sum_by_sequence
from sparring.types import Batch, LossOutput, TokenScores

__all__ = ["cispo", "dapo", "dr_grpo", "grpo", "gspo", "sft"]


def sft(scores: TokenScores, batch: Batch) -> LossOutput:
    """Token-weighted mean of -logprob over the step.

    weights_T weighs the tokens (None: all 1) and num_loss_tokens is the step's sum of weights.
    """
    losses_T = -inside(scores.logprobs_T, batch)
    weights_T = _token_weights(scores, batch)
    if batch.weights_T is not None:
        weights_T = weights_T * batch.weights_T
    loss = (losses_T * weights_T).sum()
    entropy = (inside(scores.entropy_T, batch) * weights_T).sum()
    return LossOutput(
        loss=loss, metrics={"policy_loss": loss.detach(), "entropy": entropy.detach()}
    )


def grpo(
    scores: TokenScores,
    batch: Batch,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_coef: float = 0.0,
    kl_unbiased: bool = False,
) -> LossOutput:
    """Clipped surrogate, mean over a sequence's tokens, then over sequences (arXiv 2402.03300)."""
    weights_T = _sequence_weights(scores, batch)
    kl = _Kl(kl_coef, kl_unbiased)
    return _clipped_surrogate(scores, batch, weights_T, kl, clip_low=clip_low, clip_high=clip_high)


def dr_grpo(
    scores: TokenScores,
    batch: Batch,
    *,
    constant: float,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_coef: float = 0.0,
    kl_unbiased: bool = False,
) -> LossOutput:
    """Clipped surrogate, sum over tokens / (sequences * constant) (Dr. GRPO, arXiv 2503.20783).

    constant: the same for every step, so that a token weighs the same in a short and a long answer;
    the loop sets it to max_completion_tokens.
    """
    weights_T = _mask(scores, batch) / (max(batch.num_sequences, 1.0) * constant)
    kl = _Kl(kl_coef, kl_unbiased)
    return _clipped_surrogate(scores, batch, weights_T, kl, clip_low=clip_low, clip_high=clip_high)


def dapo(
    scores: TokenScores,
    batch: Batch,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    kl_coef: float = 0.0,
    kl_unbiased: bool = False,
) -> LossOutput:
    """Clipped surrogate with a higher upper bound, mean over tokens (DAPO, arXiv 2503.14476)."""
    weights_T = _token_weights(scores, batch)
    kl = _Kl(kl_coef, kl_unbiased)
    return _clipped_surrogate(scores, batch, weights_T, kl, clip_low=clip_low, clip_high=clip_high)


def gspo(
    scores: TokenScores,
    batch: Batch,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    kl_coef: float = 0.0,
    kl_unbiased: bool = False,
) -> LossOutput:
    """Clipped surrogate of a sequence's e^mean(l), mean over sequences (GSPO, arXiv 2507.18071).

    The bounds are small because a mean of log-ratios is; they act only where the update is
    off-policy. The advantage must be the same for all tokens of a sequence.
    """
    mask_T = _mask(scores, batch)
    tokens_S = sum_by_sequence(mask_T, batch)
    divisor_S = tokens_S.clamp(min=1.0)
    ratio_S = (sum_by_sequence(_log_ratio(scores, batch), batch) / divisor_S).exp()
    advantages_S = sum_by_sequence(_advantages(batch), batch) / divisor_S
    terms = _clip(ratio_S, advantages_S, clip_low=clip_low, clip_high=clip_high)
    weights_S = (tokens_S > 0).to(tokens_S.dtype) / max(batch.num_sequences, 1.0)
    kl_weights_T = _sequence_weights(scores, batch)
    shares_S = tokens_S / max(batch.num_loss_tokens, 1.0)
    rows_T = batch.sequence_ids_T.clamp(min=0)
    kl = _Kl(kl_coef, kl_unbiased)
    return _output(terms, weights_S, shares_S, kl_weights_T, scores, batch, kl, ratio_S[rows_T])


def cispo(
    scores: TokenScores,
    batch: Batch,
    *,
    clip_high: float = 5.0,
    kl_coef: float = 0.0,
    kl_unbiased: bool = False,
) -> LossOutput:
    """-min(ratio, clip_high) * A * logprob, mean over all tokens (CISPO, arXiv 2506.13585).

    The weight min(ratio, clip_high) has no gradient, so no token's is dropped. clip_high is an
    absolute cap on the ratio, not a distance from 1.
    clip_high_fraction counts tokens above the cap, whatever the sign of A.
    """
    logprobs_T = inside(scores.logprobs_T, batch)
    advantages_T = _advantages(batch)
    live_ratio_T = _log_ratio(scores, batch).exp()
    ratio_T = live_ratio_T.detach()
    terms = _Terms(
        losses=-ratio_T.clamp(max=clip_high) * advantages_T * logprobs_T,
        ratio=ratio_T,
        is_low=torch.zeros_like(ratio_T, dtype=torch.bool),
        is_high=ratio_T > clip_high,
    )
    weights_T = _token_weights(scores, batch)
    kl = _Kl(kl_coef, kl_unbiased)
    return _output(terms, weights_T, weights_T, weights_T, scores, batch, kl, live_ratio_T)


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Per token e^-d - 1 + d with d = logprobs - ref_logprobs.

    Never negative; its mean over the policy's samples is KL(policy || reference).
    """
    difference = logprobs - ref_logprobs
    return torch.expm1(-difference) + difference


@dataclass(frozen=True, slots=True)
class _Kl:
    """The KL term: its weight, and whether k3 is multiplied by the ratio."""

    coef: float
    is_unbiased: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Terms:
    """Loss, ratio and clip flags, one a token [T] or one a sequence [S]."""

    losses: Tensor
    ratio: Tensor
    is_low: Tensor
    is_high: Tensor


def _clip(ratio: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float) -> _Terms:
    """-min(ratio * A, clamp(ratio) * A) (PPO, arXiv 1707.06347)."""
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    return _Terms(
        losses=-torch.minimum(ratio * advantages, clipped * advantages),
        ratio=ratio.detach(),
        is_low=(ratio < 1.0 - clip_low) & (advantages < 0),
        is_high=(ratio > 1.0 + clip_high) & (advantages > 0),
    )


def _clipped_surrogate(
    scores: TokenScores,
    batch: Batch,
    weights_T: Tensor,
    kl: _Kl,
    *,
    clip_low: float,
    clip_high: float,
) -> LossOutput:
    """The token-level surrogate of grpo, dr_grpo and dapo; they differ in weights_T alone."""
    ratio_T = _log_ratio(scores, batch).exp()
    terms = _clip(ratio_T, _advantages(batch), clip_low=clip_low, clip_high=clip_high)
    shares_T = _token_weights(scores, batch)
    return _output(terms, weights_T, shares_T, weights_T, scores, batch, kl, ratio_T)


def _output(
    terms: _Terms,
    weights: Tensor,
    shares: Tensor,
    kl_weights_T: Tensor,
    scores: TokenScores,
    batch: Batch,
    kl: _Kl,
    ratio_T: Tensor,
) -> LossOutput:
    """Loss: sum of weights * terms, plus KL. Metrics: means; `shares` are of tokens."""
    token_shares_T = _token_weights(scores, batch)
    policy_loss = loss = (terms.losses * weights).sum()
    metrics = {
        "policy_loss": policy_loss,
        "entropy": (inside(scores.entropy_T, batch) * token_shares_T).sum(),
        "ratio_mean": (terms.ratio * shares).sum(),
        "ratio_max": torch.where(shares > 0, terms.ratio, 0.0).amax(),
        "clip_low_fraction": (terms.is_low * shares).sum(),
        "clip_high_fraction": (terms.is_high * shares).sum(),
    }
    assert kl.coef == 0 or batch.ref_logprobs_T is not None, "a KL term needs ref_logprobs_T"
    if batch.ref_logprobs_T is not None:
        kl_T = k3(inside(scores.logprobs_T, batch), inside(batch.ref_logprobs_T, batch))
        metrics["kl"] = (kl_T * token_shares_T).sum()
        if kl.coef != 0:
            weighted_T = kl_T * ratio_T if kl.is_unbiased else kl_T
            loss = policy_loss + kl.coef * (weighted_T * kl_weights_T).sum()
    return LossOutput(loss=loss, metrics={name: value.detach() for name, value in metrics.items()})


def _log_ratio(scores: TokenScores, batch: Batch) -> Tensor:
    """l: exactly 0, but with the gradient of logprobs, where the update is on-policy."""
    logprobs_T = inside(scores.logprobs_T, batch)
    if batch.old_logprobs_T is None:
        return logprobs_T - logprobs_T.detach()
    return logprobs_T - inside(batch.old_logprobs_T, batch)


def _advantages(batch: Batch) -> Tensor:
    assert batch.advantages_T is not None, "a policy loss needs advantages_T"
    return inside(batch.advantages_T, batch)


def _mask(scores: TokenScores, batch: Batch) -> Tensor:
    """The loss mask as numbers of the scores' precision."""
    return batch.loss_mask_T.to(scores.logprobs_T.dtype)


def _token_weights(scores: TokenScores, batch: Batch) -> Tensor:
    """1 / (loss tokens of the step) on each loss token."""
    return _mask(scores, batch) / max(batch.num_loss_tokens, 1.0)


def _sequence_weights(scores: TokenScores, batch: Batch) -> Tensor:
    """1 / (loss tokens of its sequence * sequences of the step) on each loss token."""
    mask_T = _mask(scores, batch)
    tokens_S = sum_by_sequence(mask_T, batch).clamp(min=1.0)
    return mask_T / tokens_S[batch.sequence_ids_T.clamp(min=0)] / max(batch.num_sequences, 1.0)
