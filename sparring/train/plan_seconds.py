"""Seconds of a step from a card's bandwidth and tensor peak: rollout by bytes, training by FLOP.

The shares of the peaks that are reached were measured on H200s (docs/benchmarks) and are taken
for every card; on others the result is an estimate. A micro-batch takes as long as the card
computes or as long as the host launches, whichever is longer; host time is what the machines
beside the measured cards needed (decision 0020).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sparring.models.quantised import SLICE_BYTES
from sparring.train.cards import Card
from sparring.train.plan_job import Job, LinearSize, Settings, Trained, Work, trained_sizes
from sparring.train.plan_training import MicroBatch

MATMUL_SHARE, HEAD_SHARE = 0.86, 0.77
ATTENTION_FORWARD_SHARE, ATTENTION_BACKWARD_SHARE = 0.54, 0.40
SHORT_TOKENS = 450
"""Of the card's tensor peak (for the H200 the measured 801 TFLOP/s); attention of n tokens reaches
n / (n + SHORT_TOKENS) of its share: tiles on the diagonal are half empty."""
SKINNY_SHARE = 0.6
"""Of the bandwidth, that products with an adapter's narrow matrices reach."""
BANDWIDTH_SHARE = 0.88
"""Of a maker's bandwidth, that a copy reaches; a measured bandwidth is a copy's already."""
KERNEL_SECONDS, OPERATION_SECONDS = 135e-6, 40e-6
"""What the host takes to launch a Triton kernel with its autograd node, and a library call with its
views and memory: fitted to the recipes that wait for it in five runs (docs/benchmarks). A core of
those hosts was up to 1.7 times slower for seconds on end; that is in these two numbers."""
HEAD_LAUNCHES, SCORED_LAUNCHES = (9, 93), (9, 19)
"""Kernels and library calls of a micro-batch outside its layers (embedding, angles, head, loss):
forward and backward, and of a forward pass without gradient."""
PLAIN_SHARE = 0.6
"""Of the host's time for a launch, what one without autograd takes (prefills of a 7B in NF4)."""
STEP_SECONDS = 0.02
"""What the host takes for a step's packing, clipping and reading of metrics."""
DECODE_LAYER_SECONDS, DECODE_ROW_SECONDS = 29e-6, 1.2e-6
"""Starts of kernels in a captured decode step, and what a row costs in sampling and the host."""
CHAIN_ROWS, CHAIN_START_SECONDS, CHAIN_LAYER_SECONDS = 8, 12e-6, 36e-6
"""On Hopper cards launches overlap where so few rows go through 16-bit weights without adapter: a
layer's starts cost less, and a layer takes at least so long."""
DECODE_SHARE = 0.94
"""Of a copy's bandwidth, that products of a few rows reach."""
NF4_BYTES = 0.5159
"""Of a four-bit weight with its share of the scales."""
NF4_CYCLES = {90: (3.8, 0.058), 0: (6.5, 0.11)}
"""By architecture (0: all others): cycles of an integer lane that a fused product takes to decode
a weight, and more by row: measured on an H200, which has the kernels of all others too, and for 90
fitted to whole rollouts."""
DECODE_ADAPTED_SECONDS = 5.5e-6
"""What an adapter adds to a decode step, a linear layer."""
PREFILL_SHARE = 0.75
"""Of the tensor peak, that prefill's products reach."""
BUS_BYTES_PER_SECOND = 25e9
"""Pinned host memory and back, PCIe 4 (55e9 on the H200's host)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seconds:
    """Of one step: prompts read, completions written, weights updated."""

    prefill: float
    decode: float
    training: float

    @property
    def total(self) -> float:
        """All three; rewards are not known here."""
        return self.prefill + self.decode + self.training


def step_seconds(
    job: Job, settings: Settings, card: Card, batches: Sequence[MicroBatch]
) -> Seconds:
    """Seconds of a step whose completions have full length."""
    prefill = decode = 0.0
    if job.samples:
        prefill = prefill_seconds(job.policy, job.work, card)
        decode = decode_seconds(job.policy, job.work, settings, card)
    return Seconds(
        prefill=prefill, decode=decode, training=training_seconds(job, settings, card, batches)
    )


def training_seconds(
    job: Job, settings: Settings, card: Card, batches: Sequence[MicroBatch]
) -> float:
    """Seconds of a step's updates."""
    policy = job.policy
    forward = sum(_pass_seconds(policy, card, batch) for batch in batches)
    both = sum(_update_seconds(policy, settings, card, batch) for batch in batches)
    total = STEP_SECONDS + both + _optimizer_seconds(policy, card)
    if job.reference != "none":
        total += forward
    passes = job.passes
    if job.critic is None:
        total += (passes - 1) * both
        total += (passes * job.mini_steps - 1) * _optimizer_seconds(policy, card)
    else:
        critic = job.critic
        value = sum(_update_seconds(critic, settings, card, b, with_head=False) for b in batches)
        total += forward  # log-probabilities before the first of several updates
        total += sum(_pass_seconds(critic, card, batch, with_head=False) for batch in batches)
        total += (passes - 1) * both + passes * value
        total += (passes * job.mini_steps - 1) * _optimizer_seconds(policy, card)
        total += passes * job.mini_steps * _optimizer_seconds(critic, card)
    return total


