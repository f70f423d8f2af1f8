"""Do trainer and sampler agree: log-probabilities of the same tokens, compared on every step.

Both run the same weights, so what differs is rounding, or a bug. With d = trainer's logprob -
sampler's logprob over the n loss tokens, the trainer as it stands before the update:

    mismatch_kl             mean of e^d - 1 - d: estimates KL(sampler || trainer), never below 0
    mismatch_mean, _max     mean and maximum of |d|; mismatch_p99: what 99 % of |d| do not exceed
    mismatch_first          mean |d| at the first token of a completion: the prompt's part alone
    mismatch_ess            effective sample size (sum w)^2 / (n sum w^2) of the weights w = e^d
    mismatch_sequence_ess   the same over sequences, w = e^(sum of d)

Both effective sizes are 1 where the two agree; below 0.9 a token they bend the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sparring.errors import RunError
from sparring.types import Batch


@torch.no_grad()
def mismatch(logprobs: Sequence[Tensor], batches: Sequence[Batch]) -> dict[str, float]:
    """The metrics over all loss tokens of a step; empty where no batch knows of a sampler.

    logprobs: per batch the trainer's [T].
    """
    differences, sequences, offset = [], [], 0
    for logprobs_T, batch in zip(logprobs, batches, strict=True):
        if batch.sampler_logprobs_T is None:
            continue
        difference_T = logprobs_T.double() - batch.sampler_logprobs_T.double()
        differences.append(difference_T[batch.loss_mask_T])
        sequences.append(batch.sequence_ids_T[batch.loss_mask_T] + offset)
        offset += batch.num_local_sequences
    if not differences:
        return {}
    d_M, sequence_M = torch.cat(differences), torch.cat(sequences)
    if not len(d_M):
        return {}
    size_M = d_M.abs()
    is_first_M = torch.ones_like(sequence_M, dtype=torch.bool)
    is_first_M[1:] = sequence_M[1:] != sequence_M[:-1]
    sums_S = d_M.new_zeros(offset).index_add(0, sequence_M, d_M)
    counts_S = d_M.new_zeros(offset).index_add(0, sequence_M, torch.ones_like(d_M))
    values = torch.stack(
        [
            (torch.expm1(d_M) - d_M).mean(),
            size_M.mean(),
            size_M.max(),
            size_M.kthvalue(math.ceil(0.99 * len(size_M))).values,
            size_M[is_first_M].mean(),
            _effective_share(d_M),
            _effective_share(sums_S[counts_S > 0]),
        ]
    )
    names = ("kl", "mean", "max", "p99", "first", "ess", "sequence_ess")
    return {f"mismatch_{n}": v for n, v in zip(names, values.tolist(), strict=True)}


def check_mismatch(values: dict[str, float], max_mismatch_kl: float) -> None:
    """Raise RunError where mismatch_kl exceeds the limit or is not a number; 0: no limit."""
    if not max_mismatch_kl or "mismatch_kl" not in values:
        return
    if values["mismatch_kl"] <= max_mismatch_kl:
        return
    shares = ", ".join(
        f"{name.removeprefix('mismatch_')} {values[name]:.3g}"
        for name in ("mismatch_mean", "mismatch_p99", "mismatch_max", "mismatch_first")
    )
    raise RunError(
        f"trainer and sampler disagree: mismatch_kl is {values['mismatch_kl']:.3g}, more than"
        f" [train] max_mismatch_kl = {max_mismatch_kl:g} (|difference| of log-probabilities:"
        f" {shares}). Weights and optimizer are as they were before this step. Likely causes: a"
        " jump of the weights (look at loss and gradient_norm of the last steps), 16-bit or"
        " quantised arithmetic in one of the two alone, or, where 'first' is as large as 'mean', a"
        " prompt that the two read differently. Remedies: a lower learning rate from an earlier"
        " checkpoint, dtype float32 to tell rounding from a bug, or a higher max_mismatch_kl"
    )


def _effective_share(log_weights: Tensor) -> Tensor:
    """(sum w)^2 / (n sum w^2) of w = e^log_weights, without overflow."""
    log_sum = torch.logsumexp(log_weights, 0)
    return (2 * log_sum - torch.logsumexp(2 * log_weights, 0)).exp() / len(log_weights)
