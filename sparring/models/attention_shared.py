"""Attention over packed segments by the project's own kernel: what a GPU uses in 16 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from sparring.kernels import Capability
from sparring.kernels.attention import (
    shared_attention,
    shared_attention_backward,
    shared_attention_kept,
)
from sparring.kernels.attention_plan import SharedPlan
from sparring.layout import PackedLayout


class KernelPlan:
    """Tiles of a PackedLayout; serves every layer of one forward pass.

    bitwise: the forward pass gives the bits that decoding gives.
    """

    def __init__(
        self,
        layout: PackedLayout,
        device: torch.device,
        capability: Capability,
        *,
        bitwise: bool = False,
    ) -> None:
        self._plan = SharedPlan(
            layout.cu_seqlens,
            layout.parents,
            device=device,
            capability=capability,
            bitwise=bitwise,
        )

    @staticmethod
    def serves(
        device: torch.device, dtype: torch.dtype, head_size: int, capability: Capability
    ) -> bool:
        """Whether the kernel runs for this device, dtype and head size."""
        is_half = dtype in (torch.bfloat16, torch.float16)
        has_dots = device.type == "cuda" and capability.tensor_dots
        return is_half and head_size <= 256 and has_dots

    def attend(
        self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, _layer: int, window: int
    ) -> Tensor:
        """Attention output [T, H, E]; `window` > 0: each token sees itself and the window - 1
        tokens before.
        """
        return shared_attention(q_THE, k_TKE, v_TKE, self._plan, window=window)

    def attend_kept(
        self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, window: int
    ) -> tuple[Tensor, Tensor]:
        """Attention's output without a graph, and the log-sum-exps [H, T] of its softmax."""
        return shared_attention_kept(q_THE, k_TKE, v_TKE, self._plan, window)

    def attend_backward(
        self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, out_THE: Tensor, residue: Tensor,
        d_out: Tensor, window: int,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of q, k and v from what `attend_kept` gave; nothing is computed again."""
        return shared_attention_backward(
            q_THE, k_TKE, v_TKE, out_THE, residue, d_out, self._plan, window
        )
