"""The same models on a GPU: the numbers of the CPU in every dtype, packed, paged and adapted."""

from __future__ import annotations

import pytest
import torch

from sparring.layout import PackedLayout
from sparring.models.checkpoint import build_model
from sparring.models.lora import LoraConfig
from sparring.models.transformer import Decoder, new_kv_pool
from sparring.types import Batch
from tests.models.tiny import CONFIGS, PagedRows, batch_of, offsets, random_ids

pytestmark = pytest.mark.gpu

BIG = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "head_dim": 32}


def twins(name: str, dtype: torch.dtype, *, lora: bool = False) -> tuple[Decoder, Decoder]:
    """A model in float32 on the CPU and its copy in `dtype` on the GPU."""
    models = []
    for device, kind in (("cpu", torch.float32), ("cuda", dtype)):
        model = build_model({**CONFIGS[name], **BIG}, device=device, dtype=kind)
        model.init_weights(0)
        if lora:
            model.add_adapter(LoraConfig(rank=8))
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for parameter in model.trainable_parameters().values():
                    values = torch.empty(parameter.shape).normal_(0, 0.05, generator=generator)
                    parameter.copy_(values)
            model.refresh_shadows()
        models.append(model)
    return models[0], models[1]


def on_gpu(batch: Batch) -> Batch:
    fields = {name: getattr(batch, name) for name in batch.__dataclass_fields__}
    moved = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in fields.items()}
    return Batch(**moved)


def groups() -> Batch:
    prompts = random_ids((30, 1, 200), 97)
    completions = [random_ids((5, 64, 130, 17), 97, seed=seed) for seed in range(3)]
    return batch_of(prompts, completions, share=True, temperature=0.9)


TOLERANCES = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", ["qwen2", "mistral_window", "qwen3"])
def test_scores_and_gradients_are_those_of_the_cpu(name: str, lora: bool, dtype: torch.dtype):
    torch.backends.cuda.matmul.allow_tf32 = False
    cpu, gpu = twins(name, dtype, lora=lora)
    batch = groups()
    ours, theirs = gpu.score(on_gpu(batch)), cpu.score(batch)
    assert ours.logprobs_T.dtype == torch.float32
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(ours.logprobs_T.cpu(), theirs.logprobs_T, atol=tolerance, rtol=0)
    torch.testing.assert_close(ours.entropy_T.cpu(), theirs.entropy_T, atol=tolerance, rtol=0)
    for model, scores in ((gpu, ours), (cpu, theirs)):
        weights = torch.linspace(-1, 1, len(scores.logprobs_T), device=model.device)
        (scores.logprobs_T * weights).sum().backward()
    expected = {name: p.grad for name, p in cpu.trainable_parameters().items()}
    for name, parameter in gpu.trainable_parameters().items():
        gradient = parameter.grad
        assert gradient is not None
        assert gradient.dtype == (torch.float32 if lora else dtype)
        error = (gradient.float().cpu() - expected[name]).norm() / expected[name].norm()
        assert error < 10 * tolerance, (name, error.item())


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", ["qwen2", "mistral_window", "qwen3"])
def test_a_shared_prompt_is_as_exact_as_one_that_is_repeated(name: str, lora: bool):
    """bfloat16 against float64 of the same weights: errors at most 1.2 times as large."""
    _, model = twins(name, torch.bfloat16, lora=lora)
    exact = build_model({**CONFIGS[name], **BIG}, device="cpu", dtype=torch.float64)
    if lora:
        exact.add_adapter(LoraConfig(rank=8))
    with torch.no_grad():
        for one, other in zip(exact.parameters(), model.parameters(), strict=True):
            one.copy_(other.bfloat16())
    prompts = random_ids((30, 1, 200), 97)
    completions = [random_ids((5, 64, 130, 17), 97, seed=seed) for seed in range(3)]
    errors: dict[bool, dict[str, float]] = {}
    for share in (True, False):
        batch = batch_of(prompts, completions, share=share)
        found: list[dict[str, torch.Tensor]] = []
        for each, made in ((exact, batch), (model, on_gpu(batch))):
            each.zero_grad()
            scores = each.score(made).logprobs_T[made.loss_mask_T]
            weights = torch.linspace(-1, 1, len(scores), device=each.device)
            (scores * weights).sum().backward()
            parameters = each.trainable_parameters()
            vectors = [p.grad.flatten() for p in parameters.values() if p.ndim == 1]
            gradients = {key: p.grad for key, p in parameters.items() if p.ndim > 1}
            if vectors:  # norms and biases: each by itself is too short for a ratio of errors
                gradients["all vectors"] = torch.cat(vectors)
            found.append({"scores": scores.detach(), **gradients})
        want, got = found
        errors[share] = {
            key: float((got[key].double().cpu() - value).norm() / value.norm())
            for key, value in want.items()
        }
    for key, together in errors[True].items():
        assert together <= 1.2 * errors[False][key], (key, together, errors[False][key])


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_generation_over_blocks_gives_the_packed_numbers(dtype: torch.dtype):
    _, gpu = twins("qwen3", dtype)
    sequences = random_ids((40, 1, 17, 90), 97)
    lengths = [len(ids) for ids in sequences]
    layout = PackedLayout(cu_seqlens=offsets(lengths), parents=(-1,) * 4)
    positions = torch.cat([torch.arange(n) for n in lengths]).cuda()
    with torch.no_grad():
        packed = gpu.logits(gpu(torch.cat(sequences).cuda(), positions, layout)).split(lengths)
    rows = PagedRows(gpu, sequences, 16)
    for step in ([(0, 0, 30), (2, 0, 16), (3, 0, 50)], [(0, 30, 39), (1, 0, 1), (3, 50, 89)]):
        rows.step(step)
    for row, logits in zip(
        (0, 2, 3), rows.step([(0, 39, 40), (2, 16, 17), (3, 89, 90)]), strict=True
    ):
        expected = packed[row][-1:]
        torch.testing.assert_close(
            logits.log_softmax(-1), expected.log_softmax(-1), atol=TOLERANCES[dtype], rtol=0
        )


def test_scoring_a_large_vocabulary_keeps_few_logits():
    config = {**CONFIGS["qwen2"], **BIG, "vocab_size": 150_000, "num_hidden_layers": 1}
    model = build_model(config, device="cuda", dtype=torch.bfloat16)
    model.init_weights(0)
    model.add_adapter(LoraConfig(rank=8))
    batch = on_gpu(batch_of(random_ids((9,), 97), [random_ids((4000, 4000), 97)], share=True))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model.score(batch).logprobs_T.sum().backward()
    taken = torch.cuda.max_memory_allocated() - before
    assert taken < 1.6e9, taken  # all logits in float32 would be 4.8e9 bytes
    pool = new_kv_pool(model.config, 4, 16, torch.bfloat16, model.device)
    assert pool.data.is_cuda
