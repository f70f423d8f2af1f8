"""Low-rank adapters, applied unmerged: y += scale (x A^T) B^T (LoRA, arXiv 2106.09685).

The parameters are kept in float32; where the model computes in 16 bits, one shadow copy of each in
the compute dtype is what forward and decode read, rewritten in place after each optimizer step.
Gradients accumulate on the float32 parameters. No file format is known here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparring.errors import CheckpointError
from sparring.kernels import Capability, capability_of
from sparring.kernels.lora import lora_shrink, lora_shrink_beside
from sparring.kernels.lora_rows import (
    Parts,
    add_rows,
    outer_rows,
    shrink_rows,
    takes_rows,
    wide_product,
)
from sparring.kernels.low_rank import LowRank
from sparring.kernels.nf4_hopper import takes_adapter

PROJECTIONS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)
"""The matrices of a layer that an adapter can sit on; "all-linear" means all of them."""

MAX_LOW_RANK_ROWS = 512
"""More rows are for library products: the small ones are then no matter of launches."""

_EMBEDDINGS = ("embed_tokens", "lm_head", "embedding", "embeddings", "wte")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """Shape of an adapter.

    scale is alpha / rank, or alpha / sqrt(rank) with rslora (arXiv 2312.03732). target_modules:
    "all-linear" or names out of PROJECTIONS. seed: of the generator that draws A (B starts at zero,
    so a fresh adapter changes nothing).
    """

    rank: int = 16
    alpha: float = 16.0
    rslora: bool = False
    target_modules: str | tuple[str, ...] = "all-linear"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise CheckpointError(f"LoRA rank is {self.rank}; it must be at least 1")
        self.targets()

    @property
    def scale(self) -> float:
        """What the product of the two matrices is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def targets(self) -> frozenset[str]:
        """Names of the adapted matrices; raises CheckpointError on names that cannot be adapted."""
        if isinstance(self.target_modules, str):
            if self.target_modules == "all-linear":
                return frozenset(PROJECTIONS)
            names: tuple[str, ...] = (self.target_modules,)
        else:
            names = tuple(self.target_modules)
        known = ", ".join(PROJECTIONS)
        if not names:
            raise CheckpointError(
                f'target_modules is empty; give "all-linear" or names out of {known}'
            )
        for name in names:
            if name in _EMBEDDINGS:
                raise CheckpointError(
                    f"target_modules names {name!r}: embeddings and the output head carry no "
                    "adapter here, "
                    "because with tied embeddings one matrix would have to change in two places, "
                    f"and the sampler reads it as it stands; take names out of {known}"
                )
            if name not in PROJECTIONS:
                raise CheckpointError(
                    f'target_modules names {name!r}, which is unknown; known: "all-linear", {known}'
                )
        return frozenset(names)


@dataclass(frozen=True, slots=True)
class _Part:
    """Where one adapted matrix lies: rows of the output, of B, and columns of x A^T."""

    output_rows: slice
    b_rows: slice
    ranks: slice


