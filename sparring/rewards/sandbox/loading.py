"""Running a program's text inside the sandbox, the way Python runs a file.

The text is written to a file and loaded by the import system, so that tracebacks, `inspect` and
source encodings behave as usual. Runs in the contained process alone.
"""

from __future__ import annotations

import ast
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

VALUE_NAME = "__value_of_last_line__"


class _LastValueLoader(SourceFileLoader):
    """Keeps the value of a final expression under VALUE_NAME, as an interactive prompt shows it."""

    def source_to_code(  # type: ignore[override]  # as the class itself has it
        self, data: Any, path: Any, *_: Any, _optimize: int = -1
    ) -> CodeType:
        tree = ast.parse(data, filename=str(path))
        last = tree.body[-1] if tree.body else None
        if isinstance(last, ast.Expr):
            name = ast.Name(id=VALUE_NAME, ctx=ast.Store())
            tree.body[-1] = ast.copy_location(ast.Assign(targets=[name], value=last.value), last)
            ast.fix_missing_locations(tree)
        return compile(tree, str(path), "exec", dont_inherit=True, optimize=_optimize)


def prepare_module(text: bytes, name: str, *, keep_last_value: bool = False) -> ModuleType:
    """Write the program into the working directory and make an empty module for it."""
    path = Path.cwd() / "program.py"
    path.write_bytes(text)
    kind = _LastValueLoader if keep_last_value else SourceFileLoader
    spec = spec_from_file_location(name, path, loader=kind(name, str(path)))
    assert spec is not None, "a spec with a loader of its own always exists"
    module = module_from_spec(spec)
    sys.modules[name] = module
    return module


def run_module(module: ModuleType) -> None:
    """Run the program's top level; raises what it raises, SyntaxError and SystemExit included."""
    loader = module.__loader__
    assert isinstance(loader, SourceFileLoader), "prepare_module gave it one"
    loader.exec_module(module)
