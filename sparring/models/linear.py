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

from sparring.kernels import Capability, capability_of
from sparring.kernels.column_order import AS_THEY_ARE, Written
from sparring.kernels.few_rows import overlaps
from sparring.kernels.lora import lora_expand
from sparring.kernels.low_rank import LowRank
from sparring.kernels.matmul import matmul
from sparring.models.blocks import Frozen, lora_linear
from sparring.models.lora import LoraAdapter, LoraConfig
from sparring.models.quantised import Quantised

DECODE_ROWS = 512
"""Rows up to which a GPU takes the forms for decoding where nothing is trained."""


SAMPLE_SIZE = 64


def sample_of(tensor: Tensor) -> Tensor:
    """SAMPLE_SIZE numbers, evenly spaced, rounded to bfloat16, as float32 on the host: by them
    another base of the same shape is told apart.
    """
    flat = tensor.detach().flatten()
    index = torch.linspace(
        0, len(flat) - 1, SAMPLE_SIZE, dtype=torch.float64, device=flat.device
    ).long()
    return flat[index].to("cpu", torch.bfloat16).float()


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

    @property
    def table(self) -> Tensor:
        """What the output head's products read."""
        return self.weight

    def rows(self, ids_T: Tensor) -> Tensor:
        """Rows [T, I] by their numbers; differentiable in the weight."""
        return F.embedding(ids_T, self.weight)

    def sample(self) -> Tensor:
        """See `sample_of`."""
        return sample_of(self.weight)

    def matmul(self, x_TI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """x W^T + bias: [T, I] -> [T, O]; differentiable in x, the weight and the bias."""
        return F.linear(x_TI, self.weight, bias_O)

    def product(self, x_TI: Tensor, bias_O: Tensor | None, low_rank: LowRank | None) -> Tensor:
        """x W^T + bias + an adapter's part, without gradient."""
        y_TO = F.linear(x_TI, self.weight, bias_O)
        return y_TO if low_rank is None else lora_expand(y_TO, low_rank)

    def fixed_product(
        self, x_TI: Tensor, bias_O: Tensor | None, low_rank: LowRank | None
    ) -> Tensor:
        """`product`, a row's bits independent of the other rows (kernels/matmul.py)."""
        return matmul(x_TI, self.weight.detach(), bias_O, low_rank)

    def matmul_transposed(self, dy_TO: Tensor) -> Tensor:
        """dy W: [T, O] -> [T, I], the gradient of `matmul` by its input."""
        return dy_TO @ self.weight

    def add_matmul_transposed(self, dx_TI: Tensor, dy_TO: Tensor) -> Tensor:
        """dx += dy W in place, rounded once; no gradient."""
        return dx_TI.addmm_(dy_TO, self.weight.detach())

    def dense(self, rows: slice = slice(None)) -> Tensor:
        """The weight's rows (all by default) as an ordinary tensor: a view, not a copy."""
        return self.weight[rows]


class Linear(nn.Module):
    """One or several matrices of equal input size, fused by rows, with bias and adapters.

    parts: name of each fused matrix -> its number of outputs, in order. is_quantised: the base is
    an empty NF4 weight. capability: the model's. is_fixed, an attribute: a row's result has the
    same bits with any number of other rows, in decoding, prefill and training.
    """

    is_fixed: bool

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
        self.capability = capability or capability_of(device)
        self.is_fixed = False
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
                self.base.shape[0],
                generator=generator,
                device=self.base.device,
                dtype=self.base.dtype,
                capability=self.capability,
            )

    def reads(self, num_rows: int, adapter: str | None) -> Written:
        """How a norm or SwiGLU is to write so many rows for this layer: as they are, or as its NF4
        product in decoding would have them.
        """
        lora, base = self.adapter(adapter), self.base
        if (
            not isinstance(base, Quantised)
            or self.is_fixed
            or torch.is_grad_enabled()
            or not base.reads_order(num_rows)
            or (lora is not None and not lora.adds_beside(num_rows))
        ):
            return AS_THEY_ARE
        return Written(in_order=True, both=lora is not None, early=overlaps(self.capability))

    def forward(
        self, x_TI: Tensor, adapter: str | None = None, *, written: Written = AS_THEY_ARE
    ) -> Tensor:
        """x W^T + bias, plus the named adapter's part where it has one: [T, I] -> [T, O].

        written: how x is; other than as it is only where `reads` says so.
        """
        if written.in_order:
            return self._ordered(x_TI, adapter, written)
        if self.takes_blocks(x_TI):
            return lora_linear(x_TI, self.frozen(adapter))
        lora = self.adapter(adapter)
        if self.is_fixed and lora is None and isinstance(self.base, Dense):
            y: Tensor = _FixedMatmul.apply(x_TI, self.base.weight, self.bias)  # type: ignore[no-untyped-call]
            return y
        if self.is_fixed and isinstance(self.base, Quantised) and self.bias is not None:
            return lora_linear(x_TI, Frozen(self.base, None, lora, True)) + self.bias
        if lora is not None and not torch.is_grad_enabled():
            low_rank = lora.low_rank(x_TI, self.capability)
            if low_rank is not None:
                return self.base.product(x_TI, self.bias, low_rank)
        y_TO = self.base.matmul(x_TI, self.bias)
        return y_TO if lora is None else lora(y_TO, x_TI)

    def _ordered(self, x: Tensor, adapter: str | None, written: Written) -> Tensor:
        lora, base, low_rank = self.adapter(adapter), self.base, None
        assert isinstance(base, Quantised), "`reads` says so"
        if lora is not None:
            assert written.both, "an adapter reads rows as they are"
            x, plain_TI = x
            low_rank = lora.low_rank(plain_TI, self.capability)
            assert low_rank is not None, "`reads` says so"
        return base.ordered_product(x, self.bias, low_rank)

    def takes_blocks(self, x_TI: Tensor) -> bool:
        """Whether x goes through models/blocks.py: over a frozen base, other than in decoding."""
        return self.is_frozen and (self.is_fixed or not self._decodes(x_TI))

    @staticmethod
    def _decodes(x_TI: Tensor) -> bool:
        return x_TI.is_cuda and len(x_TI) <= DECODE_ROWS and not torch.is_grad_enabled()

    @property
    def is_frozen(self) -> bool:
        """Whether neither base nor bias takes a gradient."""
        is_trained = isinstance(self.base, Dense) and self.base.weight.requires_grad
        return not is_trained and (self.bias is None or not self.bias.requires_grad)

    def adapter(self, name: str | None) -> LoraAdapter | None:
        """The adapter of that name on this layer, if there is one."""
        if name is None or name not in self.adapters:
            return None
        lora = self.adapters[name]
        assert isinstance(lora, LoraAdapter), "adapters hold LoraAdapter only"
        return lora

    def frozen(self, adapter: str | None) -> Frozen:
        """The layer as the blocks take it, where its base is frozen."""
        return Frozen(self.base, self.bias, self.adapter(adapter), self.is_fixed)


class _FixedMatmul(torch.autograd.Function):
    """x W^T + bias in the fixed order; the gradients are the library's products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return matmul(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (x, weight), dy, needs = ctx.saved_tensors, grads[0], ctx.needs_input_grad
        dx = dy @ weight if needs[0] else None
        dw = dy.T @ x if needs[1] else None
        return dx, dw, dy.sum(0) if needs[2] else None


def fix_order(model: nn.Module, is_fixed: bool = True) -> None:
    """Switch every linear layer of a model to products whose bits do not depend on the batch."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.is_fixed = is_fixed