class LoraAdapter(nn.Module):
    """The adapter of one (fused) linear layer.

    parts: rows of the layer's output that each adapted part takes, ascending. a [P r, I] stacks the
    A matrices of the P adapted parts, b [sum of their outputs, r] the B matrices. capability: the
    model's.
    """

    a_shadow: Tensor | None
    b_shadow: Tensor | None
    part_table: Tensor

    def __init__(
        self,
        config: LoraConfig,
        parts: Mapping[str, slice],
        num_inputs: int,
        num_layer_outputs: int,
        *,
        generator: torch.Generator,
        device: torch.device,
        dtype: torch.dtype,
        capability: Capability | None = None,
    ) -> None:
        super().__init__()
        self.capability = capability or capability_of(device)
        self.scale = config.scale
        self.rank = config.rank
        self.parts: dict[str, _Part] = {}
        self.num_outputs = num_layer_outputs
        num_outputs = 0
        for index, (name, rows) in enumerate(parts.items()):
            size = rows.stop - rows.start
            ranks = slice(index * config.rank, (index + 1) * config.rank)
            self.parts[name] = _Part(rows, slice(num_outputs, num_outputs + size), ranks)
            num_outputs += size
        master = torch.float64 if dtype == torch.float64 else torch.float32
        bound = 1.0 / math.sqrt(num_inputs)
        a = torch.empty(len(parts) * config.rank, num_inputs, dtype=master)
        a.uniform_(-bound, bound, generator=generator)
        self.a = nn.Parameter(a.to(device))
        self.b = nn.Parameter(torch.zeros(num_outputs, config.rank, dtype=master, device=device))
        needs_shadow = dtype != master
        self.register_buffer(
            "a_shadow",
            self.a.detach().to(dtype) if needs_shadow else None,
            persistent=False,
        )
        self.register_buffer(
            "b_shadow",
            self.b.detach().to(dtype) if needs_shadow else None,
            persistent=False,
        )

        self._spans = tuple(
            (p.output_rows.start, p.output_rows.stop, p.b_rows.start, p.ranks.start)
            for p in self.parts.values()
        )
        self._sizes = self.a.shape[0], self.b.shape[0]
        self._granule = math.gcd(*(row for part in self._spans for row in part[:2]))
        self.register_buffer(
            "part_table", torch.tensor(self._spans, dtype=torch.int32).to(device), persistent=False
        )

    def matrices_used(self) -> tuple[Tensor, Tensor]:
        """A and B as products read them: the shadows where there are any."""
        if self.a_shadow is not None and self.b_shadow is not None:
            return self.a_shadow, self.b_shadow
        return self.a.detach(), self.b.detach()

    def adds_in_swiglu(self, x_TI: Tensor) -> bool:
        """Whether a kernel of SwiGLU can add to gate and up: both are adapted, and kernels run."""
        covers_all = len(self.b) == self.num_outputs
        return covers_all and takes_rows(x_TI, self.rank, self.capability)

    def _where(self) -> Parts:
        return Parts(self._spans, self.part_table, self._granule, *self._sizes)

    def shrink(self, x_TI: Tensor) -> Tensor:
        """round(x A^T) [T, R], without gradient."""
        return x_TI @ self.matrices_used()[0].T

    def add(self, y_TO: Tensor, xa_TR: Tensor) -> Tensor:
        """y += scale (x A^T) B^T in place, rounded once, without gradient."""
        b = self.matrices_used()[1]
        return add_rows(y_TO, xa_TR, b, self._where(), self.scale, capability=self.capability)

    def shrink_gradient(self, dy_TO: Tensor) -> Tensor:
        """t = round(scale dy B) [T, R], the gradient by x A^T."""
        b = self.matrices_used()[1]
        return shrink_rows(dy_TO, b, self._where(), self.scale, capability=self.capability)

    def b_gradient(self, dy_TO: Tensor, xa_TR: Tensor) -> Tensor:
        """scale dy^T (x A^T), the gradient by B, in float32."""
        return outer_rows(dy_TO, xa_TR, self._where(), self.scale, capability=self.capability)

    def matrices(self, part: str) -> tuple[Tensor, Tensor]:
        """The float32 A [r, I] and B [O, r] of one adapted matrix, as views."""
        where = self.parts[part]
        return self.a.detach()[where.ranks], self.b.detach()[where.b_rows]

    @torch.no_grad()
    def copy_from(self, other: LoraAdapter) -> None:
        """Take over another adapter's numbers; both must have the same shape."""
        self.a.copy_(other.a)
        self.b.copy_(other.b)
        self.refresh_shadow()

    @torch.no_grad()
    def refresh_shadow(self) -> None:
        """Rewrite the shadows in place from the parameters."""
        if self.a_shadow is not None and self.b_shadow is not None:
            self.a_shadow.copy_(self.a)
            self.b_shadow.copy_(self.b)

    def adds_beside(self, num_rows: int) -> bool:
        """Whether an NF4 product of rows in order can add this adapter's part (sm_90)."""
        fits = takes_adapter(self.capability, num_rows, self.rank, self._granule)
        return fits and self.a_shadow is not None and self.b_shadow is not None

    def low_rank(self, x_TI: Tensor, capability: Capability) -> LowRank | None:
        """round(x A^T) and what a product's kernel needs to add the rest; without gradient.

        None where those kernels do not run: on a CPU, in 32 bits, for odd widths or many rows.
        """
        a, b = self.a_shadow, self.b_shadow
        if a is None or b is None or not 0 < len(x_TI) <= MAX_LOW_RANK_ROWS:
            return None
        if not x_TI.is_cuda or not capability.tensor_dots or x_TI.shape[1] % 64:
            return None
        xa, scratch = lora_shrink_beside(x_TI, a, capability)
        return self._low_rank(xa, b, scratch)

    def fixed_low_rank(self, x_TI: Tensor) -> LowRank:
        """`low_rank` for any number of rows, no bit of a row depending on it."""
        a, b = self.matrices_used()
        return self._low_rank(lora_shrink(x_TI, a), b)

    def _low_rank(self, xa: Tensor, b: Tensor, scratch: Tensor | None = None) -> LowRank:
        return LowRank(
            xa=xa,
            b=b,
            parts=self.part_table,
            scale=self.scale,
            granule=self._granule,
            scratch=scratch,
        )

    def forward(self, y_TO: Tensor, x_TI: Tensor) -> Tensor:
        """Add scale (x A^T) B^T to y [T, O] in place; differentiable in y, x, A and B."""
        if not torch.is_grad_enabled():
            return self.add(y_TO, self.shrink(x_TI))
        out: Tensor = _AddLora.apply(y_TO, x_TI, self.a, self.b, *self.matrices_used(), self)  # type: ignore[no-untyped-call]
        return out


class _AddLora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        _a: Tensor,
        _b: Tensor,
        a_used: Tensor,
        b_used: Tensor,
        adapter: LoraAdapter,
    ) -> Tensor:
        xa = adapter.shrink(x)
        adapter.add(y, xa)
        ctx.mark_dirty(y)
        ctx.adapter = adapter
        ctx.save_for_backward(x, xa, a_used, b_used)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, xa, a, _ = ctx.saved_tensors
        dy, adapter = grads[0], ctx.adapter
        t = adapter.shrink_gradient(dy)
        dx = t @ a if ctx.needs_input_grad[1] else None
        da = wide_product(t.T, x) if ctx.needs_input_grad[2] else None
        db = adapter.b_gradient(dy, xa) if ctx.needs_input_grad[3] else None
        return dy, dx, da, db, None, None, None
