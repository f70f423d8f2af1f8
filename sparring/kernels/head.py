"""Output head: log-probability of a label and entropy, without keeping the logits.

z = x W^T / temperature in float32; logprob = z_label - logsumexp(z); entropy = logsumexp(z) -
sum(p z). Shapes: x [M, D], weight [V, D], labels [M] -> logprobs [M], entropy [M], both float32
(float64 for float64 input). Rows go through in chunks of `chunk_rows`, so at most chunk_rows x V
logits exist at once; the chunk is a constant, never a function of free memory, so results do not
depend on the machine.

Gradient (through logprobs alone): d logprob / d z = [v = label] - p. With a frozen weight the row
gradient U = (W_label - p W) / temperature is computed in the forward pass and backward is g U: 4MDV
FLOP in all. With a trained weight the chunk is computed again in the backward pass: 8MDV FLOP.
Without gradient 2MDV. Bytes: the weight is read once per chunk and pass, U is M x D.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["head_logits", "linear_logprob", "linear_logprob_reference"]


def head_logits(x_MD: Tensor, weight_VD: Tensor) -> Tensor:
    """Logits [M, V] in float32 (float64 for float64 input): products accumulate and stay in
    float32.
    """
    if x_MD.dtype in (torch.float32, torch.float64):
        return x_MD @ weight_VD.T
    if x_MD.device.type == "cuda":
        return torch.mm(x_MD, weight_VD.T, out_dtype=torch.float32)
    return x_MD.float() @ weight_VD.float().T


def _chunk_logprobs(x_RD: Tensor, weight_VD: Tensor, temperature: float) -> Tensor:
    logits_RV = head_logits(x_RD, weight_VD)
    if temperature != 1.0:
        logits_RV = logits_RV.div_(temperature)
    return torch.log_softmax(logits_RV, dim=-1)


def _entropy(logprobs_RV: Tensor, probs_RV: Tensor) -> Tensor:
    products = torch.einsum(
        "rv,rv->r", probs_RV, logprobs_RV.clamp_min(torch.finfo(logprobs_RV.dtype).min)
    )
    return -products


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_MD: Tensor,
        weight_VD: Tensor,
        labels_M: Tensor,
        temperature: float,
        chunk_rows: int,
    ) -> tuple[Tensor, Tensor]:
        need_x, need_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        wide = torch.float64 if x_MD.dtype == torch.float64 else torch.float32
        logprobs_M = torch.empty(len(x_MD), dtype=wide, device=x_MD.device)
        entropy_M = torch.empty_like(logprobs_M)
        rows_MD = torch.empty_like(x_MD) if need_x and not need_weight else None
        for start in range(0, len(x_MD), chunk_rows):
            chunk = slice(start, start + chunk_rows)
            logprobs_RV = _chunk_logprobs(x_MD[chunk], weight_VD, temperature)
            logprobs_M[chunk] = logprobs_RV.gather(1, labels_M[chunk, None]).squeeze(1)
            probs_RV = logprobs_RV.exp()
            entropy_M[chunk] = _entropy(logprobs_RV, probs_RV)
            if rows_MD is not None:
                rows_MD[chunk] = (
                    _row_gradient(probs_RV, labels_M[chunk], temperature).to(x_MD.dtype) @ weight_VD
                )
        ctx.temperature, ctx.chunk_rows = temperature, chunk_rows
        ctx.save_for_backward(x_MD, weight_VD, labels_M, rows_MD)
        ctx.mark_non_differentiable(entropy_M)
        return logprobs_M, entropy_M

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x_MD, weight_VD, labels_M, rows_MD = ctx.saved_tensors
        grad_M = grads[0]
        if rows_MD is not None:
            return (rows_MD * grad_M.unsqueeze(1)).to(x_MD.dtype), None, None, None, None
        grad_x = torch.empty_like(x_MD) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros(weight_VD.shape, dtype=grad_M.dtype, device=weight_VD.device)
        for start in range(0, len(x_MD), ctx.chunk_rows):
            chunk = slice(start, start + ctx.chunk_rows)
            probs_RV = _chunk_logprobs(x_MD[chunk], weight_VD, ctx.temperature).exp_()
            d_logits = _row_gradient(probs_RV, labels_M[chunk], ctx.temperature)
            d_logits = d_logits.mul_(grad_M[chunk, None])
            if grad_x is not None:
                grad_x[chunk] = d_logits.to(x_MD.dtype) @ weight_VD
            grad_weight.addmm_(d_logits.T, x_MD[chunk].to(grad_M.dtype))
        return grad_x, grad_weight.to(weight_VD.dtype), None, None, None


def _row_gradient(probs_RV: Tensor, labels_R: Tensor, temperature: float) -> Tensor:
    """([v = label] - p) / temperature, written over p."""
    d_logits = probs_RV.neg_()
    ones = torch.ones_like(labels_R, dtype=d_logits.dtype)
    d_logits.scatter_add_(1, labels_R[:, None], ones[:, None])
    return d_logits if temperature == 1.0 else d_logits.div_(temperature)


def linear_logprob_reference(
    x_MD: Tensor,
    weight_VD: Tensor,
    labels_M: Tensor,
    *,
    temperature: float = 1.0,
    chunk_rows: int = 1024,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [M] of the labels and entropies [M] (without gradient) of softmax(x W^T /
    temperature).
    """
    pair: tuple[Tensor, Tensor] = _LinearLogprob.apply(  # type: ignore[no-untyped-call]
        x_MD, weight_VD, labels_M, temperature, chunk_rows
    )
    return pair


def linear_logprob(
    x_MD: Tensor,
    weight_VD: Tensor,
    labels_M: Tensor,
    *,
    temperature: float = 1.0,
    chunk_rows: int = 1024,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [M] of the labels and entropies [M] (without gradient) of softmax(x W^T /
    temperature).
    """
    return linear_logprob_reference(
        x_MD, weight_VD, labels_M, temperature=temperature, chunk_rows=chunk_rows
    )
