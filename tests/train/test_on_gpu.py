"""The same house on a GPU: scores, rollouts and whole runs agree with the CPU's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import sparring
from sparring import runlog
from sparring.errors import MemoryBudgetError
from sparring.kernels import capability_for, kept
from sparring.models import quantised
from sparring.models.attention_paged_kernel import PagedKernelPlan
from sparring.models.attention_shared import KernelPlan
from sparring.recipe import build_recipe, load_recipe
from sparring.train import grpo, sft
from sparring.train.measure import measure
from tests.train.tiny_run import grpo_recipe, sft_recipe, write_checkpoint, write_data

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with data and rewards."""
    folder = tmp_path_factory.mktemp("made")
    write_checkpoint(folder / "model")
    write_data(folder)
    return folder


def test_scores_agree_with_the_cpu(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(0, 256, (n,), generator=generator).tolist() for n in (1, 2, 17, 100)]
    scores = {}
    for device in ("cpu", "cuda"):
        model, _ = sparring.load(str(folder / "model"), dtype="float32", device=device)
        scores[device] = sparring.score(model, sequences, temperature=0.7)
    for cpu, gpu in zip(scores["cpu"], scores["cuda"], strict=True):
        assert torch.allclose(cpu, gpu, atol=1e-4)


def test_rollouts_agree_with_the_cpu(folder: Path) -> None:
    texts = {}
    for device in ("cpu", "cuda"):
        model, tokenizer = sparring.load(str(folder / "model"), dtype="float32", device=device)
        rollouts = sparring.generate(
            model,
            tokenizer,
            ["One", "Two and more"],
            num_samples=4,
            max_completion_tokens=40,
            seed=3,
        )
        texts[device] = [rollout.token_ids.tolist() for group in rollouts for rollout in group]
    same = sum(a == b for a, b in zip(texts["cpu"], texts["cuda"], strict=True))
    assert same >= 7, "the noise is the same integers, so tokens differ at near-ties alone"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_grpo_runs_in_every_dtype(
    folder: Path, tmp_path: Path, dtype: str, lora: dict[str, Any] | None
) -> None:
    changes: dict[str, Any] = {
        "model": {"dtype": dtype},
        "run": {"dir": str(tmp_path / "run")},
        "loss": {"kl_coef": 0.01},
    }
    grpo.train(grpo_recipe(folder, **changes, **({"lora": lora} if lora else {})))
    steps = [record.metrics for record in runlog.read_steps(tmp_path / "run")]
    limit = 1e-3 if dtype == "float32" else 0.05
    found = [step["mismatch_mean"] for step in steps if "mismatch_mean" in step]
    assert found
    assert max(value for value in found if value is not None) < limit


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_grpo_as_a_t4_computes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantization: str
) -> None:
    """Library products and attention, decoding without dots, float16 with a loss scale."""

    def refused(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a kernel with dots is used")

    monkeypatch.setattr(KernelPlan, "__init__", refused)
    monkeypatch.setattr(PagedKernelPlan, "__init__", refused)
    monkeypatch.setattr(quantised, "nf4_matmul", refused)
    write_checkpoint(tmp_path / "model", width=64)
    changes: dict[str, Any] = {
        "model": {
            "path": str(tmp_path / "model"),
            "dtype": "float16",
            "quantization": quantization,
        },
        "run": {"dir": str(tmp_path / "run")},
        "lora": {"rank": 4},
        "loss": {"kl_coef": 0.01},  # so that every group is trained on
    }
    grpo.train(grpo_recipe(folder, **changes), capability=capability_for(75))
    steps = [record.metrics for record in runlog.read_steps(tmp_path / "run")]
    assert len(steps) == 4
    assert all(step["mismatch_mean"] < 0.02 for step in steps)


def test_sft_learns_in_bfloat16(folder: Path, tmp_path: Path) -> None:
    changes = {"model": {"dtype": "bfloat16"}, "run": {"dir": str(tmp_path / "run")}}
    sft.train(sft_recipe(folder, train={"steps": 60}, **changes))
    losses = [record.metrics["loss"] for record in runlog.read_steps(tmp_path / "run")]
    assert losses[-1] < 0.4 * losses[0]


def test_resume_is_bitwise_on_a_gpu(folder: Path, tmp_path: Path) -> None:
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    grpo.train(grpo_recipe(folder, run={"dir": one}, lora={"rank": 4}))
    grpo.train(grpo_recipe(folder, run={"dir": two}, lora={"rank": 4}, train={"steps": 2}))
    grpo.train(grpo_recipe(folder, run={"dir": two}, lora={"rank": 4}), resume=True)
    from safetensors.torch import load_file

    name = "final/adapter_model.safetensors"
    first, second = load_file(Path(one) / name), load_file(Path(two) / name)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("cuda_graphs", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_grpo_with_a_head_of_8_bits_and_the_embedding_on_the_host(
    folder: Path, tmp_path: Path, tied: bool, cuda_graphs: bool
) -> None:
    """Trainer and sampler read the same table, and graphs read rows of host memory."""
    write_checkpoint(tmp_path / "model", width=64, tied=tied)
    changes: dict[str, Any] = {
        "model": {
            "path": str(tmp_path / "model"),
            "dtype": "bfloat16",
            "quantization": "nf4",
            "keep_16bit": ["down_proj"],
            "head": "8bit",
            "embedding": "device" if tied else "host",
        },
        "rollout": {"cuda_graphs": cuda_graphs},
        "run": {"dir": str(tmp_path / "run")},
        "loss": {"kl_coef": 0.01},
        "lora": {"rank": 4},
    }
    grpo.train(grpo_recipe(folder, **changes))
    steps = [record.metrics for record in runlog.read_steps(tmp_path / "run")]
    assert len(steps) == 4
    assert all(step["mismatch_mean"] < 0.05 for step in steps)


def test_what_only_samples_keeps_to_a_budget(folder: Path) -> None:
    tables = {
        "model": {"path": str(folder / "model"), "dtype": "bfloat16"},
        "data": {"eval": str(folder / "prompts.jsonl")},
        "reward": [{"name": f"{folder}/rewards.py:many_e"}],
        "rollout": {"max_completion_tokens": 12},
        "run": {"memory": "2GiB"},
    }
    try:
        report = measure(build_recipe(tables, command="eval"), say=print)
        assert report.measured.evaluation.n == 12
        model, tokenizer = sparring.load(
            str(folder / "model"), dtype="bfloat16", device="cuda", adapter=None
        )
        asked = {"num_samples": 3, "max_completion_tokens": 20}
        wide = sparring.generate(model, tokenizer, ["One", "Two"], **asked)
        held = sparring.generate(model, tokenizer, ["One", "Two"], memory=2 << 30, **asked)
        for one, other in zip(wide, held, strict=True):
            assert [r.token_ids.tolist() for r in one] == [r.token_ids.tolist() for r in other]
        with pytest.raises(MemoryBudgetError, match="left for keys and values"):
            sparring.generate(model, tokenizer, ["One"], memory=1 << 30)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_recipe_in_bitwise_mode_writes_as_the_default_does(tmp_path: Path) -> None:
    """Its evaluation has more rows at once than a step of training, and comes first."""
    rewards = {}
    for make in kept.MAKERS:
        make.cache_clear()
    for is_bitwise in (False, True):
        directory = tmp_path / str(is_bitwise)
        overrides = ["--model.dtype", "bfloat16", "--run.bitwise", str(is_bitwise).lower()]
        overrides += ["--run.dir", str(directory), "--train.steps", "3", "--eval.limit", "600"]
        grpo.train(load_recipe("quickstart", overrides, command="grpo"))
        steps = [record.metrics for record in runlog.read_steps(directory)]
        rewards[is_bitwise] = [step["reward"] for step in steps]
        largest = [step["mismatch_max"] for step in steps if "mismatch_max" in step]
        assert largest
        assert not is_bitwise or not any(largest), "the trainer's bits are the sampler's"
    assert min(rewards[False]) > 0.3
    for one, other in zip(rewards[False], rewards[True], strict=True):
        assert abs(one - other) < 0.15, rewards
