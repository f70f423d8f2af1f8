"""How far the trainer's log-probabilities are from the sampler's, and where the two part.

    python -m benchmarks.mismatch OUTPUT.json [CASE ...] [--models FOLDER]
    python -m benchmarks.mismatch OUTPUT.json --tiny       that it runs, on a CPU

A case is a model in bfloat16: a checkpoint in FOLDER (TinyStories-656K, stories260K) or a real
shape with random weights. Its engine samples a group for each of four prompts at temperature 1;
then the same tokens go through

    the trainer       packed, prompts shared, as `Decoder.score` computes them
    decoding          token by token over blocks, eagerly, as the engine's steps compute them
    bitwise trainer   packed, sums in the fixed orders of bitwise mode: how far the trainer is from
                      it is what another order of sums alone costs
    exact             the same weights in float32, no rounding between layers

For each pair: mean |difference| of log-probabilities and the divergence (mean of e^d - 1 - d). For
each layer: the relative distance of the residual stream after it (difference's norm over norm), and
the share of numbers that differ in the qkv projection, what attention adds, and what the
feed-forward adds, decoding against the trainer. A bfloat16's last place is 0.004 to 0.008 of it.

`products` measures the library's own products of few rows against one rounding of the exact sum,
with and without sums of pieces in 16 bits (torch's allow_bf16_reduced_precision_reduction).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import sparring
from benchmarks.shapes import SHAPES, build
from sparring.kernels.norm import add_rms_norm, rms_norm
from sparring.layout import DecodeLayout, KVPool, Layout, PackedLayout, PagedLayout
from sparring.models.linear import Dense
from sparring.models.quantised import cache_weights, uncache_weights
from sparring.models.transformer import Decoder, DecoderLayer, new_kv_pool
from sparring.rollout.engine import Engine
from sparring.rollout.sampler import Sampling
from sparring.types import Prompt

BEGINNINGS = ("Once upon a time", "Lily and Tom went to", "The little dog was", "One day, a girl")
BLOCK = 64


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, and how many tokens go through it.

    sums_in_16_bits: the library may add pieces of a product rounded to bfloat16, as it does unless
    it is told not to.
    """

    checkpoint: str = ""
    shape: str = ""
    num_layers: int = 4
    quantization: str = "none"
    lora_rank: int = 0
    is_cached: bool = False
    sums_in_16_bits: bool = True
    prompt_tokens: int = 40
    samples: int = 8
    tokens: int = 128


LARGE = "qwen2.5-7b"
CASES = {
    "TinyStories-656K": Case(checkpoint="TinyStories-656K"),
    "stories260K": Case(checkpoint="stories260K"),
    "7b-shaped bf16": Case(shape=LARGE, tokens=64),
    "7b-shaped bf16 sums in 32 bits": Case(shape=LARGE, tokens=64, sums_in_16_bits=False),
    "7b-shaped bf16 lora": Case(shape=LARGE, tokens=64, lora_rank=16),
    "7b-shaped nf4": Case(shape=LARGE, tokens=64, quantization="nf4"),
    "7b-shaped nf4 lora": Case(shape=LARGE, tokens=64, quantization="nf4", lora_rank=16),
    "7b-shaped nf4 cached lora": Case(
        shape=LARGE, tokens=64, quantization="nf4", lora_rank=16, is_cached=True
    ),
}
TINY = {"tiny": Case(shape="tiny", num_layers=2, lora_rank=4, samples=2, tokens=9, prompt_tokens=5)}
Seen = dict[str, list[Tensor]]


def model_of(case: Case, models: Path, device: str) -> tuple[Decoder, list[Prompt]]:
    """The case's model and four prompts for it."""
    if case.checkpoint:
        model, tokenizer = sparring.load(
            str(models / case.checkpoint), dtype="bfloat16", device=device
        )
        ids = [tuple(tokenizer(text)["input_ids"]) for text in BEGINNINGS]
    else:
        config = SHAPES[case.shape] | {"num_hidden_layers": case.num_layers}
        model = build(
            config, quantization=case.quantization, lora_rank=case.lora_rank, device=device
        )
        generator = torch.Generator().manual_seed(3)
        sizes = [case.prompt_tokens - i for i in range(4)]
        ids = [
            tuple(torch.randint(config["vocab_size"], (n,), generator=generator).tolist())
            for n in sizes
        ]
    model.requires_grad_(False)
    return model, [Prompt(id=i, token_ids=row, text="") for i, row in enumerate(ids)]


