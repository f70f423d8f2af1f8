"""Checkpoints: bit-for-bit continuation, atomic writing, pruning, damage and full disks."""

from __future__ import annotations

import errno
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparring.algorithms.registry import build_loss
from sparring.errors import CheckpointError, RunError
from sparring.models.transformer import Decoder
from sparring.train.optimizer import Optimizer, build_optimizer
from sparring.train.resume import (
    find_latest,
    load_checkpoint,
    recipe_hash,
    restore_generators,
    save_checkpoint,
)
from sparring.train.step import train_step


def saver(tensors: dict[str, Tensor]) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        save_file({k: v.detach().clone() for k, v in tensors.items()}, folder / "model.safetensors")

    return save


def toy() -> tuple[dict[str, nn.Parameter], Optimizer]:
    weights = {"w": nn.Parameter(torch.linspace(-1, 1, 6).view(2, 3))}
    return weights, build_optimizer(weights, learning_rate=0.01, num_steps=10)


def save(run_dir: Path, step: int, *, keep: int = 0, **more: Any) -> Path:
    weights, optimizer = toy()
    torch.autograd.backward(weights["w"].square().sum())
    optimizer.step(gradient_norm=1.0, max_grad_norm=0.0)
    parts = {"policy": saver(dict(weights)), **more}
    return save_checkpoint(
        run_dir, step=step, parts=parts, optimizer=optimizer, state={"cursor": step}, keep=keep
    )


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def build(golden_run: ModuleType, dtype: torch.dtype, lora: bool) -> tuple[Decoder, Optimizer]:
    model = golden_run.build_decoder(dtype, lora=lora)
    model.refresh_shadows()
    optimizer = build_optimizer(
        model.trainable_parameters(),
        learning_rate=1e-3,
        num_steps=6,
        schedule="cosine",
        warmup_steps=2,
        weight_decay=0.1,
        compute_dtype=dtype,
    )
    return model, optimizer


def train(
    golden_run: ModuleType, model: Decoder, optimizer: Optimizer, steps: range
) -> list[float]:
    """Steps whose data depend on torch's, numpy's and Python's generators."""
    loss = build_loss("dapo", {}, max_completion_tokens=16)
    found = []
    for _ in steps:
        pick = int(torch.randint(5, ())) + int(np.random.randint(5)) + random.randrange(5)
        found.append(train_step(model, golden_run.build_batches(pick), loss, optimizer).loss)
    return found


@pytest.mark.parametrize(
    ("dtype", "lora"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)],
)
def test_resuming_equals_going_straight_on(
    dtype: torch.dtype, lora: bool, golden_run: ModuleType, tmp_path: Path
) -> None:
    def seed() -> None:
        torch.manual_seed(1)
        np.random.seed(2)
        random.seed(3)

    seed()
    straight, optimizer = build(golden_run, dtype, lora)
    expected = train(golden_run, straight, optimizer, range(6))

    seed()
    halted, optimizer = build(golden_run, dtype, lora)
    found = train(golden_run, halted, optimizer, range(3))
    save_checkpoint(
        tmp_path,
        step=3,
        parts={"policy": saver(dict(halted.trainable_parameters()))},
        optimizer=optimizer,
        state={"policy_version": 3},
    )
    train(golden_run, halted, optimizer, range(1))  # what comes after must leave no trace

    resumed, optimizer = build(golden_run, dtype, lora)
    path = find_latest(tmp_path)
    assert path is not None
    checkpoint = load_checkpoint(path)
    assert (checkpoint.step, checkpoint.state) == (3, {"policy_version": 3})
    with torch.no_grad():
        for name, tensor in load_file(path / "policy" / "model.safetensors").items():
            resumed.trainable_parameters()[name].copy_(tensor)
    resumed.refresh_shadows()
    optimizer.load_state(checkpoint.optimizer_tensors, checkpoint.optimizer_numbers)
    restore_generators(checkpoint)
    found += train(golden_run, resumed, optimizer, range(3, 6))
    assert found == expected
    for (name, ours), theirs in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_the_newest_whole_checkpoint_is_found(tmp_path: Path) -> None:
    assert find_latest(tmp_path) is None
    save(tmp_path, 9)
    save(tmp_path, 10)
    save(tmp_path, 1_000_000)
    folder = tmp_path / "checkpoints"
    (folder / ".tmp-step_2000000").mkdir()
    (folder / "step_3000000").mkdir()
    (folder / "step_4").mkdir()
    latest = find_latest(tmp_path)
    assert latest is not None
    assert latest.name == "step_1000000"
    (latest / "policy" / "model.safetensors").write_bytes(b"short")
    assert find_latest(tmp_path) == folder / "step_000010"
    (folder / "step_000010" / "state.json").write_text('{"format": 1, ')
    assert find_latest(tmp_path) == folder / "step_000009"


