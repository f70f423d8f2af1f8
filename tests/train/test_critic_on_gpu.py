"""DPO and PPO on a GPU: every dtype runs and learns, and a resumed run is the same bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sparring import runlog
from sparring.train import dpo, ppo
from tests.train.test_ppo import ppo_recipe, weights
from tests.train.test_preferences import dpo_recipe
from tests.train.tiny_run import write_checkpoint, write_data

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with data, pairs and rewards."""
    folder = tmp_path_factory.mktemp("made")
    write_checkpoint(folder / "model")
    write_data(folder)
    rows = [{"prompt": f"Say {n}.", "chosen": f"{n}!", "rejected": f"No {n}."} for n in range(12)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_dpo_learns_in_every_dtype(
    folder: Path, tmp_path: Path, dtype: str, lora: dict[str, Any] | None
) -> None:
    changes: dict[str, Any] = {"lora": lora} if lora else {}
    recipe = dpo_recipe(
        folder,
        model={"dtype": dtype},
        run={"dir": str(tmp_path / "run")},
        train={"steps": 25},
        optimizer={"learning_rate": 0.01},
        **changes,
    )
    dpo.train(recipe)
    steps = [record.metrics for record in runlog.read_steps(tmp_path / "run")]
    assert steps[0]["policy_loss"] == pytest.approx(0.6931, abs=1e-3)
    assert steps[-1]["policy_loss"] is not None
    assert steps[-1]["policy_loss"] < 0.4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("path", ["", "model"])
@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_ppo_resumes_in_every_dtype(
    folder: Path, tmp_path: Path, dtype: str, path: str, lora: dict[str, Any] | None
) -> None:
    changes: dict[str, Any] = {
        "model": {"dtype": dtype},
        "advantage": {"kl_coef": 0.05},
        "value": {"path": str(folder / path) if path else "", "rank": 0 if path else 4},
    }
    changes |= {"lora": lora} if lora else {}
    one, two = {"dir": str(tmp_path / "one")}, {"dir": str(tmp_path / "two")}
    ppo.train(ppo_recipe(folder, run=one, **changes))
    ppo.train(ppo_recipe(folder, run=two, train={"steps": 2}, **changes))
    ppo.train(ppo_recipe(folder, run=two, **changes), resume=True)
    first, second = weights(tmp_path, "one"), weights(tmp_path, "two")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(name.endswith("value_head.weight") and t.any() for name, t in first.items())
    limit = 1e-3 if dtype == "float32" else 0.05
    for record in runlog.read_steps(tmp_path / "one"):
        mismatch = record.metrics["mismatch_mean"]
        assert mismatch is not None
        assert mismatch < limit
    (file,) = (tmp_path / "one" / "final").glob("*.safetensors")
    assert not any("value" in name for name in load_file(file)), "the critic stays behind"
