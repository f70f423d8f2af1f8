"""Output head: log-probability of a label and entropy, without keeping the logits.

z = x W^T / temperature in float32; logprob = z_label - logsumexp(z); entropy = logsumexp(z) -
sum(p z). Shapes: x [M, D], weight [V, D], labels [M] -> logprobs [M], entropy [M], both float32
(float64 for float64 input). Rows go through in chunks of `chunk_rows`, so at most chunk_rows x V
logits exist at once; the chunk is a constant, never a function of free memory, so results do not
depend on the machine.

Gradient (through logprobs alone): d logprob / d z = [v = label] - p. With a frozen weight the row
gradient U = (W_label - p W) / temperature is computed in the forward pass and backward is g U: 4MDV
FLOP in all. With a trained weight the chunk is computed again in the backward pass: 8MDV FLOP.
Without gradient 2MDV. Bytes: the weight is read once per chunk and pass, U is M x D. A frozen
weight may be in 8 bits (int8.py): then pieces of it are decoded as they are needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sparring.kernels import jit, rounded, tl, uses_triton
from sparring.kernels.int8 import Int8Matrix, decoded_slices, dequantize_int8_reference
from sparring.kernels.matmul import matmul
from sparring.kernels.sampling import label_logprobs

__all__ = ["head_logits", "linear_logprob", "linear_logprob_reference", "linear_logprob_triton"]

BLOCK_V = 4096
ALIGNED = 16
"""Products of 16-bit matrices are several times slower where a size is no multiple of 8 numbers; a
vocabulary of another size goes through in two parts, and rows of logits begin at multiples of 16.
"""
NUM_WARPS = 4
"""8 take a chunk 5 % longer on an H200; rows are read twice, from memory."""


def head_logits(x_MD: Tensor, weight_VD: Tensor | Int8Matrix, *, is_fixed: bool = False) -> Tensor:
    """Logits [M, V] in float32 (float64 for float64 input): products accumulate and stay in
    float32. A weight in 8 bits is decoded piece by piece. is_fixed: a row's bits do not depend on
    the other rows (kernels/matmul.py).
    """
    if isinstance(weight_VD, Int8Matrix):
        logits = torch.empty(len(x_MD), len(weight_VD), dtype=torch.float32, device=x_MD.device)
        for rows, piece in decoded_slices(weight_VD):
            if x_MD.is_cuda and x_MD.element_size() == 2 and not is_fixed:
                torch.mm(x_MD, piece.T, out_dtype=torch.float32, out=logits[:, rows])
            else:
                logits[:, rows] = head_logits(x_MD, piece, is_fixed=is_fixed)
        return logits
    if is_fixed and x_MD.element_size() == 2:
        return matmul(x_MD, weight_VD, out_dtype=torch.float32)
    if x_MD.dtype in (torch.float32, torch.float64):
        return x_MD @ weight_VD.T
    if x_MD.device.type == "cuda":
        return torch.mm(x_MD, weight_VD.T, out_dtype=torch.float32)
    return x_MD.float() @ weight_VD.float().T


def _chunk_logprobs(x_RD: Tensor, weight_VD: Tensor, temperature: float) -> Tensor:
    logits_RV = head_logits(x_RD, weight_VD)
    if temperature != 1.0:
        logits_RV = logits_RV.mul_(1.0 / temperature)
    return torch.log_softmax(logits_RV, dim=-1)


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
            entropy_M[chunk] = torch.linalg.vecdot(probs_RV, logprobs_RV).neg_()
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
    weight_VD: Tensor | Int8Matrix,
    labels_M: Tensor,
    *,
    temperature: float = 1.0,
    chunk_rows: int = 1024,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [M] of the labels and entropies [M] (without gradient) of softmax(x W^T /
    temperature).
    """
    if isinstance(weight_VD, Int8Matrix):
        weight_VD = dequantize_int8_reference(weight_VD)
    pair: tuple[Tensor, Tensor] = _LinearLogprob.apply(  # type: ignore[no-untyped-call]
        x_MD, weight_VD, labels_M, temperature, chunk_rows
    )
    return pair


