"""Losses on pairs: raise what was chosen over what was rejected (DPO, arXiv 2305.18290).

`__all__` is the registry: each name is a `[loss]` name of a dpo recipe, and a function's
keyword-only parameters are its knobs. Sequences 2k and 2k + 1 of a batch are the chosen and the
rejected completion of pair k (data/packing.py). Every loss is a mean over the pairs of the WHOLE
optimizer step (num_sequences / 2), so micro-batches add up.

Symbols: r = sum over a completion's loss tokens of logprobs - ref_logprobs, h = r_chosen -
r_rejected, b = kl_coef: the weight of the KL term that the loss stands for (beta in the papers).
reference_free: ref_logprobs are taken as 0 and need not be there. sft_coef adds sft_coef times the
mean of -logprob over the chosen tokens of the step, which keeps the chosen answers likely
(weights_T is 1 on them, 0 on the rejected, and num_loss_tokens is their number).

Metrics, parts that add up: policy_loss (of the pairs alone), sft_loss and entropy (both over the
chosen tokens), and over the pairs rewards/chosen and rewards/rejected (b r), rewards/margins (b h),
rewards/accuracies (share with h > 0), logprobs/chosen and logprobs/rejected (sums over a
completion: margins that grow while logprobs/chosen falls are the usual failure).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from sparring.algorithms.streams import inside, sum_by_sequence
from sparring.types import Batch, LossOutput, TokenScores

__all__ = ["hinge", "ipo", "robust", "sigmoid"]


def sigmoid(
    scores: TokenScores,
    batch: Batch,
    *,
    kl_coef: float = 0.1,
    label_smoothing: float = 0.0,
    sft_coef: float = 0.0,
    reference_free: bool = False,
) -> LossOutput:
    """-(1 - e) ln sigma(b h) - e ln sigma(-b h), e = label_smoothing (arXiv 2305.18290).

    With e above 0 this is the conservative form: e is the share of labels believed to be wrong.
    """
    pairs = _pairs(scores, batch, reference_free)
    h = kl_coef * (pairs.chosen - pairs.rejected)
    losses = -(1.0 - label_smoothing) * logsigmoid(h) - label_smoothing * logsigmoid(-h)
    return _output(losses, pairs, scores, batch, kl_coef=kl_coef, sft_coef=sft_coef)


def robust(
    scores: TokenScores,
    batch: Batch,
    *,
    kl_coef: float = 0.1,
    label_smoothing: float = 0.1,
    sft_coef: float = 0.0,
    reference_free: bool = False,
) -> LossOutput:
    """(-(1 - e) ln sigma(b h) + e ln sigma(-b h)) / (1 - 2 e) (arXiv 2403.00409).

    Unbiased where a share e = label_smoothing of the labels is flipped at random.
    """
    pairs = _pairs(scores, batch, reference_free)
    h = kl_coef * (pairs.chosen - pairs.rejected)
    losses = -(1.0 - label_smoothing) * logsigmoid(h) + label_smoothing * logsigmoid(-h)
    losses = losses / (1.0 - 2.0 * label_smoothing)
    return _output(losses, pairs, scores, batch, kl_coef=kl_coef, sft_coef=sft_coef)


def hinge(
    scores: TokenScores,
    batch: Batch,
    *,
    kl_coef: float = 0.1,
    sft_coef: float = 0.0,
    reference_free: bool = False,
) -> LossOutput:
    """max(0, 1 - b h): a pair told apart by the margin 1 / b teaches no more (arXiv 2309.06657)."""
    pairs = _pairs(scores, batch, reference_free)
    losses = torch.relu(1.0 - kl_coef * (pairs.chosen - pairs.rejected))
    return _output(losses, pairs, scores, batch, kl_coef=kl_coef, sft_coef=sft_coef)


def ipo(
    scores: TokenScores,
    batch: Batch,
    *,
    kl_coef: float = 0.1,
    per_token: bool = True,
    sft_coef: float = 0.0,
    reference_free: bool = False,
) -> LossOutput:
    """(h - 1 / (2 b))^2: a margin to reach and not to pass (IPO, arXiv 2310.12036).

    per_token: h is the difference of the means of logprobs - ref_logprobs over each completion's
    tokens (as in TRL, so that b means the same for long and short answers); without it, of the sums
    (as in OpenRLHF). These are two different losses: with sums a longer answer has a larger h.
    """
    pairs = _pairs(scores, batch, reference_free)
    if per_token:
        h = pairs.chosen / pairs.chosen_tokens - pairs.rejected / pairs.rejected_tokens
    else:
        h = pairs.chosen - pairs.rejected
    losses = (h - 1.0 / (2.0 * kl_coef)).square()
    return _output(losses, pairs, scores, batch, kl_coef=kl_coef, sft_coef=sft_coef)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pairs:
    """Per pair: r of both completions, their logprob sums without gradient, their lengths."""

    chosen: Tensor
    rejected: Tensor
    chosen_logprobs: Tensor
    rejected_logprobs: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor


def _pairs(scores: TokenScores, batch: Batch, reference_free: bool) -> _Pairs:
    assert batch.num_local_sequences % 2 == 0, "a pair stays in one micro-batch"
    logprobs_T = inside(scores.logprobs_T, batch)
    ratio_T = logprobs_T
    if not reference_free:
        assert batch.ref_logprobs_T is not None, "a loss with a reference needs ref_logprobs_T"
        ratio_T = logprobs_T - inside(batch.ref_logprobs_T, batch)
    ratio_S = sum_by_sequence(ratio_T, batch)
    logprobs_S = sum_by_sequence(logprobs_T.detach(), batch)
    tokens_S = sum_by_sequence(batch.loss_mask_T.to(ratio_T.dtype), batch).clamp(min=1.0)
    return _Pairs(
        chosen=ratio_S[0::2],
        rejected=ratio_S[1::2],
        chosen_logprobs=logprobs_S[0::2],
        rejected_logprobs=logprobs_S[1::2],
        chosen_tokens=tokens_S[0::2],
        rejected_tokens=tokens_S[1::2],
    )


def _output(
    losses: Tensor,
    pairs: _Pairs,
    scores: TokenScores,
    batch: Batch,
    *,
    kl_coef: float,
    sft_coef: float,
) -> LossOutput:
    """Mean of the pairs' losses over the step, plus the SFT term."""
    assert batch.weights_T is not None, "pairs are packed with weights_T: 1 on what was chosen"
    num_pairs = max(batch.num_sequences / 2.0, 1.0)
    weights_T = batch.weights_T.to(scores.logprobs_T.dtype) / max(batch.num_loss_tokens, 1.0)
    policy_loss = losses.sum() / num_pairs
    sft_loss = -(inside(scores.logprobs_T, batch) * weights_T).sum()
    loss = policy_loss + sft_coef * sft_loss if sft_coef else policy_loss
    margins = pairs.chosen - pairs.rejected
    metrics = {
        "policy_loss": policy_loss,
        "sft_loss": sft_loss,
        "entropy": (inside(scores.entropy_T, batch) * weights_T).sum(),
        "rewards/chosen": kl_coef * pairs.chosen.sum() / num_pairs,
        "rewards/rejected": kl_coef * pairs.rejected.sum() / num_pairs,
        "rewards/margins": kl_coef * margins.sum() / num_pairs,
        "rewards/accuracies": (margins > 0).to(margins.dtype).sum() / num_pairs,
        "logprobs/chosen": pairs.chosen_logprobs.sum() / num_pairs,
        "logprobs/rejected": pairs.rejected_logprobs.sum() / num_pairs,
    }
    return LossOutput(loss=loss, metrics={name: value.detach() for name, value in metrics.items()})
