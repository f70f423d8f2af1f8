"""The tiny decoder and its packed groups, shared with the golden run."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def golden_run() -> ModuleType:
    """The module golden_run.py beside this file."""
    spec = importlib.util.spec_from_file_location(
        "golden_run", Path(__file__).with_name("golden_run.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
