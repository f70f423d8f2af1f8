"""Linear layers over weight objects: what holds the numbers is separate from what is done with
them.

A weight object offers three operations, `matmul`, `matmul_transposed` and `dense`; `Dense` is the
plain one, `Quantised` holds NF4. `Linear` adds an optional bias, the names of the matrices that
were fused into it, and any adapters. No file format and no model shape is known here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparring.kernels import Capability
from sparring.models.lora import LoraAdapter, LoraConfig
from sparring.models.quantised import Quantised


class Dense(nn.Module):
    """A plain weight [O, I] (outputs, inputs) in the compute dtype."""

    def __init__(
        self,
        num_outputs: int,
        num_inputs: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_outputs, num_inputs, device=device, dtype=dtype))

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self.weight.dtype

    def matmul(self, x_TI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """x W^T + bias: [T, I] -> [T, O]; differentiable in x, the weight and the bias."""
        return F.linear(x_TI, self.weight, bias_O)

    def matmul_transposed(self, dy_TO: Tensor) -> Tensor:
        """dy W: [T, O] -> [T, I], the gradient of `matmul` by its input."""
        return dy_TO @ self.weight

    def dense(self, rows: slice = slice(None)) -> Tensor:
        """The weight's rows (all by default) as an ordinary tensor: a view, not a copy."""
        return self.weight[rows]


class Linear(nn.Module):
    """One or several matrices of equal input size, fused by rows, with bias and adapters.

    parts: name of each fused matrix -> its number of outputs, in order. is_quantised: the base is
    an empty NF4 weight. capability: the model's.
    """

    def __init__(
        self,
        num_inputs: int,
        parts: Mapping[str, int],
        *,
        bias: bool,
        device: torch.device,
        dtype: torch.dtype,
        is_quantised: bool = False,
        capability: Capability | None = None,
    ) -> None:
        super().__init__()
        self.parts: dict[str, slice] = {}
        num_outputs = 0
        for name, size in parts.items():
            self.parts[name] = slice(num_outputs, num_outputs + size)
            num_outputs += size
        self.base: Dense | Quantised = (
            Quantised(
                tuple(parts.values()),
                num_inputs,
                device=device,
                dtype=dtype,
                capability=capability,
            )
            if is_quantised
            else Dense(num_outputs, num_inputs, device=device, dtype=dtype)
        )
        self.bias = (
            nn.Parameter(torch.empty(num_outputs, device=device, dtype=dtype)) if bias else None
        )
        self.adapters = nn.ModuleDict()

    def add_adapter(
        self,
        name: str,
        config: LoraConfig,
        targets: frozenset[str],
        generator: torch.Generator,
    ) -> None:
        """Put a fresh adapter called `name` on those parts that are in `targets`, if any."""
        parts = {part: rows for part, rows in self.parts.items() if part in targets}
        if parts:
            self.adapters[name] = LoraAdapter(
                config,
                parts,
                self.base.shape[1],
                generator=generator,
                device=self.base.device,
                dtype=self.base.dtype,
            )

    def forward(self, x_TI: Tensor, adapter: str | None = None, *, is_read: bool = True) -> Tensor:
        """x W^T + bias, plus the named adapter's part where it has one: [T, I] -> [T, O].

        is_read=False: nobody reads the numbers of the result, only its gradient is wanted; a frozen
        product is then not computed.
        """
        is_read = is_read or self._is_trained()
        y_TO = self.base.matmul(x_TI, self.bias) if is_read else _unread(x_TI, self.base)
        if adapter is not None and adapter in self.adapters:
            lora = self.adapters[adapter]
            assert isinstance(lora, LoraAdapter), "adapters hold LoraAdapter only"
            y_TO = lora(y_TO, x_TI, is_read=is_read)
        return y_TO

    def _is_trained(self) -> bool:
        """Whether the base itself learns, so that its gradient is more than a product by it."""
        has_bias = self.bias is not None and self.bias.requires_grad
        return has_bias or (isinstance(self.base, Dense) and self.base.weight.requires_grad)


class _Unread(torch.autograd.Function):
    """A product's place in the graph: its backward pass without its forward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: Dense | Quantised) -> Tensor:
        ctx.base = base
        return x.new_empty(()).expand(len(x), base.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        return ctx.base.matmul_transposed(grads[0]) if ctx.needs_input_grad[0] else None, None


def _unread(x_TI: Tensor, base: Dense | Quantised) -> Tensor:
    y_TO: Tensor = _Unread.apply(x_TI, base)  # type: ignore[no-untyped-call]
    return y_TO