def exact_of(model: Decoder) -> Decoder:
    """The same weights in float32, adapters added to them."""
    exact = Decoder(model.config, device=model.device, dtype=torch.float32)
    for name, parameter in exact.named_parameters():
        if not name.endswith("base.weight"):
            parameter.data.copy_(model.get_parameter(name))
    for path, linear in model.linears().items():
        weight = linear.base.dense().float()
        lora = linear.adapter("policy")
        if lora is not None and lora.a_shadow is not None and lora.b_shadow is not None:
            a, b = lora.a_shadow.float(), lora.b_shadow.float()
            for part in lora.parts.values():
                weight[part.output_rows] += lora.scale * (b[part.b_rows] @ a[part.ranks])
        exact.get_submodule(path).base.weight.data.copy_(weight)
    return exact.requires_grad_(False)


def through(
    model: Decoder, ids: Tensor, positions: Tensor, layout: Layout, pool: KVPool | None
) -> Seen:
    """`Decoder.infer` with what each layer computes kept: a list a place, one entry a layer."""
    plan = model.plan(layout, pool, "policy")
    cos, sin = model.angles(positions)
    x, eps = model.embed.rows(ids), model.config.norm_eps
    seen: Seen = {"qkv": [], "attention": [], "mlp": [], "stream": []}
    added: Tensor | None = None
    for layer in model.layers:
        assert isinstance(layer, DecoderLayer), "layers are DecoderLayers"
        if added is None:
            normed = rms_norm(x, layer.attention_norm, eps)
        else:
            normed, x = add_rms_norm(added, x, layer.attention_norm, eps)
            seen["stream"].append(x)
        seen["qkv"].append(layer.qkv(normed, "policy"))
        added = layer.attention(normed, cos, sin, plan, "policy")
        seen["attention"].append(added)
        normed, x = add_rms_norm(added, x, layer.mlp_norm, eps)
        added = layer.mlp(normed, "policy")
        seen["mlp"].append(added)
    assert added is not None, "a decoder has a layer"
    final, x = add_rms_norm(added, x, model.norm, eps)
    seen["stream"].append(x)
    seen["logits"] = [model.logits(final)]
    return seen


def packed(model: Decoder, prompts: list[Prompt], samples_RN: Tensor) -> Seen:
    """The trainer's: a row of each entry is a completion token but the last, row by row."""
    per = len(samples_RN) // len(prompts)
    ids: list[int] = []
    positions: list[int] = []
    cu_seqlens, parents, kept = [0], [], []
    for index, prompt in enumerate(prompts):
        parent = len(parents)
        pieces = [prompt.token_ids, *samples_RN[index * per : (index + 1) * per, :-1].tolist()]
        for number, piece in enumerate(pieces):
            first = len(prompt.token_ids) if number else 0
            if number:
                kept += range(len(ids), len(ids) + len(piece))
            ids += piece
            positions += range(first, first + len(piece))
            parents.append(parent if number else -1)
            cu_seqlens.append(len(ids))
    layout = PackedLayout(cu_seqlens=tuple(cu_seqlens), parents=tuple(parents))
    device = model.device
    seen = through(
        model,
        torch.tensor(ids, device=device),
        torch.tensor(positions, device=device),
        layout,
        None,
    )
    rows = torch.tensor(kept, device=device)
    return {name: [x[rows] for x in entries] for name, entries in seen.items()}


