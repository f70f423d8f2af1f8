"""No kernel without tests: what sparring/kernels holds is compiled and interpreted by some test.

A kernel is a function under @jit whose name ends in "_kernel"; what other @jit functions are for is
to be called by one. That each is launched in the interpreter is seen in test_processes.py.
"""

from __future__ import annotations

import ast
import re
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


CHOSEN_BY_A_PLAN = {"paged_decode", "paged_prefill", "rotate_decode"}
"""Who plans a step chooses their form (models/attention_paged_kernel.py)."""
OF_TWO_REFERENCES = {"rotate_decode": ("rotate_write_reference", "paged_decode_reference")}
"""Several launches in one, with the bits of one after the other."""


def test_every_launch_has_its_formula_in_torch_beside_it():
    everywhere, wrong = set(), []
    for path in FILES:
        functions = {
            node.name
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.FunctionDef)
        }
        everywhere |= functions
        for name in (f.removesuffix("_triton") for f in functions if f.endswith("_triton")):
            if name.startswith("_") or name == "uses":
                continue
            wanted = {name} - CHOSEN_BY_A_PLAN
            if name not in OF_TWO_REFERENCES:
                wanted.add(f"{name}_reference")
            wrong += [f"{path.name}: {one}" for one in wanted - functions]
    assert not wrong, f"a launch name_triton needs name and name_reference: {wrong}"
    assert {one for pair in OF_TWO_REFERENCES.values() for one in pair} <= everywhere


def test_every_file_with_a_kernel_says_what_shapes_and_bytes_it_moves():
    wrong = []
    for path in {path for path in FILES if any(n.name.endswith("_kernel") for n in jitted(path))}:
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        if not re.search(r"[Bb]ytes", text) or not re.search(r"\[\w|kernels/\w+\.py", text):
            wrong.append(path.name)
    assert not wrong, f"say formula, shapes and bytes at the top of {sorted(wrong)}"
