"""Test code that computes, rewritten into a program that calls the model's program from outside.

In the result every assertion is counted by `__record__`, every `==` in one is `__equal__`, and the
names under test are `__remote__` objects: `sandbox/remote.py` supplies the three. What the prompt
and the reference solution define stands beside the tests, so that a model cannot replace
the helper that its answer is checked with, and a test that compares the candidate with itself
compares it with the reference.
"""

from __future__ import annotations

import ast
import builtins

from sparring.rewards.code_program import (
    assemble,
    close_definition,
    defined_names,
    parse,
    prompt_code,
    without_definition,
)


def build_test_program(
    tests: str, *, entry_point: str, setup: str, prompt: str, reference: str
) -> str:
    """The test program's source, or "" where the tests hold no assertion."""
    tree = parse(tests)
    if tree is None:
        return ""
    trusted = _trusted_code(entry_point, prompt=prompt, reference=reference)
    setup_tree = parse(setup)
    rewriter = _Assertions()
    body = [node for node in rewriter.visit(tree).body if not _imports_solution(node)]
    if not rewriter.count:
        return ""
    test_functions = [
        node.name
        for node in body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test")
    ]
    has_check = any(isinstance(node, ast.FunctionDef) and node.name == "check" for node in body)
    calls_check = any(_is_call_of(node, "check") for node in body)
    setup_body = setup_tree.body if setup_tree is not None else []
    used = _free_names([*setup_body, *body])
    if has_check and entry_point and not calls_check:
        available = defined_names(trusted) if trusted is not None else set()
        remote = sorted(used - available)
        body += ast.parse(f"check(__remote__({entry_point!r}))").body
    else:
        remote = sorted(used - _imports_and_values(trusted))
    for name in test_functions:
        body += ast.parse(_GUARDED_CALL.format(name=name)).body
    bindings = ast.parse("\n".join(f"{name} = __remote__({name!r})" for name in remote)).body
    whole = ast.Module(
        body=[*(trusted.body if trusted is not None else []), *bindings, *setup_body, *body],
        type_ignores=[],
    )
    return ast.unparse(ast.fix_missing_locations(whole))


_GUARDED_CALL = """
try:
    {name}()
except Exception as __failure__:
    __record__(False, "{name}: " + repr(__failure__))
"""


_GUARDED_ASSERTION = """
try:
    __verdict__ = {expression}
except Exception as __failure__:
    __record__(False, {source} + f': {{__failure__!r}}')
else:
    __record__(__verdict__, {source})
"""


class _Assertions(ast.NodeTransformer):
    """`assert x == y` -> try to evaluate __equal__(x, y), and record what came of it."""

    def __init__(self) -> None:
        self.count = 0

    def visit_Assert(self, node: ast.Assert) -> ast.stmt:
        if isinstance(node.test, ast.Constant) and node.test.value:
            return ast.copy_location(ast.Pass(), node)
        self.count += 1
        test = node.test
        if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq):
            arguments = [test.left, test.comparators[0]]
            test = ast.Call(
                func=ast.Name(id="__equal__", ctx=ast.Load()), args=arguments, keywords=[]
            )
        source = repr(ast.unparse(node)[:200])
        guarded = _GUARDED_ASSERTION.format(expression=ast.unparse(test), source=source)
        return ast.copy_location(ast.parse(guarded).body[0], node)


def _trusted_code(entry_point: str, *, prompt: str, reference: str) -> ast.Module | None:
    """What the row itself defines: prompt and reference, or the prompt's helpers alone."""
    if reference:
        whole = parse(assemble(reference, prompt=prompt, entry_point=entry_point))
        if whole is not None and any(
            isinstance(node, ast.FunctionDef | ast.ClassDef) for node in whole.body
        ):
            return whole
    opened = prompt_code(prompt, entry_point)
    if opened:
        return parse(without_definition(close_definition(opened), entry_point))
    return None


def _imports_and_values(trusted: ast.Module | None) -> set[str]:
    """Names that trusted code imports or assigns; its functions and classes are under test."""
    if trusted is None:
        return set()
    own = [
        node
        for node in trusted.body
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    ]
    return defined_names(ast.Module(body=own, type_ignores=[]))


def _free_names(body: list[ast.stmt]) -> set[str]:
    """Names that test code reads and does not define: neither there nor as built-ins."""
    read: set[str] = set()
    bound: set[str] = set()
    for node in body:
        for part in ast.walk(node):
            if isinstance(part, ast.Name):
                (read if isinstance(part.ctx, ast.Load) else bound).add(part.id)
            elif isinstance(part, ast.arg):
                bound.add(part.arg)
            elif isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                bound.add(part.name)
            elif isinstance(part, ast.alias):
                bound.add((part.asname or part.name).split(".")[0])
            elif isinstance(part, ast.ExceptHandler) and part.name:
                bound.add(part.name)
    given = {"__equal__", "__record__", "__remote__", "__name__", "__file__"}
    return read - bound - set(dir(builtins)) - given


def _imports_solution(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module in ("solution", "main", "program")


def _is_call_of(node: ast.stmt, name: str) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Name)
        and node.value.func.id == name
    )
