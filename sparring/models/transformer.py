"""The decoder: one model definition for training, scoring and generation, over flat tokens [T].

What a family's models look like is data (TransformerConfig, filled in by models/families); who is
in the batch is an argument (layout). There is no batch axis, no padding, no file format and
no sampling here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparring.errors import CheckpointError, UserError
from sparring.kernels import Capability, capability_of
from sparring.kernels.column_order import AS_THEY_ARE, Written
from sparring.kernels.few_rows import max_folded_rows
from sparring.kernels.head import head_logits, linear_logprob
from sparring.kernels.norm import add_rms_norm, rms_norm
from sparring.kernels.rope import rope, rotated_heads
from sparring.kernels.swiglu import swiglu
from sparring.layout import KVPool, Layout
from sparring.models.attention import AttentionPlan, plan_attention
from sparring.models.attention_paged_kernel import PagedKernelPlan
from sparring.models.blocks import lora_mlp
from sparring.models.checkpointing import MLP_TILE_TOKENS, Checkpointing
from sparring.models.linear import Dense, Linear, fix_order
from sparring.models.lora import LoraAdapter, LoraConfig
from sparring.models.quantised import Quantised
from sparring.models.rope import RopeConfig, inverse_frequencies, rope_tables
from sparring.models.storage import EightBitTable, HostTable, Storage
from sparring.types import Batch, TokenScores

HEAD_CHUNK_ROWS = 768
"""Rows of logits that exist at once while a batch is scored: with 768 the products of widths 896 to
3584 fill an H200 best for their memory (512: 5 to 12 % longer; 1,024: as long, or longer).
"""
CPU_HEAD_CHUNK_ROWS = 512
"""The same on a CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerConfig:
    """Everything a decoder's shape and arithmetic depend on.

    windows: per layer the sliding window in tokens, the token itself included; 0 = unlimited.
    max_tokens: longest context the checkpoint was made for. family: name of the family whose weight
    names apply. source: the checkpoint's own config.json, written back when the model is saved.
    """

    family: str
    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    ffn_width: int
    norm_eps: float
    rope: RopeConfig
    windows: tuple[int, ...]
    max_tokens: int
    tied_head: bool
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    initializer_range: float = 0.02
    source: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each behind an RMSNorm and added to the residual stream."""

    def __init__(
        self,
        config: TransformerConfig,
        index: int,
        device: torch.device,
        dtype: torch.dtype,
        is_quantised: bool,
        capability: Capability,
    ) -> None:
        super().__init__()
        self.config, self.index = config, index

        def vector(size: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(size, device=device, dtype=dtype))

        def linear(inputs: int, parts: Mapping[str, int], bias: bool) -> Linear:
            return Linear(
                inputs,
                parts,
                bias=bias,
                device=device,
                dtype=dtype,
                is_quantised=is_quantised,
                capability=capability,
            )

        queries, keys = (
            config.num_heads * config.head_size,
            config.num_kv_heads * config.head_size,
        )
        self.attention_norm = vector(config.width)
        self.qkv = linear(
            config.width,
            {"q_proj": queries, "k_proj": keys, "v_proj": keys},
            config.qkv_bias,
        )
        self.q_norm = vector(config.head_size) if config.qk_norm else None
        self.k_norm = vector(config.head_size) if config.qk_norm else None
        self.output = linear(queries, {"o_proj": config.width}, config.output_bias)
        self.mlp_norm = vector(config.width)
        self.gate_up = linear(
            config.width,
            {"gate_proj": config.ffn_width, "up_proj": config.ffn_width},
            config.mlp_bias,
        )
        self.down = linear(config.ffn_width, {"down_proj": config.width}, config.mlp_bias)

    def forward(
        self,
        x_TD: Tensor,
        cos: Tensor,
        sin: Tensor,
        plan: AttentionPlan,
        adapter: str | None,
    ) -> Tensor:
        """The residual stream [T, D] after this layer."""
        q, k, v = self.heads(x_TD, cos, sin, adapter)
        attended = plan.attend(q, k, v, self.index, self.window)
        summed_TD, normed_TD = self.after_attention(x_TD, attended, adapter)
        out: Tensor = summed_TD + self.mlp(normed_TD, adapter)
        return out

    @property
    def window(self) -> int:
        """The layer's sliding window in tokens; 0 = unlimited."""
        return self.config.windows[self.index]

    def heads(
        self, x_TD: Tensor, cos: Tensor, sin: Tensor, adapter: str | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, H, E], keys and values [T, K, E] of the residual stream."""
        normed = rms_norm(x_TD, self.attention_norm, self.config.norm_eps)
        return self._project(normed, cos, sin, adapter)

    def after_attention(
        self, x_TD: Tensor, attended_THE: Tensor, adapter: str | None
    ) -> tuple[Tensor, Tensor]:
        """The residual stream with attention's output added, and that stream normed."""
        added = self.output(attended_THE.reshape(len(x_TD), -1), adapter)
        normed, summed = add_rms_norm(added, x_TD, self.mlp_norm, self.config.norm_eps)
        return summed, normed

    def attention(
        self, normed_TD: Tensor, cos: Tensor, sin: Tensor, plan: AttentionPlan,
        adapter: str | None, written: Written = AS_THEY_ARE,
    ) -> Tensor:  # fmt: skip
        """What attention adds to the residual stream, from its normed state (see `infer`)."""
        heads, ordered = self.qkv(normed_TD, adapter, written=written), AS_THEY_ARE
        if isinstance(plan, PagedKernelPlan):
            ordered = self.output.reads(len(heads), adapter)
            attended = plan.attend_rotated(
                heads, cos, sin, self.q_norm, self.k_norm, self.config.norm_eps, self.index,
                self.window, overlaps=written.early, written=ordered,
            )  # fmt: skip
        else:
            heads = heads.view(len(heads), -1, self.config.head_size)
            attended = plan.attend(*self._rotate(heads, cos, sin), self.index, self.window)
        out: Tensor = self.output(attended.flatten(-2), adapter, written=ordered)
        return out

    def mlp(
        self, normed_TD: Tensor, adapter: str | None, *,
        is_read: bool = True, written: Written = AS_THEY_ARE,
    ) -> Tensor:  # fmt: skip
        """What the feed-forward adds to the residual stream, from its normed state.

        is_read=False: only the gradient is wanted; a frozen layer's result is not computed.
        """
        layers = self.gate_up, self.down
        if all(layer.takes_blocks(normed_TD) for layer in layers):
            gate_up, down = (layer.frozen(adapter) for layer in layers)
            return lora_mlp(normed_TD, gate_up, down, is_read=is_read)
        projected = self.gate_up(normed_TD, adapter, written=written)
        written = self.down.reads(len(projected), adapter)
        # nothing else reads the projection, so its gradient may lie where it lay
        hidden = swiglu(projected, overwrite=True, written=written)
        out: Tensor = self.down(hidden, adapter, written=written)
        return out

    def _project(
        self, normed_TD: Tensor, cos: Tensor, sin: Tensor, adapter: str | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.qkv(normed_TD, adapter).view(len(normed_TD), -1, self.config.head_size)
        return self._rotate(heads, cos, sin)

    def _rotate(self, heads: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of [T, H + 2K, E], normed (Qwen3) and rotated."""
        config = self.config
        sizes = (config.num_heads, config.num_kv_heads)
        if self.q_norm is not None and self.k_norm is not None:
            q, k, v = torch.split(heads, [*sizes, config.num_kv_heads], dim=1)
            q = rope(rms_norm(q, self.q_norm, config.norm_eps), cos, sin)
            k = rope(rms_norm(k, self.k_norm, config.norm_eps), cos, sin)
            return q, k, v
        return rotated_heads(heads, cos, sin, sizes)


class Decoder(nn.Module):
    """A causal language model over flat tokens.

    Parameters are uninitialised after construction: models/checkpoint.py fills them, or
    `init_weights`. is_quantised: the layers' matrices are in NF4, frozen. capability: what kernels
    may use, else the device's; all below reads it. storage: of embedding and head; an embedding on
    the host is for a GPU alone. max_folded_rows: see `serves` of models/few_rows.py; 0: no step.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype,
        is_quantised: bool = False,
        capability: Capability | None = None,
        storage: Storage | None = None,
    ) -> None:
        super().__init__()
        device = torch.device(device)
        self.storage = storage or Storage()
        self.capability = capability or capability_of(device)
        self.config, self.is_quantised = config, is_quantised
        self.head_chunk_rows = HEAD_CHUNK_ROWS if self.capability.arch else CPU_HEAD_CHUNK_ROWS
        self.is_bitwise = False
        self.max_folded_rows = max_folded_rows(self.capability)
        self.lora: dict[str, LoraConfig] = {}
        self.checkpointing = Checkpointing("none", device=device)
        self.embed = self._table(device, dtype, is_embedding=True)
        self.layers = nn.ModuleList(
            DecoderLayer(config, i, device, dtype, is_quantised, self.capability)
            for i in range(config.num_layers)
        )
        self.norm = nn.Parameter(torch.empty(config.width, device=device, dtype=dtype))
        head = self.embed if config.tied_head else self._table(device, dtype, is_embedding=False)
        assert not isinstance(head, HostTable), "the head is read whole, on the device"
        self.head: Dense | EightBitTable = head
        frequencies = inverse_frequencies(config.rope, config.head_size)
        self.frequencies_E2 = frequencies.to(device)

    def _table(
        self, device: torch.device, dtype: torch.dtype, *, is_embedding: bool
    ) -> Dense | HostTable | EightBitTable:
        """The embedding, or a head of its own; a tied embedding is kept as the head is."""
        config, storage = self.config, self.storage
        if is_embedding and storage.embedding == "host" and device.type == "cuda":
            if config.tied_head:
                raise CheckpointError(
                    "embedding = 'host' needs a model with an output head of its own; in this one"
                    " (tie_word_embeddings) every step reads the whole table: keep it on the device"
                )
            return HostTable(config.vocab_size, config.width, dtype=dtype)
        if storage.head == "8bit" and (config.tied_head or not is_embedding):
            return EightBitTable(config.vocab_size, config.width, device=device, dtype=dtype)
        return Dense(config.vocab_size, config.width, device=device, dtype=dtype)

    @property
    def device(self) -> torch.device:
        """Where the weights are (the embedding apart)."""
        return self.norm.device

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self.norm.dtype

    @property
    def num_weights(self) -> int:
        """Numbers in the model, adapters included, in whatever form they are kept."""
        packed = (m for m in self.modules() if isinstance(m, Quantised | EightBitTable))
        plain = sum(parameter.numel() for parameter in self.parameters())
        return plain + sum(module.shape[0] * module.shape[1] for module in packed)

    def set_checkpointing(
        self,
        mode: str,
        *,
        offload: bool = False,
        mlp_tile_tokens: int = MLP_TILE_TOKENS,
    ) -> None:
        """Choose what the training forward keeps for backward, and where: see checkpointing.py."""
        self.checkpointing = Checkpointing(
            mode, offload=offload, mlp_tile_tokens=mlp_tile_tokens, device=self.device
        )

    def set_bitwise(self, is_bitwise: bool) -> None:
        """Choose sums in fixed orders: on a GPU the trainer's log-probabilities then have the bits
        that the sampler recorded, whatever was in its batch (docs/how-to/exact-rollouts.md). Raises
        UserError for a card whose products are the library's.
        """
        if is_bitwise and self.capability.arch and not self.capability.tensor_dots:
            raise UserError(
                "run.bitwise = true needs a card of compute capability 8.0 or later; this one has"
                f" {self.capability.arch / 10:.1f}: leave it false"
            )
        self.is_bitwise = is_bitwise
        fix_order(self, is_bitwise)

    def forward(
        self,
        input_ids_T: Tensor,
        positions_T: Tensor,
        layout: Layout,
        kv_pool: KVPool | None = None,
        *,
        adapter: str | None = "policy",
    ) -> Tensor:
        """Hidden states [T, D] after the final norm.

        adapter: "policy" = the trained adapter where there is one; any other name must exist; None
        = the base alone. A PagedLayout needs `kv_pool`, which is written to.
        """
        plan = self.plan(layout, kv_pool, adapter)
        cos, sin = self.angles(positions_T)
        x_TD = self.embed.rows(input_ids_T)
        if not torch.is_grad_enabled():
            return self.infer(x_TD, cos, sin, plan, adapter)
        keeping = self.checkpointing.begin(len(self.layers))
        for layer in self.layers:
            x_TD = keeping.run(layer, x_TD, cos, sin, plan, adapter)
        return rms_norm(x_TD, self.norm, self.config.norm_eps)

    def plan(self, layout: Layout, kv_pool: KVPool | None, adapter: str | None) -> AttentionPlan:
        """Who sees whom, for every layer of a pass."""
        assert adapter in (None, "policy") or adapter in self.lora, f"no adapter called {adapter!r}"
        return plan_attention(
            layout,
            kv_pool,
            self.device,
            dtype=self.dtype,
            head_size=self.config.head_size,
            capability=self.capability,
            bitwise=self.is_bitwise,
        )

    def angles(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [T, E / 2] of tokens at these positions."""
        return rope_tables(self.frequencies_E2.to(self.device), positions_T)

    def infer(
        self, x_TD: Tensor, cos: Tensor, sin: Tensor, plan: AttentionPlan, adapter: str | None
    ) -> Tensor:
        """`forward` without gradient: every addition goes into the norm that follows it, and norms
        write in the order in which an NF4 product reads (kernels/column_order.py).
        """
        eps = self.config.norm_eps
        added: Tensor | None = None
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer), "layers are DecoderLayers"
            way = layer.qkv.reads(len(x_TD), adapter)
            if added is None:
                normed = rms_norm(x_TD, layer.attention_norm, eps, written=way)
            else:
                normed, x_TD = add_rms_norm(added, x_TD, layer.attention_norm, eps, written=way)
            added = layer.attention(normed, cos, sin, plan, adapter, way)
            way = layer.gate_up.reads(len(x_TD), adapter)
            normed, x_TD = add_rms_norm(added, x_TD, layer.mlp_norm, eps, written=way)
            added = layer.mlp(normed, adapter, written=way)
        assert added is not None, "a decoder has a layer"
        return add_rms_norm(added, x_TD, self.norm, eps)[0]

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Logits [T, V] in float32 (float64 in a float64 model), as `score` sees them."""
        return head_logits(hidden_TD, self.head.table, is_fixed=self.is_bitwise)

    def score(self, batch: Batch, *, adapter: str | None = "policy") -> TokenScores:
        """Scores of the batch's labels, with gradient; 0 where loss_mask_T is False."""
        hidden_TD = self(batch.input_ids_T, batch.positions_T, batch.layout, adapter=adapter)
        rows_M = batch.loss_mask_T.nonzero().squeeze(1)
        logprobs_M, entropy_M = linear_logprob(
            hidden_TD.index_select(0, rows_M),
            self.head.table,
            batch.labels_T.index_select(0, rows_M),
            temperature=batch.temperature,
            chunk_rows=self.head_chunk_rows,
            is_fixed=self.is_bitwise,
        )
        zeros_T = logprobs_M.new_zeros(len(batch.input_ids_T))
        return TokenScores(
            logprobs_T=zeros_T.index_copy(0, rows_M, logprobs_M),
            entropy_T=zeros_T.index_copy(0, rows_M, entropy_M.detach()),
        )

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """What the optimizer changes, by stable names in sorted order."""
        return {name: p for name, p in sorted(self.named_parameters()) if p.requires_grad}

    def has_adapter(self, name: str = "policy") -> bool:
        """Whether an adapter of that name is there."""
        return name in self.lora

    def add_adapter(self, config: LoraConfig, *, name: str = "policy") -> None:
        """Freeze the base and put a fresh adapter on it; it is trained unless its name is
        "reference".
        """
        assert name not in self.lora, f"there is an adapter called {name!r} already"
        targets = config.targets()
        generator = torch.Generator().manual_seed(config.seed)
        if not self.lora:
            self.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, Linear):
                module.add_adapter(name, config, targets, generator)
        self.lora[name] = config
        for adapter in self.adapter_modules(name).values():
            adapter.requires_grad_(name != "reference")

    def remove_adapter(self, name: str) -> None:
        """Take an adapter off again; what it held is gone."""
        for module in self.modules():
            if isinstance(module, Linear) and name in module.adapters:
                del module.adapters[name]
        del self.lora[name]

    def linears(self) -> dict[str, Linear]:
        """Every linear layer of the decoder's layers, by its path."""
        return {path: module for path, module in self.named_modules() if isinstance(module, Linear)}

    def adapter_modules(self, name: str) -> dict[str, LoraAdapter]:
        """The named adapter's parts, by the path of the Linear they sit on."""
        found = {}
        for path, module in self.named_modules():
            if isinstance(module, Linear) and name in module.adapters:
                adapter = module.adapters[name]
                assert isinstance(adapter, LoraAdapter), "adapters hold LoraAdapter only"
                found[path] = adapter
        return found

    def refresh_shadows(self) -> None:
        """Rewrite every adapter's 16-bit shadow in place; call it after each optimizer step."""
        for module in self.modules():
            if isinstance(module, LoraAdapter):
                module.refresh_shadow()

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Random weights: norms 1, biases 0, the rest normal by the config's initializer_range."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in sorted(self.named_parameters()):
            if name.endswith("norm"):
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                values = torch.empty(parameter.shape, dtype=torch.float32)
                parameter.copy_(
                    values.normal_(0.0, self.config.initializer_range, generator=generator)
                )


def new_kv_pool(
    config: TransformerConfig,
    num_blocks: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    address: Tensor | None = None,
) -> KVPool:
    """A zeroed pool of keys and values; bytes: num_blocks * block_size *
    kv_bytes_per_token(config, dtype). dtype: the model's, or int8 or float8_e4m3fn with scales.
    address: the address tensor of the pool that it follows, [2] with scales.
    """
    shape = (
        config.num_layers,
        num_blocks,
        2,
        config.num_kv_heads,
        block_size,
        config.head_size,
    )
    data = torch.zeros(shape, dtype=dtype, device=device)
    scales = None
    if dtype.itemsize == 1:
        scales = torch.zeros(shape[:-1], dtype=torch.float32, device=device)
    places = [data.data_ptr()] if scales is None else [data.data_ptr(), scales.data_ptr()]
    if address is None:
        address = torch.zeros(len(places), dtype=torch.int64, device=device)
    address.copy_(torch.tensor(places))
    return KVPool(data=data, address=address, scales=scales)


def kv_bytes_per_token(config: TransformerConfig, dtype: torch.dtype) -> int:
    """Bytes that one token's keys and values take over all layers, with scales in 8 bits."""
    each = config.head_size * dtype.itemsize + (4 if dtype.itemsize == 1 else 0)
    return config.num_layers * 2 * config.num_kv_heads * each
