"""Where a reward's name leads: the named rewards, and functions in a user's own file.

Nothing is imported before it is asked for, and a user's file is loaded by its path alone: the
module search path stays as it was.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from sparring.errors import RewardError

RewardFunction = Callable[..., Any]

NAMED: dict[str, str] = {
    "math": "sparring.rewards.math:MathReward",
    "format": "sparring.rewards.format:format_reward",
    "tags": "sparring.rewards.format:tags",
    "language": "sparring.rewards.language:Language",
    "soft_overlong": "sparring.rewards.length:soft_overlong",
    "cosine_length": "sparring.rewards.length:cosine_length",
    "group_length": "sparring.rewards.length:group_length",
    "repetition": "sparring.rewards.repetition:repetition",
    "countdown": "sparring.rewards.countdown:countdown",
    "random": "sparring.rewards.random:random_reward",
    "code": "sparring.rewards.code:CodeReward",
    "model": "sparring.rewards.model:ModelReward",
    "judge": "sparring.rewards.llm_judge:JudgeReward",
}


def named_rewards() -> list[str]:
    """The names that a recipe may use without a file, sorted: those whose module is there."""
    return sorted(name for name, target in NAMED.items() if _module_exists(target))


def find(name: str) -> tuple[RewardFunction, str]:
    """The function or class behind `name`, and the short name that logs and recipes call it by.

    `name` is a named reward ("math") or "path/to/file.py:function". Raises RewardError where it
    leads nowhere, with the names that are known.
    """
    target = NAMED.get(name)
    if target is not None and _module_exists(target):
        module_name, _, attribute = target.partition(":")
        found: RewardFunction = getattr(importlib.import_module(module_name), attribute)
        return found, name
    path, separator, attribute = name.rpartition(":")
    if not separator or not path.endswith(".py"):
        raise RewardError(
            f"there is no reward named '{name}'; named rewards: {', '.join(named_rewards())}; "
            "a function of your own is written path/to/file.py:function"
        )
    return _from_file(Path(path), attribute), attribute


def _module_exists(target: str) -> bool:
    return importlib.util.find_spec(target.partition(":")[0]) is not None


def _from_file(path: Path, attribute: str) -> RewardFunction:
    absolute = path.absolute()
    if not absolute.is_file():
        raise RewardError(f"{absolute}: no such file; a reward is written path/to/file.py:function")
    module = _load_module(absolute)
    found = getattr(module, attribute, None)
    if not callable(found):
        known = ", ".join(_callables(module)) or "none"
        what = "is not a function" if hasattr(module, attribute) else "is not there"
        raise RewardError(f"{absolute}: '{attribute}' {what}; functions of this file: {known}")
    function: RewardFunction = found
    return function


def _load_module(path: Path) -> ModuleType:
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:12]
    module_name = f"sparring_user_reward_{path.stem}_{digest}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise RewardError(f"{path}: cannot be loaded as a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their own module up while it loads
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        raise RewardError(f"{path}: cannot be imported: {type(error).__name__}: {error}") from error
    return module


def _callables(module: ModuleType) -> list[str]:
    names = []
    for name, value in vars(module).items():
        own = getattr(value, "__module__", None) == module.__name__
        if (
            own
            and not name.startswith("_")
            and (inspect.isfunction(value) or inspect.isclass(value))
        ):
            names.append(name)
    return sorted(names)
