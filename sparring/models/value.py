"""A critic: before each token of a completion, what the completion is going to earn.

A head of one output on a trunk, which is either the policy's own (with an adapter of the critic's
beside the policy's) or a model that is the critic's alone. The value of row t is read off the
hidden state that predicts labels_T[t], so it knows of what came before that token and no more. No
loss and no advantage is known here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from sparring.errors import CheckpointError, MemoryBudgetError
from sparring.kernels import Capability
from sparring.models.checkpoint import base_folder, build_model, load_model
from sparring.models.files import read_json
from sparring.models.lora import LoraConfig
from sparring.models.storage import HostTable
from sparring.models.transformer import Decoder
from sparring.types import Batch, TokenScores

ADAPTER = "value"
HEAD = "value_head"

_TRAINED_BYTES = 16
"""Of one trained float32 number: itself, its gradient and AdamW's two moments."""


class Critic:
    """Values of a batch's tokens; made by `share_trunk` or `load_critic`.

    trunk: the decoder under the head. adapter: which of its adapters is read, None for none.
    is_shared: the trunk is also the policy. The head starts at 0, and with it every value.
    """

    def __init__(self, trunk: Decoder, *, adapter: str | None, is_shared: bool) -> None:
        self.trunk, self.adapter, self.is_shared = trunk, adapter, is_shared
        dtype = torch.float64 if trunk.dtype == torch.float64 else torch.float32
        self.head = nn.utils.skip_init(  # the default draws from torch's own generator
            nn.Linear, trunk.config.width, 1, device=trunk.device, dtype=dtype
        )
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.trunk.device

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """The critic's own parameters by stable names: its head, its adapter or its own trunk."""
        found = {
            name: parameter
            for name, parameter in self.trunk.trainable_parameters().items()
            if not self.is_shared or f".adapters.{ADAPTER}." in name
        }
        return found | {f"{HEAD}.{name}": p for name, p in self.head.named_parameters()}

    def score(self, batch: Batch) -> TokenScores:
        """Values [T] of the loss tokens, with gradient, 0 on other rows.

        A critic has no log-probabilities and no entropy: both are 0.
        """
        has_trained_trunk = len(self.trainable_parameters()) > len(list(self.head.parameters()))
        with torch.set_grad_enabled(torch.is_grad_enabled() and has_trained_trunk):
            hidden_TD = self.trunk(
                batch.input_ids_T, batch.positions_T, batch.layout, adapter=self.adapter
            )
        rows_M = batch.loss_mask_T.nonzero().squeeze(1)
        hidden_MD = hidden_TD.index_select(0, rows_M).to(self.head.weight.dtype)
        values_M = self.head(hidden_MD).squeeze(1)
        zeros_T = values_M.new_zeros(len(batch.input_ids_T))
        return TokenScores(
            logprobs_T=zeros_T,
            entropy_T=zeros_T,
            values_T=zeros_T.index_copy(0, rows_M, values_M),
        )

    def refresh_shadows(self) -> None:
        """Called after each update of the critic."""
        self.trunk.refresh_shadows()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While it lasts, only the critic's own parameters of the trunk take gradients.

        A critic on a trunk that is trained as the policy would send its gradients there too.
        """
        own = {id(parameter) for parameter in self.trainable_parameters().values()}
        others = [p for p in self.trunk.parameters() if p.requires_grad and id(p) not in own]
        for parameter in others:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in others:
                parameter.requires_grad_(True)


def share_trunk(policy: Decoder, *, rank: int, seed: int, free: int) -> Critic:
    """A critic on the policy's own trunk, with an adapter of this rank called "value".

    rank 0: no adapter; the head alone learns, on what the policy computes. The policy's parameters
    are trained after this as they were before. free: bytes that the critic may take. Raises
    MemoryBudgetError where it does not fit.
    """
    config = LoraConfig(rank=max(rank, 1), alpha=float(max(rank, 1)), seed=seed)
    trained = policy.config.width + 1 + (adapter_size(policy, config) if rank else 0)
    needed = trained * (_TRAINED_BYTES + _shadow_bytes(policy.dtype))
    if needed > free:
        raise _too_large(needed, trained, free, f"lower [value] rank = {rank}")
    if not rank:
        return Critic(policy, adapter="policy", is_shared=True)
    learned = list(policy.trainable_parameters().values())
    policy.add_adapter(config, name=ADAPTER)
    for parameter in learned:
        parameter.requires_grad_(True)
    return Critic(policy, adapter=ADAPTER, is_shared=True)


def load_critic(
    path: str | Path,
    *,
    rank: int,
    seed: int,
    dtype: str,
    device: torch.device,
    free: int,
    capability: Capability | None = None,
) -> Critic:
    """A critic on a trunk of its own, loaded from a checkpoint without its output head.

    rank 0: all of its weights are trained; else an adapter of this rank. free: bytes that the
    critic may take. capability: the policy's. Raises CheckpointError, or MemoryBudgetError before
    anything is loaded.
    """
    config = LoraConfig(rank=max(rank, 1), alpha=float(max(rank, 1)), seed=seed)
    shape = build_model(
        read_json(base_folder(path) / "config.json"), device="meta", dtype=torch.float32
    )
    size = sum(p.numel() for p in shape.parameters()) - _head_size(shape)
    item = 4 if dtype == "float32" else 2
    trained = adapter_size(shape, config) if rank else size
    # A 16-bit weight is kept beside its float32 master, an adapter's shadow beside its own.
    needed = size * item + trained * (_TRAINED_BYTES - (4 if item == 4 and not rank else 0))
    if needed > free:
        small = adapter_size(shape, LoraConfig()) * (_TRAINED_BYTES + 2)
        remedy = f"leave [value] path empty for a critic on the policy's trunk ({_gib(small)})"
        if not rank:
            remedy += ", or set [value] rank for an adapter on its frozen weights"
        raise _too_large(needed, trained, free, remedy)
    trunk = load_model(path, dtype=dtype, device=device, capability=capability)
    if trunk.has_adapter():
        raise CheckpointError(
            f"[value] path = '{path}' holds an adapter; a critic's trunk is a whole model: give"
            " the adapter's base, or merge the adapter into it first"
        )
    assert not isinstance(trunk.embed, HostTable), "loaded onto the device above"
    trunk.head = trunk.embed  # the output head is never read
    trunk.requires_grad_(True)
    if rank:
        trunk.add_adapter(config, name=ADAPTER)
    return Critic(trunk, adapter=ADAPTER if rank else None, is_shared=False)


def adapter_size(model: Decoder, config: LoraConfig) -> int:
    """Numbers in an adapter of this config on the model."""
    targets = config.targets()
    return sum(
        config.rank * (linear.base.shape[1] + rows.stop - rows.start)
        for linear in model.linears().values()
        for part, rows in linear.parts.items()
        if part in targets
    )


def _head_size(model: Decoder) -> int:
    return 0 if model.head is model.embed else model.head.shape[0] * model.head.shape[1]


def _shadow_bytes(dtype: torch.dtype) -> int:
    return dtype.itemsize if dtype.itemsize < 4 else 0


def _too_large(needed: int, trained: int, free: int, remedy: str) -> MemoryBudgetError:
    return MemoryBudgetError(
        f"the critic does not fit: it needs {_gib(needed)} ({trained:,} trained parameters with"
        f" gradients and AdamW's moments), but only {_gib(max(0, free))} are left beside the"
        f" policy; {remedy}, train an adapter ([lora]) instead of all weights, or take GRPO, which"
        " needs no critic"
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
