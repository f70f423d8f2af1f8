"""No kernel without tests: what sparring/kernels holds is compiled and interpreted by some test.

A kernel is a function under @jit whose name ends in "_kernel"; what other @jit functions are for is
to be called by one. That each is launched in the interpreter is seen in test_processes.py.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "sparring" / "kernels").glob("*.py"))


def jitted(path: Path) -> Iterator[ast.FunctionDef]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and any(
            "jit" in ast.unparse(mark) for mark in node.decorator_list
        ):
            yield node


KERNELS = {
    f"{path.stem}.{node.name}"
    for path in FILES
    for node in jitted(path)
    if node.name.endswith("_kernel")
}


def test_every_jit_function_is_a_kernel_or_called_by_one():
    called = {
        name.id
        for path in FILES
        for node in jitted(path)
        for name in ast.walk(node)
        if isinstance(name, ast.Name)
    }
    unused = [
        f"{path.name}: {node.name}"
        for path in FILES
        for node in jitted(path)
        if not node.name.endswith("_kernel") and node.name not in called
    ]
    assert not unused, f"name a kernel ..._kernel; nothing calls {unused}"
    assert len(KERNELS) > 20


def test_every_kernel_is_compiled_for_the_cards_that_users_own():
    compiled = set()
    for path in Path(__file__).parent.glob("test_compile*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                compiled.add(f"{node.value.id}.{node.attr}")
    missing = KERNELS - compiled
    assert not missing, f"no test in tests/kernels/test_compile*.py compiles {sorted(missing)}"
