"""Sparring trains a language model to reason by letting it spar with itself (GRPO).

`load`, `generate` and `score` are the whole Python interface; they are imported when first used, so
that `import sparring` stays quick.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparring.api import generate, load, score

__version__ = "0.1.0"

__all__ = ["__version__", "generate", "load", "score"]

_LAZY = ("generate", "load", "score")


def __getattr__(name: str) -> object:
    """The public functions on first use (PEP 562)."""
    if name not in _LAZY:
        raise AttributeError(f"module 'sparring' has no attribute '{name}'; it has {__all__}")
    from importlib import import_module

    value: object = getattr(import_module("sparring.api"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
