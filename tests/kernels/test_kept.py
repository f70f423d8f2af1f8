"""What a device keeps is made once, and never in memory that is lent to captured steps."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import sparring
from sparring.kernels import kept
from sparring.kernels.kept import lending, make_kept
from sparring.kernels.matmul import launch
from sparring.rollout.graph_memory import GraphMemory

CPU = torch.device("cpu")


@pytest.fixture
def fresh() -> Iterator[None]:
    """As in a process that has computed nothing yet."""
    for make in kept.MAKERS:
        make.cache_clear()
    yield
    for make in kept.MAKERS:
        make.cache_clear()


@pytest.fixture
def maker(monkeypatch: pytest.MonkeyPatch) -> Callable[[torch.device], Tensor]:
    monkeypatch.setattr(kept, "MAKERS", [])

    @kept.kept
    def counters(device: torch.device) -> Tensor:
        return torch.zeros(3, device=device)

    return counters


def test_it_is_made_once(maker: Callable[[torch.device], Tensor]) -> None:
    make_kept(CPU)
    first = maker(CPU)
    with lending():
        assert maker(CPU) is first
    make_kept(CPU)
    assert maker(CPU) is first


def test_nothing_is_made_in_lent_memory(maker: Callable[[torch.device], Tensor]) -> None:
    with lending(), pytest.raises(AssertionError, match="before captures"):
        maker(CPU)
    assert maker(CPU).shape == (3,), "afterwards it is"


@pytest.mark.usefixtures("fresh")
def test_memory_of_graphs_comes_after_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product of few rows whose sums meet, first launched while a step is captured."""
    x, weight = torch.ones(2, 1024), torch.ones(64, 1024)
    launched: list[dict[str, object]] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda **given: launched.append(given)

    monkeypatch.setattr("sparring.kernels.matmul._matmul_kernel", Kernel())
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    x, weight = x.bfloat16(), weight.bfloat16()
    with lending(), pytest.raises(AssertionError, match="before captures"):
        launch(x, weight, segments=4)
    GraphMemory(CPU)
    with lending():
        launch(x, weight, segments=4)
    launch(x, weight, segments=4)
    first, second = (given["count_ptr"] for given in launched)
    assert isinstance(first, Tensor)
    assert isinstance(second, Tensor)
    assert first.data_ptr() == second.data_ptr()
    assert not first.any()


def test_no_tensor_is_kept_in_another_way() -> None:
    """A function that caches a tensor by itself would make it wherever it is first called."""
    found = []
    for path in Path(sparring.__file__).parent.rglob("*.py"):
        if path.name == "kept.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.returns is not None:
                caches = any("cache" in ast.unparse(mark) for mark in node.decorator_list)
                if caches and "Tensor" in ast.unparse(node.returns):
                    found.append(f"{path.name}: {node.name}")
    assert not found
    assert len(kept.MAKERS) >= 2
