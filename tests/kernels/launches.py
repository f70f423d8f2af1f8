"""A pytest plugin: which Triton kernels the interpreter launched, written to a file at the end.

    TRITON_INTERPRET=1 python -m pytest -p tests.kernels.launches --launches FILE ...

A line a kernel: "<file of sparring/kernels>.<name>".
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

LAUNCHED: set[str] = set()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--launches", type=Path, help="file for the kernels that were launched")


def pytest_configure(config: pytest.Config) -> None:
    from triton.runtime.interpreter import InterpretedFunction

    run = InterpretedFunction.run

    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("warmup"):
            LAUNCHED.add(f"{self.fn.__module__.rsplit('.', 1)[-1]}.{self.fn.__name__}")
        return run(self, *args, **kwargs)

    InterpretedFunction.run = recorded


def pytest_sessionfinish(session: pytest.Session) -> None:
    file = session.config.getoption("--launches")
    if file is not None:
        file.write_text("".join(name + "\n" for name in sorted(LAUNCHED)))