def _update_seconds(
    model: Trained, settings: Settings, card: Card, batch: MicroBatch, *, with_head: bool = True
) -> float:
    """Forward and backward pass of a micro-batch."""
    config, rows = model.config, batch.rows
    recomputes = settings.checkpointing != "none"
    down = config.num_layers * config.ffn_width * config.width
    linear = model.num_linear * (3 if model.is_full else 2) + (
        model.num_linear - (0 if model.is_full else down) if recomputes else 0
    )
    device = 2.0 * linear * rows / (card.flops * MATMUL_SHARE)
    if model.is_quantised:
        passes = 3 if recomputes else 2
        device += passes * model.num_linear * (NF4_BYTES + 2) / _bandwidth(card)
    attention = _attention_work(model, batch)
    forwards = 2 if settings.checkpointing == "layers" else 1
    device += forwards * attention / (card.flops * ATTENTION_FORWARD_SHARE)
    device += 2.5 * attention / (card.flops * ATTENTION_BACKWARD_SHARE)
    device += rows * config.num_layers * _elementwise_bytes(model, recomputes) / _bandwidth(card)
    if with_head:
        times = 8 if model.is_full else 4
        head = times * config.width * config.vocab_size * batch.loss_rows
        device += head / (card.flops * HEAD_SHARE)
    if model.is_full:
        device += model.num_linear * (12 if model.item == 2 else 8) / _bandwidth(card)
    if settings.offload and recomputes:
        a_row = config.width
        if settings.checkpointing == "selective":
            a_row += config.num_heads * config.head_size
        kept = rows * config.num_layers * a_row * model.item
        device = max(1.02 * device, 2 * kept / BUS_BYTES_PER_SECOND)
    host = _host_seconds(config.num_layers, launches(model, recomputes), HEAD_LAUNCHES)
    return max(device, host)


def launches(model: Trained, recomputes: bool) -> tuple[float, float]:
    """Triton kernels and library calls of a layer, forward and backward, as a test traces them.

    An adapted layer of several matrices has more of its own than one of a single matrix: the counts
    are means. A slice of a four-bit matrix takes a kernel, and each but the first a product too.
    """
    sizes = model.linears()
    adapted = sum(bool(size.adapted) for size in sizes.values())
    if model.is_full:
        kernels, operations = (21.0, 36.0) if recomputes else (16.0, 31.0)
    elif recomputes:
        kernels, operations = 19 + 2.25 * adapted, 16.5 + 5.6 * adapted
    else:
        kernels, operations = 14 + 1.75 * adapted, 12.5 + 4.6 * adapted
    if model.config.qk_norm:
        kernels += (8 if recomputes else 5) + (2 if model.is_full else 0)
        operations += 2
    for name, size in sizes.items():
        passes = 3 if recomputes and name != "down" else 2
        slices = _slices(size, model.item)
        kernels += passes * slices
        operations += passes * max(0, slices - 1)
    return kernels, operations


def _scored_launches(model: Trained) -> tuple[float, float]:
    """The same of a layer's forward pass without gradient."""
    sizes = model.linears().values()
    adapted = sum(bool(size.adapted) for size in sizes)
    slices = [_slices(size, model.item) for size in sizes]
    kernels = 5 + 0.75 * adapted + sum(slices) + (3 if model.config.qk_norm else 0)
    return kernels, 4.0 + adapted + sum(max(0, number - 1) for number in slices)


def _slices(size: LinearSize, item: int) -> int:
    """Slices in which a product decodes a four-bit matrix; 0 where there is nothing to decode."""
    return math.ceil(size.decoded(item) / SLICE_BYTES)


def _host_seconds(num_layers: int, layer: tuple[float, float], rest: tuple[float, float]) -> float:
    """What the host takes to launch a micro-batch; kernels and calls, a layer and besides."""
    kernels, operations = (num_layers * a + b for a, b in zip(layer, rest, strict=True))
    return kernels * KERNEL_SECONDS + operations * OPERATION_SECONDS


def _pass_seconds(
    model: Trained, card: Card, batch: MicroBatch, *, with_head: bool = True
) -> float:
    """A forward pass without gradient."""
    config = model.config
    device = 2.0 * model.num_linear * batch.rows / (card.flops * MATMUL_SHARE)
    if model.is_quantised:
        device += model.num_linear * (NF4_BYTES + 2) / _bandwidth(card)
    device += _attention_work(model, batch) / (card.flops * ATTENTION_FORWARD_SHARE)
    bytes_a_row = config.num_layers * _forward_bytes(model)
    device += batch.rows * bytes_a_row / _bandwidth(card)
    if with_head:
        head = 2 * config.width * config.vocab_size * batch.loss_rows
        device += head / (card.flops * HEAD_SHARE)
    host = _host_seconds(config.num_layers, _scored_launches(model), SCORED_LAUNCHES)
    return max(device, PLAIN_SHARE * host)


