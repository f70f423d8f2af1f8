"""Products with a packed NF4 weight: decoded in registers, multiplied, never written to memory.

The kernel, its order of sums and its adapter term are those of kernels/matmul.py; the decode rule
is that of kernels/nf4.py. `nf4_matmul(x, W)` has the bits of `matmul(x, dequantize_nf4(W))`.

Bytes: 0.516 a weight (0.5625 without double quantisation) once per 64 or 128 rows, 2 (K + N) a row.
Decoding takes about 4 integer instructions a weight, which on data-centre cards weigh more than
the bytes: from some number of rows on, decoding to memory and a library product is faster, and a
copy of the decoded weights, where there is room, always is.
"""

from __future__ import annotations

from torch import Tensor

from sparring.kernels import Capability, capability_of, triton
from sparring.kernels.matmul import LowRank, launch, matmul_reference
from sparring.kernels.nf4 import BLOCK, NF4Matrix, dequantize_nf4_reference


def nf4_matmul_reference(
    x: Tensor, weight: NF4Matrix, bias: Tensor | None = None, low_rank: LowRank | None = None
) -> Tensor:
    """The product with the decoded weight in float64, rounded once."""
    return matmul_reference(x, dequantize_nf4_reference(weight), bias, low_rank)


def nf4_matmul_triton(
    x: Tensor, weight: NF4Matrix, bias: Tensor | None = None, low_rank: LowRank | None = None
) -> Tensor:
    """`nf4_matmul_reference` in one launch, summed in float32 in a fixed order."""
    return launch(x, weight, bias, low_rank)


def takes(x: Tensor, weight: NF4Matrix, capability: Capability) -> bool:
    """Whether the kernel can multiply them: on a card with tensor cores, both of one 16-bit dtype,
    rows of whole quant blocks.
    """
    return (
        x.is_cuda
        and triton is not None
        and x.dtype == weight.dtype
        and x.element_size() == 2
        and weight.shape[1] % BLOCK == 0
        and capability.tensor_dots
    )


def nf4_matmul(
    x: Tensor,
    weight: NF4Matrix,
    bias: Tensor | None = None,
    low_rank: LowRank | None = None,
    capability: Capability | None = None,
) -> Tensor:
    """x W^T + scale xa B^T + bias: [T, K] x NF4 [N, K] -> [T, N] in x's dtype, no gradient.

    capability: the model's; left out, what the card can do.
    """
    capability = capability or capability_of(x.device)
    if takes(x, weight, capability):
        return launch(x, weight, bias, low_rank, capability)
    return nf4_matmul_reference(x, weight, bias, low_rank)