@jit
def _rows_kernel(
    z_ptr, labels_ptr, grad_ptr, logprobs_ptr, entropy_ptr, dz_ptr, stride_z, stride_dz,
    inverse_temperature,
    V: tl.constexpr, BLOCK_V: tl.constexpr, NEEDS_GRADIENT: tl.constexpr, HAS_GRAD: tl.constexpr,
):  # fmt: skip
    """One row of logits a program: maximum, sums, label; then ([v = label] - p) / temperature,
    which may begin where the row does, in numbers no larger.
    """
    row = tl.program_id(0)
    z_ptr += row.to(tl.int64) * stride_z
    label = tl.load(labels_ptr + row)
    top = -float("inf")
    total = 0.0
    weighted = 0.0
    for start in range(0, V, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        z = tl.load(z_ptr + columns, mask=columns < V, other=-float("inf")) * inverse_temperature
        above = tl.maximum(top, tl.max(z, axis=0))
        base = tl.where(above == -float("inf"), 0.0, above)
        shrink = tl.exp(top - base)
        step = tl.where(top == -float("inf"), 0.0, top - base)
        p = tl.exp(z - base)
        weighted = (weighted + total * step) * shrink
        weighted += tl.sum(p * tl.where(p > 0.0, z - base, 0.0), axis=0)
        total = total * shrink + tl.sum(p, axis=0)
        top = above
    log_total = tl.log(total)
    z_label = tl.load(z_ptr + label).to(tl.float32) * inverse_temperature
    tl.store(logprobs_ptr + row, z_label - top - log_total)
    tl.store(entropy_ptr + row, log_total - weighted / total)
    if NEEDS_GRADIENT:
        dz_ptr += row.to(tl.int64) * stride_dz
        factor = inverse_temperature
        if HAS_GRAD:
            factor *= tl.load(grad_ptr + row)
        for start in range(0, V, BLOCK_V):
            columns = start + tl.arange(0, BLOCK_V)
            z = (
                tl.load(z_ptr + columns, mask=columns < V, other=-float("inf"))
                * inverse_temperature
            )
            tl.debug_barrier()  # dz may lie where z does: what it overwrites was read by all
            p = tl.exp(z - top - log_total)
            dz = (tl.where(columns == label, 1.0, 0.0) - p) * factor
            tl.store(dz_ptr + columns, rounded(dz, dz_ptr.dtype.element_ty), mask=columns < V)


class _LinearLogprobTriton(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_MD: Tensor,
        weight_VD: Tensor,
        labels_M: Tensor,
        temperature: float,
        chunk_rows: int,
        is_fixed: bool,
    ) -> tuple[Tensor, Tensor]:
        frozen = ctx.needs_input_grad[0] and not ctx.needs_input_grad[1]
        logprobs_M = torch.empty(len(x_MD), dtype=torch.float32, device=x_MD.device)
        entropy_M = torch.empty_like(logprobs_M)
        rows_MD = torch.empty_like(x_MD, memory_format=torch.contiguous_format) if frozen else None
        for chunk, logits_RV, dz_RV in _chunks(x_MD, weight_VD, chunk_rows, frozen, is_fixed):
            fixed = None
            if is_fixed:
                fixed = label_logprobs(logits_RV, labels_M[chunk], 1.0 / temperature)
            _launch_rows(
                logits_RV,
                labels_M[chunk],
                None,
                logprobs_M[chunk],
                entropy_M[chunk],
                dz_RV,
                temperature,
            )
            if fixed is not None:
                logprobs_M[chunk] = fixed
            if rows_MD is not None:
                _row_products(dz_RV, weight_VD, rows_MD[chunk])
        ctx.temperature, ctx.chunk_rows, ctx.is_fixed = temperature, chunk_rows, is_fixed
        # A frozen head needs the row gradient alone: x may die.
        kept = None if frozen else x_MD
        weight = weight_VD if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(kept, weight, labels_M, rows_MD)
        ctx.mark_non_differentiable(entropy_M)
        return logprobs_M, entropy_M

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_MD, weight_VD, labels_M, rows_MD = ctx.saved_tensors
        grad_M = grads[0].contiguous()
        if rows_MD is not None:
            d_x = torch.mul(rows_MD, grad_M.unsqueeze(1), out=torch.empty_like(rows_MD))
            return d_x, None, None, None, None, None
        grad_x = torch.empty_like(x_MD) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros(weight_VD.shape, dtype=torch.float32, device=weight_VD.device)
        chunks = _chunks(x_MD, weight_VD, ctx.chunk_rows, True, ctx.is_fixed)
        for chunk, logits_RV, dz_RV in chunks:
            scratch = torch.empty(2, len(logits_RV), device=grad_M.device)
            _launch_rows(
                logits_RV,
                labels_M[chunk],
                grad_M[chunk],
                scratch[0],
                scratch[1],
                dz_RV,
                ctx.temperature,
            )
            if grad_x is not None:
                _row_products(dz_RV, weight_VD, grad_x[chunk])
            for part in _parts(len(weight_VD)):
                _add_product(grad_weight[part], dz_RV[:, part].T, x_MD[chunk])
        return grad_x, grad_weight.to(weight_VD.dtype), None, None, None, None


def _chunks(x_MD: Tensor, weight_VD: Tensor, chunk_rows: int, needs_gradient: bool, is_fixed: bool):
    """(rows, float32 logits of them, the place of their gradient, which is theirs) for each chunk
    of rows; one buffer serves all chunks.
    """
    size = len(weight_VD)
    shape = (min(chunk_rows, len(x_MD)), -(-size // ALIGNED) * ALIGNED)
    buffer = torch.empty(shape, dtype=torch.float32, device=x_MD.device)
    logits = buffer[:, :size]
    gradient = buffer.view(x_MD.dtype)[:, :size] if needs_gradient else None
    for start in range(0, len(x_MD), chunk_rows):
        x_RD = x_MD[start : start + chunk_rows]
        if is_fixed:
            logits[: len(x_RD)] = head_logits(x_RD, weight_VD, is_fixed=True)
        else:
            for rows, piece in _pieces(weight_VD):
                _wide_product(x_RD, piece.T, logits[: len(x_RD), rows])
        yield (
            slice(start, start + len(x_RD)),
            logits[: len(x_RD)],
            None if gradient is None else gradient[: len(x_RD)],
        )


def _parts(size: int) -> list[slice]:
    """A vocabulary in the part that products are fast for, and the tokens left over, if any."""
    whole = size // ALIGNED * ALIGNED
    return [part for part in (slice(0, whole), slice(whole, size)) if part.start < part.stop]


def _wide_product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """left @ right in float32, into out."""
    if left.is_cuda and left.dtype != torch.float32:
        torch.mm(left, right, out_dtype=torch.float32, out=out)
    else:
        torch.mm(left.float(), right.float(), out=out)


def _pieces(weight_VD: Tensor | Int8Matrix) -> Iterator[tuple[slice, Tensor]]:
    """(rows, those rows as an ordinary tensor), at most 15 rows in a piece of an odd size."""
    for rows, piece in decoded_slices(weight_VD):
        for part in _parts(len(piece)):
            yield slice(rows.start + part.start, rows.start + part.stop), piece[part]


def _launch_rows(
    logits_RV: Tensor, labels_R: Tensor, grad_R: Tensor | None, logprobs_R: Tensor,
    entropy_R: Tensor, dz_RV: Tensor | None, temperature: float,
) -> None:  # fmt: skip
    _rows_kernel[(len(logits_RV),)](
        logits_RV, labels_R, logprobs_R if grad_R is None else grad_R, logprobs_R, entropy_R,
        logits_RV if dz_RV is None else dz_RV, logits_RV.stride(0),
        0 if dz_RV is None else dz_RV.stride(0), 1.0 / temperature,
        V=logits_RV.shape[1], BLOCK_V=BLOCK_V, NEEDS_GRADIENT=dz_RV is not None,
        HAS_GRAD=grad_R is not None, num_warps=NUM_WARPS, enable_fp_fusion=True,
    )  # fmt: skip


def _row_products(dz_RV: Tensor, weight_VD: Tensor | Int8Matrix, out_RD: Tensor) -> None:
    """out = dz W; pieces of a weight in 8 bits are added up in float32."""
    if isinstance(weight_VD, Tensor):
        *large, last = reversed(_parts(len(weight_VD)))
        first = large[0] if large else last
        torch.mm(dz_RV[:, first], weight_VD[first], out=out_RD)
        if large:  # the few tokens left over came first, so that the large sum is rounded once
            out_RD.addmm_(dz_RV[:, last], weight_VD[last])
        return
    total = torch.zeros(out_RD.shape, dtype=torch.float32, device=out_RD.device)
    for rows, piece in _pieces(weight_VD):
        _add_product(total, dz_RV[:, rows], piece)
    out_RD.copy_(total)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, accumulated in float32."""
    if left.is_cuda and left.dtype != torch.float32:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.float(), right.float())


def linear_logprob_triton(
    x_MD: Tensor,
    weight_VD: Tensor | Int8Matrix,
    labels_M: Tensor,
    *,
    temperature: float = 1.0,
    chunk_rows: int = 1024,
    is_fixed: bool = False,
) -> tuple[Tensor, Tensor]:
    """`linear_logprob_reference` with library products and one Triton pass over each chunk.

    A chunk's float32 logits are all that exists, 4 V bytes a row of the chunk: their 16-bit
    gradient is written over them.
    """
    pair: tuple[Tensor, Tensor] = _LinearLogprobTriton.apply(
        x_MD, weight_VD, labels_M.contiguous(), temperature, chunk_rows, is_fixed
    )
    return pair


def linear_logprob(
    x_MD: Tensor,
    weight_VD: Tensor | Int8Matrix,
    labels_M: Tensor,
    *,
    temperature: float = 1.0,
    chunk_rows: int = 1024,
    is_fixed: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [M] of the labels and entropies [M] (without gradient) of softmax(x W^T /
    temperature). is_fixed: the log-probabilities have the bits that the sampler records on a GPU.
    """
    knobs = {"temperature": temperature, "chunk_rows": chunk_rows}
    if uses_triton(x_MD):
        return linear_logprob_triton(x_MD, weight_VD, labels_M, **knobs, is_fixed=is_fixed)
    return linear_logprob_reference(x_MD, weight_VD, labels_M, **knobs)