def _optimizer_seconds(model: Trained, card: Card) -> float:
    """Norm, clipping and AdamW: 38 bytes a number with a 16-bit copy."""
    numbers = sum(size for size, _ in trained_sizes(model))
    return numbers * 38 / _bandwidth(card)


def _attention_work(model: Trained, batch: MicroBatch) -> float:
    """FLOP of a forward pass, 4 H E for each query and key that meet, and what short tiles add."""
    config, pairs = model.config, 0.0
    completions = sum(samples for _, samples in batch.groups)
    own = batch.loss_rows / max(1, completions)
    for prompt, samples in batch.groups:
        met = prompt * prompt / 2 + samples * (prompt * own + own * own / 2)
        length = max(prompt, own if samples else 1.0)
        pairs += met * (1 + SHORT_TOKENS / length)
    return 4.0 * config.num_heads * config.head_size * config.num_layers * pairs


def _forward_bytes(model: Trained) -> float:
    """Bytes that a token moves through memory between the products of a layer."""
    config = model.config
    heads = (config.num_heads + config.num_kv_heads) * config.head_size
    moved = 18.0 * config.width + 4 * heads + 6 * config.ffn_width
    if config.qk_norm:
        moved += 4 * heads
    for size in model.linears().values():
        if size.adapted:
            moved += 4 * sum(size.adapted) + 2 * size.inputs / SKINNY_SHARE
    return moved * model.item / 2


def _elementwise_bytes(model: Trained, recomputes: bool) -> float:
    config = model.config
    heads = (config.num_heads + config.num_kv_heads) * config.head_size
    moved = 30.0 * config.width + 12 * heads + 10 * config.ffn_width
    for size in model.linears().values():
        if size.adapted:
            moved += 4 * size.inputs
            moved += (4 * sum(size.adapted) + 2 * size.inputs) / SKINNY_SHARE
    return moved * model.item / 2 + _forward_bytes(model) * (2 if recomputes else 1)


def prefill_seconds(model: Trained, work: Work, card: Card) -> float:
    """Every prompt once."""
    groups = ((work.prompt_tokens, 0),) * work.prompts
    rows = work.prompts * work.prompt_tokens
    batch = MicroBatch(rows=rows, loss_rows=work.prompts, groups=groups)
    return _pass_seconds(model, card, batch) * MATMUL_SHARE / PREFILL_SHARE


def decode_seconds(model: Trained, work: Work, settings: Settings, card: Card) -> float:
    """Every completion at full length, in as few rounds as the KV pool allows."""
    each = work.prompt_tokens / work.group_size + work.completion_tokens
    fits = int(settings.kv_bytes / (model.kv_bytes_per_token * each)) if settings.kv_bytes else 0
    running = min(settings.max_running, work.num_completions, fits or work.num_completions)
    running = max(1, running)
    rounds = work.num_completions / running
    return rounds * work.completion_tokens * _decode_step(model, work, running, settings, card)


def _decode_step(model: Trained, work: Work, rows: int, settings: Settings, card: Card) -> float:
    """One token for each of the rows: the slower of bytes and FLOP, product by product."""
    config, bandwidth = model.config, _bandwidth(card)
    linear = model.num_linear
    flops = 2.0 * linear * rows / (card.flops * MATMUL_SHARE)
    if not model.is_quantised or settings.caches_weights:
        products = max(linear * model.item / bandwidth, flops)
    else:
        a_weight, a_row = NF4_CYCLES.get(card.arch, NF4_CYCLES[0])
        by_instructions = linear * (a_weight + a_row * rows) / card.lanes
        fused = max(linear * NF4_BYTES / bandwidth, flops, by_instructions)
        decoded = linear * (NF4_BYTES + 2 + model.item) / bandwidth + flops
        products = min(fused, decoded)
    adapted = sum(bool(size.adapted) for size in model.linears().values())
    a_layer = DECODE_LAYER_SECONDS + adapted * DECODE_ADAPTED_SECONDS
    if card.arch == 90 and rows <= CHAIN_ROWS and not adapted and not model.is_quantised:
        a_product = products / config.num_layers / DECODE_SHARE
        a_layer = max(CHAIN_START_SECONDS, CHAIN_LAYER_SECONDS - a_product)
    head = config.vocab_size * config.width
    products += max(head * model.item / bandwidth, 2.0 * head * rows / (card.flops * MATMUL_SHARE))
    context = work.prompt_tokens + work.completion_tokens / 2
    attention = rows * context * model.kv_bytes_per_token / bandwidth
    logits = 2.0 * rows * config.vocab_size * 4 / bandwidth
    starts = config.num_layers * a_layer + rows * DECODE_ROW_SECONDS
    return (products + attention + logits) / DECODE_SHARE + starts


def _bandwidth(card: Card) -> float:
    """What kernels reach of it: a measured figure is a copy's already."""
    return card.bandwidth * (1.0 if card.is_measured else BANDWIDTH_SHARE)