def decoded(model: Decoder, prompts: list[Prompt], samples_RN: Tensor) -> Seen:
    """The same rows from prefill and single steps over blocks."""
    per, device = len(samples_RN) // len(prompts), model.device
    owners = [prompt for prompt in prompts for _ in range(per)]
    lengths = [len(prompt.token_ids) for prompt in owners]
    longest = max(lengths) + samples_RN.shape[1]
    width = -(-longest // BLOCK)
    pool = new_kv_pool(model.config, 1 + width * len(owners), BLOCK, model.dtype, model.device)
    tables = 1 + torch.arange(len(owners) * width, device=device).view(-1, width)
    starts = torch.tensor([0, *lengths], device=device).cumsum(0)
    positions = torch.cat([torch.arange(n, device=device) for n in lengths])
    rows = torch.arange(len(owners), device=device).repeat_interleave(starts.diff())
    layout = PagedLayout(
        cu_seqlens=tuple(starts.tolist()), kv_lengths=tuple(lengths),
        kv_lengths_R=torch.tensor(lengths, device=device), block_tables_RN=tables,
        slots_T=tables[rows, positions // BLOCK] * BLOCK + positions % BLOCK, block_size=BLOCK,
    )  # fmt: skip
    ids = torch.tensor([token for prompt in owners for token in prompt.token_ids], device=device)
    through(model, ids, positions, layout, pool)
    steps: list[Seen] = []
    every = torch.arange(len(owners), device=device)
    for step in range(samples_RN.shape[1] - 1):
        at = torch.tensor(lengths, device=device) + step
        one = DecodeLayout(
            kv_lengths_R=(at + 1).int(), block_tables_RN=tables.int(),
            slots_R=tables[every, at // BLOCK] * BLOCK + at % BLOCK, block_size=BLOCK,
            max_kv_length=longest,
        )  # fmt: skip
        steps.append(through(model, samples_RN[:, step].to(device), at, one, pool))
    return {
        name: [
            torch.stack([step[name][i] for step in steps], 1).flatten(0, 1)
            for i in range(len(entries))
        ]
        for name, entries in steps[0].items()
    }


def far(one: Tensor, other: Tensor) -> dict[str, float]:
    """Two lists of log-probabilities."""
    gap = (one - other).double()
    return {
        "mean": gap.abs().mean().item(),
        "kl": (gap.exp() - 1 - gap).mean().item(),
        "max": gap.abs().max().item(),
    }


def relative(one: list[Tensor], other: list[Tensor]) -> list[float]:
    return [
        ((a.float() - b.float()).norm() / b.float().norm()).item()
        for a, b in zip(one, other, strict=True)
    ]


def differing(one: list[Tensor], other: list[Tensor]) -> list[float]:
    return [(a != b).float().mean().item() for a, b in zip(one, other, strict=True)]


@torch.no_grad()
def measure(case: Case, models: Path, device: str) -> dict[str, Any]:
    """One case's figures."""
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = case.sums_in_16_bits
    model, prompts = model_of(case, models, device)
    engine = Engine(
        model, kv_bytes=1 << 29 if device == "cuda" else 1 << 24, stop_ids=(),
        decode=lambda _: "", max_tokens=case.prompt_tokens + case.tokens,
        caches_weights=case.is_cached,
    )  # fmt: skip
    rollouts = engine.generate(
        prompts, Sampling(max_completion_tokens=case.tokens), num_samples=case.samples
    )
    flat = [one for group in rollouts for one in group]
    samples_RN = torch.stack([torch.as_tensor(one.token_ids) for one in flat])
    sampled = torch.stack([torch.as_tensor(one.logprobs) for one in flat])[:, 1:].flatten()
    engine.sleep()
    if case.is_cached:
        cache_weights(model)
    steps = decoded(model, prompts, samples_RN)
    uncache_weights(model)
    trainer = packed(model, prompts, samples_RN)
    labels = samples_RN[:, 1:].flatten().to(model.device)

    def logprobs(seen: Seen) -> Tensor:
        scores = seen["logits"][0].double().log_softmax(-1)
        return scores.gather(1, labels[:, None])[:, 0].cpu()

    t, s = logprobs(trainer), logprobs(steps)
    exact_seen = packed(exact_of(model), prompts, samples_RN)
    e = logprobs(exact_seen)
    out: dict[str, Any] = {
        "tokens": len(labels),
        "trainer - sampler": far(t, sampled),
        "trainer - decoding": far(t, s),
        "decoding - sampler": far(s, sampled),
        "trainer - exact": far(t, e),
        "decoding - exact": far(s, e),
        "stream, decoding - trainer": relative(steps["stream"], trainer["stream"]),
        "stream, trainer - exact": relative(trainer["stream"], exact_seen["stream"]),
    }
    for place in ("qkv", "attention", "mlp"):
        out[f"{place} numbers that differ"] = differing(steps[place], trainer[place])
    if device == "cuda":
        model.set_bitwise(True)
        fixed = packed(model, prompts, samples_RN)
        out["trainer - bitwise trainer"] = far(t, logprobs(fixed))
        out["stream, bitwise - trainer"] = relative(fixed["stream"], trainer["stream"])
        model.set_bitwise(False)
    return out


@torch.no_grad()
def products() -> dict[str, Any]:
    """Few rows through the 7B's matrices by the library: share of numbers off, microseconds."""
    found: dict[str, Any] = {}
    sizes = {
        "qkv": (4608, 3584),
        "o": (3584, 3584),
        "gate_up": (37888, 3584),
        "down": (3584, 18944),
    }
    for name, (num_outputs, num_inputs) in sizes.items():
        copies = max(2, (1 << 28) // (2 * num_outputs * num_inputs))
        layers = [
            Dense(num_outputs, num_inputs, device=torch.device("cuda"), dtype=torch.bfloat16)
            for _ in range(copies)
        ]
        for layer in layers:
            layer.weight.data.normal_(0.0, 0.02)
        for rows in (8, 32, 128, 256):
            x = torch.randn(rows, num_inputs, device="cuda").bfloat16()
            exact = (x.double() @ layers[0].weight.double().T).bfloat16()
            for reduces in (True, False):
                torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = reduces
                got = F.linear(x, layers[0].weight)
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                for layer in layers:
                    F.linear(x, layer.weight)
                start.record()
                for _ in range(3):
                    for layer in layers:
                        F.linear(x, layer.weight)
                stop.record()
                torch.cuda.synchronize()
                found[f"{name} {rows} rows, pieces in {16 if reduces else 32} bits"] = {
                    "off": (got != exact).float().mean().item(),
                    "us": 1e3 * start.elapsed_time(stop) / (3 * copies),
                }
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    return found


def told(name: str, found: dict[str, Any]) -> None:
    """Prints a case."""
    print(name)
    for key, value in found.items():
        if isinstance(value, dict):
            text = ", ".join(f"{k} {v:.3g}" for k, v in value.items())
        elif isinstance(value, list):
            text = " ".join(f"{v:.1e}" for v in value)
        else:
            text = str(value)
        print(f"  {key}: {text}")


def main() -> None:
    """Each case in a process of its own, all at once; then the products, alone."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("cases", nargs="*")
    parser.add_argument("--models", type=Path, default=Path("shared/models"))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--one", action="store_true", help="this process measures the one case")
    given = parser.parse_args()
    cases = TINY if given.tiny else CASES
    device = "cuda" if torch.cuda.is_available() and not given.tiny else "cpu"
    if given.one:
        (name,) = given.cases
        found = products() if name == "products" else measure(cases[name], given.models, device)
        given.output.write_text(json.dumps(found))
        return
    record: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    together = given.cases or [*cases]
    alone = ["products"] if device == "cuda" and not given.cases else []
    for names in (together, alone):
        running = []
        for name in names:
            part = given.output.with_suffix(f".{name.replace(' ', '-')}.part")
            command = [sys.executable, "-m", "benchmarks.mismatch", str(part), name, "--one"]
            command += ["--models", str(given.models), *(["--tiny"] if given.tiny else [])]
            running.append((name, part, subprocess.Popen(command)))
        for name, part, process in running:
            if process.wait():
                record[name] = {"failed": f"exit status {process.returncode}"}
            else:
                record[name] = json.loads(part.read_text())
                part.unlink()
            told(name, record[name])
        given.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
