"""A device whose memory ends at any point of a step: one message, a checkpoint, and a way on."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparring import runlog
from sparring.errors import Interrupted, RunError
from sparring.recipe import Recipe
from sparring.rollout.cuda_graph import GraphSteps
from sparring.rollout.generation import Generation
from sparring.rollout.steps import EagerSteps
from sparring.train import grpo
from sparring.train.optimizer import Optimizer
from sparring.train.out_of_memory import out_of_memory
from tests.train.tiny_run import grpo_recipe, write_checkpoint, write_data

MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 4 GiB"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_checkpoint(folder / "model")
    write_data(folder)
    return folder


def at_call(number: int, real: Callable[..., Any], fault: Callable[[], None]) -> Callable[..., Any]:
    """The real function, but its call with that number, counted from 0, has the fault first."""
    calls = iter(range(1 << 30))

    def called(*arguments: Any, **keywords: Any) -> Any:
        if next(calls) == number:
            fault()
        return real(*arguments, **keywords)

    return called


def no_memory() -> None:
    raise torch.OutOfMemoryError(MESSAGE)


def losses(run: Path) -> list[float]:
    return [record.metrics.get("loss", 0.0) for record in runlog.read_steps(run)]


PLACES = {
    "prefill": (Generation, "_prefill", 2, "rollout.kv_memory"),
    "decode": (EagerSteps, "run", 30, "rollout.kv_memory"),
    "backward": (torch.autograd, "backward", 1, "train.micro_batch_tokens"),
    "optimizer": (Optimizer, "step", 1, "train.micro_batch_tokens"),
}


@pytest.mark.parametrize("place", PLACES)
def test_memory_that_ends_stops_with_a_checkpoint_and_the_run_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    changes = {"eval": {"every": 0}}
    whole = grpo_recipe(folder, run={"dir": str(tmp_path / "whole")}, **changes)
    grpo.train(whole)
    recipe = grpo_recipe(folder, run={"dir": str(tmp_path / "run")}, **changes)
    owner, name, number, remedy = PLACES[place]
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, at_call(number, getattr(owner, name), no_memory))
        with pytest.raises(RunError, match="ran out of memory") as failure:
            grpo.train(recipe)
    assert remedy in str(failure.value)
    assert "Tried to allocate" not in str(failure.value)
    assert "--resume" in str(failure.value)
    assert list((tmp_path / "run" / "checkpoints").iterdir())
    grpo.train(recipe, resume=True)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_signal_while_decoding_writes_a_checkpoint(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = grpo_recipe(folder, run={"dir": str(tmp_path / "run")})
    with monkeypatch.context() as patched:
        patched.setattr(EagerSteps, "run", at_call(30, EagerSteps.run, interrupt))
        with pytest.raises(Interrupted):
            grpo.train(recipe)
    grpo.train(recipe, resume=True)
    assert len(losses(tmp_path / "run")) == 4


def test_the_failing_call_keeps_nothing_alive() -> None:
    class Large:
        alive = 0

        def __init__(self) -> None:
            Large.alive += 1

        def __del__(self) -> None:
            Large.alive -= 1

    def computes() -> None:
        tensor = Large()
        no_memory()
        del tensor

    with pytest.raises(RunError), out_of_memory("train"):
        computes()
    assert Large.alive == 0


def test_other_errors_pass() -> None:
    with pytest.raises(ValueError, match="wrong"), out_of_memory("train"):
        raise ValueError("wrong")


def no_memory_on_the_card() -> None:
    """The allocator itself refuses, while the failing frame holds what must be free afterwards."""
    held = torch.zeros(BALLAST, dtype=torch.uint8, device="cuda")
    torch.empty(1 << 40, dtype=torch.uint8, device="cuda")
    del held


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


BALLAST = 1 << 28
ON_THE_CARD = {
    "capture": (GraphSteps, "_compute", 1, no_memory_on_the_card),
    "prefill": (Generation, "_prefill", 1, no_memory_on_the_card),
    "decode": (GraphSteps, "run", 1, no_memory_on_the_card),
    "backward": (torch.autograd, "backward", 1, no_memory_on_the_card),
    "optimizer": (Optimizer, "step", 1, no_memory_on_the_card),
    "interrupt while decoding": (GraphSteps, "run", 1, interrupt),
}


VARIED = """
def varied(completions):
    return [sum(map(ord, text)) % 17 / 17 for text in completions]
"""


def card_recipe(folder: Path, run: Path) -> Recipe:
    """Every step has a signal, so that each of them reaches the optimizer."""
    (folder / "varied.py").write_text(VARIED)
    return grpo_recipe(
        folder,
        model={"dtype": "bfloat16"},
        run={"dir": str(run)},
        lora={"rank": 4},
        reward=[{"name": f"{folder}/varied.py:varied"}],
    )


@pytest.fixture(scope="module")
def whole_losses(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    run = tmp_path_factory.mktemp("whole") / "run"
    grpo.train(card_recipe(folder, run))
    assert all(record.metrics["gradient_norm"] > 0 for record in runlog.read_steps(run))
    return losses(run)


def held_bytes() -> int:
    """What is allocated on the card, but for the library's workspaces."""
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()


@pytest.mark.gpu
@pytest.mark.parametrize("place", ON_THE_CARD)
def test_on_a_card_memory_is_free_after_the_failure_and_the_run_goes_on(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    place: str,
    whole_losses: list[float],
) -> None:
    owner, name, number, fault = ON_THE_CARD[place]
    recipe = card_recipe(folder, tmp_path / "run")
    before = held_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, at_call(number, getattr(owner, name), fault))
        wanted = Interrupted if fault is interrupt else RunError
        with pytest.raises(wanted) as failure:
            grpo.train(recipe)
    if wanted is RunError:
        message = str(failure.value)
        assert message.count("ran out of memory") == 1
        assert "--resume" in message
    del failure
    assert held_bytes() - before < BALLAST // 64
    assert list((tmp_path / "run" / "checkpoints").iterdir())
    grpo.train(recipe, resume=True)
    assert losses(tmp_path / "run") == whole_losses
    assert "CUDA Graph is empty" not in capsys.readouterr().err
