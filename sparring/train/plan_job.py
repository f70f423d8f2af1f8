"""What a plan is made of: the model's shape, the work of a step and the settings, plain numbers.

Sizes of everything that is there all the time are found here: weights, adapters, optimizer state.
Nothing is loaded and no GPU is asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from sparring.models.lora import PROJECTIONS
from sparring.models.quantised import COLUMN_SLICE_BYTES, SLICE_BYTES, slice_length
from sparring.models.transformer import HEAD_CHUNK_ROWS, Decoder, TransformerConfig
from sparring.train.tape import Tape

WEIGHTS, ADAPTERS, OPTIMIZER = "weights", "adapters and shadows", "optimizer state"
REFERENCE, CRITIC = "reference", "critic"
GRADIENTS, KV = "gradients", "KV pool"
INPUTS, WORKING = "layer inputs", "activations"
LOGITS, DECODED = "logits and row gradients", "decoded weights"
STREAMS, WORKSPACES = "batch streams", "library workspaces"
GRAPHS, SLACK, CONTEXT = "graphs and decode workspace", "allocator slack", "context"
PARTS = (
    WEIGHTS, ADAPTERS, REFERENCE, CRITIC, OPTIMIZER, GRADIENTS, KV, INPUTS, WORKING, LOGITS,
    DECODED, STREAMS, GRAPHS, WORKSPACES, SLACK, CONTEXT,
)  # fmt: skip
"""Rows of the table, in order."""

CONTEXT_BYTES = 2**30
"""What a process takes on a card beside the allocator (the CUDA context, loaded kernels), allowed
for; measured 0.6 to 0.8 GiB on an H200."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A step: prompts, samples of each, and tokens of a prompt and of a completion at most."""

    prompts: int
    group_size: int
    prompt_tokens: int
    completion_tokens: int

    @property
    def num_completions(self) -> int:
        """Completions a step."""
        return self.prompts * self.group_size

    @property
    def num_tokens(self) -> int:
        """Rows of a training step when every group's prompt is laid down once."""
        return self.prompts * (self.prompt_tokens - 1 + self.group_size * self.completion_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A model and how it is trained.

    item: bytes of a number in the compute dtype. rank 0: every weight is trained. targets: names
    out of PROJECTIONS. has_head: False for a critic's trunk. optimizer, keeps_16bit (kinds alone),
    head, embedding and kv_dtype: as in the recipe.
    """

    config: TransformerConfig
    item: int = 2
    is_quantised: bool = False
    rank: int = 16
    targets: frozenset[str] = frozenset(PROJECTIONS)
    has_head: bool = True
    optimizer: str = "adamw"
    keeps_16bit: frozenset[str] = frozenset()
    head: str = "16bit"
    embedding: str = "device"
    kv_dtype: str = "auto"

    @property
    def is_full(self) -> bool:
        """Whether every weight is trained."""
        return self.rank == 0

    def linears(self) -> Mapping[str, LinearSize]:
        """The four fused linear layers of a decoder layer, by name."""
        config = self.config
        queries = config.num_heads * config.head_size
        keys = config.num_kv_heads * config.head_size
        width, ffn = config.width, config.ffn_width
        sizes = {
            "qkv": (width, {"q_proj": queries, "k_proj": keys, "v_proj": keys}, config.qkv_bias),
            "output": (queries, {"o_proj": width}, config.output_bias),
            "gate_up": (width, {"gate_proj": ffn, "up_proj": ffn}, config.mlp_bias),
            "down": (ffn, {"down_proj": width}, config.mlp_bias),
        }
        return {
            name: LinearSize(
                inputs=inputs,
                parts=parts,
                has_bias=has_bias,
                adapted=tuple(rows for part, rows in parts.items() if part in self.targets)
                if self.rank
                else (),
                is_quantised=self.is_quantised
                and inputs % 64 == 0
                and not self.keeps_16bit.issuperset(parts),
                kept=sum(rows for part, rows in parts.items() if part in self.keeps_16bit),
            )
            for name, (inputs, parts, has_bias) in sizes.items()
        }

    @property
    def num_linear(self) -> int:
        """Numbers in the linear layers' matrices."""
        one = sum(size.inputs * size.outputs for size in self.linears().values())
        return self.config.num_layers * one

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of one token's keys and values, in 8 bits with a scale a head."""
        config = self.config
        is_small = self.kv_dtype != "auto"
        each = config.head_size + 4 if is_small else config.head_size * self.item
        return config.num_layers * 2 * config.num_kv_heads * each


def trained_as(model: Decoder) -> Trained:
    """A loaded model as it stands; how it is trained and stored beyond that is the default."""
    lora = model.lora.get("policy")
    return Trained(
        config=model.config,
        item=model.dtype.itemsize,
        is_quantised=model.is_quantised,
        rank=0 if lora is None else lora.rank,
        targets=frozenset() if lora is None else lora.targets(),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearSize:
    """A fused linear layer: its inputs, the outputs of each part, and of each adapted part.

    kept: outputs of parts that stay in 16 bits although the others are in NF4.
    """

    inputs: int
    parts: Mapping[str, int]
    has_bias: bool
    adapted: tuple[int, ...]
    is_quantised: bool
    kept: int = 0

    @property
    def outputs(self) -> int:
        """Outputs of all parts."""
        return sum(self.parts.values())

    def decoded(self, item: int) -> int:
        """Bytes of its decoded matrix where it is in NF4, else 0: nothing is decoded."""
        return self.inputs * self.outputs * item if self.is_quantised else 0

    def decoded_rows(self, item: int) -> int:
        """Bytes of the slice of rows that is decoded at once, for a product."""
        if not self.is_quantised:
            return 0
        return slice_length(self.inputs, self.outputs, SLICE_BYTES, item) * self.inputs * item

    def decoded_columns(self, item: int) -> int:
        """Bytes of the slice of columns that is decoded at once, for a gradient by the input."""
        if not self.is_quantised:
            return 0
        return (
            slice_length(self.outputs, self.inputs, COLUMN_SLICE_BYTES, item) * self.outputs * item
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a plan may choose.

    offload: what checkpoints keep waits in host memory. mlp_tile_tokens: see the recipe. kv_bytes,
    max_running: of the rollout engine. caches_weights: NF4 weights are kept decoded during
    rollouts; None: where they fit, if a proposal is asked for.
    """

    micro_batch_tokens: int = 8192
    checkpointing: str = "none"
    offload: bool = False
    mlp_tile_tokens: int = 8192
    kv_bytes: int = 0
    max_running: int = 512
    caches_weights: bool | None = None
    head_chunk_rows: int = HEAD_CHUNK_ROWS


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Everything a plan is made from.

    reference: "none", "base" (the adapter switched off), "adapter" or "weights" (a frozen copy).
    critic: PPO's, None otherwise; shares_trunk: it has an adapter and a head on the policy's trunk.
    passes, mini_steps: of PPO. samples: whether there are rollouts at all (SFT and DPO have none).
    most_completions: that may be asked for at once, in evaluations too (0: those of a step).
    """

    policy: Trained
    work: Work
    reference: str = "none"
    critic: Trained | None = None
    shares_trunk: bool = False
    passes: int = 1
    mini_steps: int = 1
    samples: bool = True
    most_completions: int = 0


def take_weights(tape: Tape, model: Trained, part: str) -> None:
    """The weights of a model, tensor by tensor, as they are loaded."""
    config, item = model.config, model.item
    table = config.vocab_size * config.width
    if config.tied_head:
        _take_head(tape, model, part)
    elif model.embedding == "device":
        tape.take(part, table * item)
    for _ in range(config.num_layers):
        for size in model.linears().values():
            for num_bytes in _matrix(size, item):
                tape.take(part, num_bytes)
            if size.has_bias:
                tape.take(part, size.outputs * item)
        norms = (config.width, config.width)
        for numbers in norms + ((config.head_size,) * 2 if config.qk_norm else ()):
            tape.take(part, numbers * item)
    tape.take(part, config.width * item)
    if model.has_head and not config.tied_head:
        _take_head(tape, model, part)


def _take_head(tape: Tape, model: Trained, part: str) -> None:
    config = model.config
    if model.head == "8bit":
        tape.take(part, config.vocab_size * config.width)
        tape.take(part, config.vocab_size * 4)
    else:
        tape.take(part, config.vocab_size * config.width * model.item)


def _matrix(size: LinearSize, item: int) -> Iterator[int]:
    """Bytes of the tensors that hold a matrix."""
    numbers = size.inputs * size.outputs
    if not size.is_quantised:
        yield numbers * item
        return
    if size.kept:
        yield size.inputs * size.kept * item
        numbers -= size.inputs * size.kept
    blocks = numbers // 64
    yield numbers // 2
    if any(size.inputs * rows // 64 % 256 for rows in size.parts.values()) and len(size.parts) > 1:
        yield blocks * 4  # scales that fill no whole groups are kept in float32 once fused
        return
    yield blocks
    yield -(-blocks // 256) * 4
    yield -(-blocks // 256) * 4


def trained_sizes(model: Trained) -> list[tuple[int, bool]]:
    """Numbers of each trained tensor, and whether it is kept in 16 bits with a float32 master."""
    config, found = model.config, []
    is_half = model.item == 2
    if model.rank:
        for _ in range(config.num_layers):
            for size in model.linears().values():
                if size.adapted:
                    found.append((len(size.adapted) * model.rank * size.inputs, False))
                    found.append((sum(size.adapted) * model.rank, False))
        return found
    found.append((config.vocab_size * config.width, is_half))
    for _ in range(config.num_layers):
        for size in model.linears().values():
            found.append((size.inputs * size.outputs, is_half))
            if size.has_bias:
                found.append((size.outputs, is_half))
        norms = (config.width, config.width)
        found += [(n, is_half) for n in norms + ((config.head_size,) * 2 if config.qk_norm else ())]
    found.append((config.width, is_half))
    if model.has_head and not config.tied_head:
        found.append((config.vocab_size * config.width, is_half))
    return found


def take_adapter(tape: Tape, model: Trained, part: str) -> None:
    """Float32 adapters and their 16-bit shadows."""
    for numbers, _ in trained_sizes(model) if model.rank else ():
        tape.take(part, numbers * 4)
        if model.item == 2:
            tape.take(part, numbers * 2)


def take_masters(tape: Tape, model: Trained) -> None:
    """Float32 masters of 16-bit weights: there once the optimizer is built."""
    for numbers, is_half in trained_sizes(model):
        if is_half:
            tape.take(OPTIMIZER, numbers * 4)


def take_moments(tape: Tape, model: Trained) -> None:
    """The optimizer's moments: there once the optimizer is built."""
    for numbers, _ in trained_sizes(model):
        if model.optimizer == "adamw_8bit" and numbers >= 4096:
            for _ in range(2):
                tape.take(OPTIMIZER, numbers)
                tape.take(OPTIMIZER, -(-numbers // 256) * 4)
        else:
            tape.take(OPTIMIZER, 4)  # the count of updates
            tape.take(OPTIMIZER, numbers * 4)
            tape.take(OPTIMIZER, numbers * 4)
