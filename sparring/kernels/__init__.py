"""What all kernels share: the way to Triton, the interpreter switch, rounding, what a card can do.

Triton is optional: without it (a CPU machine) the files of this room can be imported and their
references work. The environment variable TRITON_INTERPRET is read here and nowhere else; it must be
set before the first import of this package, and makes every `name_triton` run on CPU tensors.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    jit = triton.jit
    INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0").lower() in {"1", "true"})
except ModuleNotFoundError:
    triton = tl = None

    def jit(function=None, **_options):
        """Stand-in where Triton is absent: the function is kept and never called."""
        return function if function is not None else lambda kept: kept

    INTERPRETED = None


@dataclass(frozen=True, slots=True)
class Capability:
    """What kernels may use: one value, made once and passed down, never asked for inside a kernel.

    arch: compute capability as a number (80, 90, ...). tensor_dots: Triton's matrix products run on
    tensor cores and inline PTX of sm_80 and later is understood; without it products and attention
    are the library's. dtypes: what the card computes in.
    """

    arch: int
    tensor_dots: bool
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)


INTERPRETER = Capability(arch=0, tensor_dots=False)
"""The value for CPU tensors: no card, Triton's interpreter at most."""


def capability_for(arch: int) -> Capability:
    """The value for a compute capability such as 75 (a T4) or 90."""
    if arch < 80:
        return Capability(arch, tensor_dots=False, dtypes=(torch.float32, torch.float16))
    return Capability(arch, tensor_dots=True)


def capability_of(device: torch.device) -> Capability:
    """The value for a device; INTERPRETER for a CPU. Asked once, where a model is built."""
    if device.type != "cuda":
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    return capability_for(10 * major + minor)


def uses_triton(x: Tensor) -> bool:
    """Whether a public kernel takes its Triton form: for 16- and 32-bit floats on a GPU."""
    return x.is_cuda and x.dtype != torch.float64 and triton is not None


def cdiv(total: int, size: int) -> int:
    """How many pieces of that size hold the total; Triton's own takes a host 2 us."""
    return -(-total // size)


def power_of_two(least: int) -> int:
    """The smallest power of two that is at least this, from 1 on."""
    return 1 << (least - 1).bit_length()


@jit
def rounded(x, dtype: tl.constexpr):
    """float32 -> dtype, to nearest even; the interpreter truncates to bfloat16 unless told so."""
    if INTERPRETED:
        if dtype == tl.bfloat16:
            bits = x.to(tl.uint32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
        else:  # noqa: RET505 - Triton wants one type a branch
            return x.to(dtype)
    else:
        return x.to(dtype)


@jit
def dot(a, b, acc):
    """acc + a b in float32; the interpreter, which cannot multiply bfloat16, widens first."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:  # noqa: RET505
        return tl.dot(a, b, acc, input_precision="ieee")
