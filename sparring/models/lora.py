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

    a [P r, I] stacks the A matrices of the P adapted parts, b [sum of their outputs, r] the B
    matrices.
    """

    a_shadow: Tensor | None
    b_shadow: Tensor | None

    def __init__(
        self,
        config: LoraConfig,
        parts: Mapping[str, slice],
        num_inputs: int,
        *,
        generator: torch.Generator,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.scale = config.scale
        self.rank = config.rank
        self.parts: dict[str, _Part] = {}
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

    def forward(self, y_TO: Tensor, x_TI: Tensor, *, is_read: bool = True) -> Tensor:
        """Add scale (x A^T) B^T to y [T, O] in place; differentiable in y, x, A and B.

        is_read=False: nobody reads the numbers of the result, only its gradient is wanted.
        """
        a = self.a if self.a_shadow is None else self.a_shadow
        b = self.b if self.b_shadow is None else self.b_shadow
        if not torch.is_grad_enabled():
            _add_in_place(y_TO, x_TI, a, b, self)
            return y_TO
        out: Tensor = _AddLora.apply(y_TO, x_TI, self.a, self.b, a, b, self, is_read)  # type: ignore[no-untyped-call]
        return out


def _add_in_place(y: Tensor, x: Tensor, a: Tensor, b: Tensor, adapter: LoraAdapter) -> Tensor:
    """y += scale (x A^T) B^T part by part; returns x A^T."""
    xa = x @ a.T
    for part in adapter.parts.values():
        y[:, part.output_rows].addmm_(xa[:, part.ranks], b[part.b_rows].T, alpha=adapter.scale)
    return xa


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
        is_read: bool,
    ) -> Tensor:
        if is_read:
            xa = _add_in_place(y, x, a_used, b_used, adapter)
            ctx.mark_dirty(y)
        else:
            xa, y = x @ a_used.T, y.new_empty(()).expand(y.shape)
        ctx.adapter = adapter
        ctx.save_for_backward(x, xa, a_used, b_used)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, xa, a, b = ctx.saved_tensors
        dy, adapter = grads[0], ctx.adapter
        t = torch.empty_like(xa)
        db = torch.empty(adapter.b.shape, dtype=adapter.b.dtype, device=dy.device)
        for part in adapter.parts.values():
            dy_part = dy[:, part.output_rows]
            torch.mul(dy_part @ b[part.b_rows], adapter.scale, out=t[:, part.ranks])
            if ctx.needs_input_grad[3]:
                db[part.b_rows] = _product(dy_part.T, xa[:, part.ranks], db.dtype).mul_(
                    adapter.scale
                )
        dx = t @ a if ctx.needs_input_grad[1] else None
        da = _product(t.T, x, adapter.a.dtype) if ctx.needs_input_grad[2] else None
        return dy, dx, da, db if ctx.needs_input_grad[3] else None, None, None, None, None


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right, accumulated and kept in dtype (at least as wide as theirs)."""
    if left.dtype == dtype:
        return left @ right
    if left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)
