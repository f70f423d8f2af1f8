"""Rotary angles: which frequency each pair of head dimensions turns at, and the tables of a batch.

Frequency scaling is done once, on the host. What the tables are applied with is kernels/rope.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """How fast the pairs of a head's dimensions turn.

    theta: base of the geometric series. scaling: "default" none, "linear" frequencies divided by
    factor, "llama3" low frequencies divided by factor with a smooth passage (as in Llama 3.1).
    """

    theta: float = 10000.0
    scaling: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_tokens: int = 8192


def inverse_frequencies(config: RopeConfig, head_size: int) -> Tensor:
    """Angle per position of each pair of dimensions: [E / 2] float32 on the CPU."""
    exponents = torch.arange(0, head_size, 2, dtype=torch.int64).float() / head_size
    frequencies = 1.0 / (config.theta**exponents)
    if config.scaling == "linear":
        return frequencies / config.factor
    if config.scaling == "llama3":
        wavelengths = 2 * math.pi / frequencies
        longest = config.original_max_tokens / config.low_freq_factor
        shortest = config.original_max_tokens / config.high_freq_factor
        smooth = (config.original_max_tokens / wavelengths - config.low_freq_factor) / (
            config.high_freq_factor - config.low_freq_factor
        )
        between = (1 - smooth) * frequencies / config.factor + smooth * frequencies
        scaled = torch.where(wavelengths > longest, frequencies / config.factor, between)
        return torch.where(wavelengths < shortest, frequencies, scaled)
    return frequencies


def rope_tables(inverse_frequencies_E2: Tensor, positions_T: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every token's angles: two float32 tensors [T, E / 2]."""
    angles = positions_T.float().unsqueeze(1) * inverse_frequencies_E2
    return angles.cos(), angles.sin()