def test_only_json_and_safetensors_are_written(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    files = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    assert files == {
        "state.json",
        "optimizer.safetensors",
        "generators.safetensors",
        "policy/model.safetensors",
    }
    content = json.loads((path / "state.json").read_text())
    assert set(content["bytes"]) == files - {"state.json"}
    assert set(load_file(path / "optimizer.safetensors")) == {"step/w", "exp_avg/w", "exp_avg_sq/w"}


def test_old_checkpoints_go_after_a_good_write(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step_000003", "step_000004"]
    save(tmp_path, 5, keep=1)
    assert names(tmp_path) == ["step_000005"]
    save(tmp_path, 6, keep=0)
    assert names(tmp_path) == ["step_000005", "step_000006"]


def test_the_same_step_can_be_written_again(tmp_path: Path) -> None:
    save(tmp_path, 1, extra=lambda folder: (folder / "note.json").write_text("1"))
    path = save(tmp_path, 1, extra=lambda folder: (folder / "note.json").write_text("22"))
    assert names(tmp_path) == ["step_000001"]
    assert (path / "extra" / "note.json").read_text() == "22"
    assert load_checkpoint(path).state == {"cursor": 1}


def test_what_a_killed_run_left_behind_is_cleaned_up(tmp_path: Path) -> None:
    left = tmp_path / "checkpoints" / ".tmp-step_000007" / "policy"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    assert find_latest(tmp_path) is None
    save(tmp_path, 7)
    assert names(tmp_path) == ["step_000007"]


def fill_disk(_: Path) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def write_to_full_device(folder: Path) -> None:
    with open("/dev/full", "wb") as file:
        file.write(b"x" * 100_000)


def write_tensors_nowhere(folder: Path) -> None:
    save_file({"w": torch.zeros(3)}, folder / "missing" / "model.safetensors")


@pytest.mark.parametrize("broken", [fill_disk, write_to_full_device, write_tensors_nowhere])
def test_a_full_disk_keeps_the_last_good_checkpoint(
    broken: Callable[[Path], None], tmp_path: Path
) -> None:
    good = save(tmp_path, 1)
    with pytest.raises(
        RunError, match=r"could not be written: .*the last good checkpoint is step_000001"
    ):
        save(tmp_path, 2, keep=1, reference=broken)
    assert names(tmp_path) == ["step_000001"]
    assert find_latest(tmp_path) == good
    assert load_checkpoint(good).step == 1
    save(tmp_path, 2)  # once there is room again
    assert names(tmp_path) == ["step_000001", "step_000002"]


def test_a_full_disk_at_the_first_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="there is no earlier checkpoint"):
        save(tmp_path, 1, reference=fill_disk)
    assert names(tmp_path) == []


def test_an_interrupt_while_writing_leaves_nothing_half_done(tmp_path: Path) -> None:
    def interrupt(_: Path) -> None:
        raise KeyboardInterrupt

    save(tmp_path, 1)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2, reference=interrupt)
    assert names(tmp_path) == ["step_000001"]


def test_damage_is_named(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    broken = tmp_path / "broken"
    for damage, message in (
        (lambda: (broken / "optimizer.safetensors").unlink(), "optimizer.safetensors has no bytes"),
        (lambda: (broken / "state.json").unlink(), "state.json is missing or unreadable"),
        (lambda: (broken / "state.json").write_text("[]"), "state.json is missing or unreadable"),
    ):
        shutil.copytree(path, broken)
        damage()
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(broken)
        shutil.rmtree(broken)
    file = path / "optimizer.safetensors"
    file.write_bytes(b"\xff" * file.stat().st_size)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(path)
    text = (path / "state.json").read_text().replace('"format": 1', '"format": 7')
    (path / "state.json").write_text(text)
    with pytest.raises(CheckpointError, match="its format is 7, this version reads 1"):
        load_checkpoint(path)


def test_recipe_hash_sees_values_and_not_their_order() -> None:
    first = {"loss": {"name": "dapo", "clip_low": 0.2}, "seed": 0}
    same = {"seed": 0, "loss": {"clip_low": 0.2, "name": "dapo"}}
    assert recipe_hash(first) == recipe_hash(same)
    assert recipe_hash(first) != recipe_hash({**first, "seed": 1})
    assert len(recipe_hash(first)) == 64
