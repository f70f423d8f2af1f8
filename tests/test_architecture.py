"""The laws of the house that a machine can check: floors, circles, sizes, names, quick imports."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sparring"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "assets" not in path.parts)

FLOORS = {
    **dict.fromkeys(["__main__", "cli", "compat", "api"], 5),
    "train": 4,
    **dict.fromkeys(["rollout", "parallel", "export", "recipe"], 3),
    **dict.fromkeys(["models", "algorithms", "rewards", "data", "dashboard"], 2),
    **dict.fromkeys(["kernels", "runlog", "progress", "environment", "deadline"], 1),
    **dict.fromkeys(["types", "errors", "layout"], 0),  # the nouns, under everything else
}
MEANT = {("__main__", "cli"), ("types", "layout")}
"""Imports on one floor: `python -m sparring` is the command line, and a `Batch` has a layout."""
BANNED = re.compile(r"utils?|common|helpers?|\w*manager\w*|misc")


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, *, for_types: bool = True) -> Iterator[str]:
    """The modules of this package that a file imports, in functions and for type checkers too."""
    modules = {module_name(file) for file in FILES}
    for node in ast.walk(parsed(path)):
        if not for_types and node in typing_only(path):
            continue
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [name if name in modules else str(node.module) for name in inner]
        else:
            continue
        yield from (name for name in found if name in modules and name != "sparring")


@cache
def typing_only(path: Path) -> set[ast.AST]:
    """What stands under `if TYPE_CHECKING:` and is never run."""
    blocks = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.If)]
    blocks = [block for block in blocks if ast.unparse(block.test) == "TYPE_CHECKING"]
    return {node for block in blocks for part in block.body for node in ast.walk(part)}


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for path in FILES:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{path.relative_to(ROOT)}:{node.lineno}", node


def test_every_room_has_a_floor():
    rooms = {module_name(path).split(".")[1] for path in FILES if path.parent != PACKAGE}
    rooms |= {path.stem for path in FILES if path.parent == PACKAGE} - {"__init__"}
    assert rooms <= FLOORS.keys(), f"give these a floor: {sorted(rooms - FLOORS.keys())}"


def test_imports_point_to_a_lower_floor():
    wrong = []
    for path in FILES:
        name = module_name(path)
        for target in imports(path) if name != "sparring" else ():
            room, other = name.split(".")[1], target.split(".")[1]
            if room != other and FLOORS[other] >= FLOORS[room] and (room, other) not in MEANT:
                wrong.append(f"{name} (floor {FLOORS[room]}) -> {target} (floor {FLOORS[other]})")
    assert not wrong, "\n".join(wrong)


def test_no_import_circle():
    graph = {module_name(path): set(imports(path, for_types=False)) for path in FILES}
    done: set[str] = set()
    while ready := [name for name in graph.keys() - done if graph[name] - {name} <= done]:
        done.update(ready)
    assert not graph.keys() - done, f"circle among {sorted(graph.keys() - done)}"


def test_files_are_at_most_500_lines():
    sizes = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    long = [f"{path.relative_to(ROOT)}: {size}" for path, size in sizes.items() if size > 500]
    assert not long, long


def test_functions_are_at_most_80_lines():
    long = []
    for place, node in functions():
        assert node.end_lineno is not None
        size = node.end_lineno - node.lineno + 1
        is_kernel = any("jit" in ast.unparse(mark) for mark in node.decorator_list)
        if size > (120 if is_kernel else 80):
            long.append(f"{place} {node.name}: {size}")
    assert not long, long


def test_names_say_what_a_thing_is():
    stems = [path for path in FILES if BANNED.fullmatch(path.stem)]
    classes = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in FILES
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.ClassDef) and BANNED.fullmatch(node.name.lower())
    ]
    assert not stems + classes


def test_public_functions_are_documented_and_all_are_annotated():
    wrong = []
    for place, node in functions():
        if place.startswith("sparring/kernels/"):
            continue
        every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        bare = [a.arg for a in every if a.annotation is None and a.arg not in ("self", "cls")]
        if bare or node.returns is None:
            wrong.append(f"{place} {node.name}: without types: {bare or 'its result'}")
    for path in FILES:
        top = parsed(path).body
        if path.stem != "__init__" and not ast.get_docstring(parsed(path)):
            wrong.append(f"{path.relative_to(ROOT)}: does not say what it is")
        for node in top:
            is_public = isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_"
            if is_public and "kernels" not in path.parts and not ast.get_docstring(node):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: no docstring")
    assert not wrong, "\n".join(wrong)


def test_nothing_below_the_command_line_reads_the_environment_or_runs_text():
    wrong = []
    for path in FILES:
        name = module_name(path)
        for node in ast.walk(parsed(path)):
            text = ast.unparse(node) if isinstance(node, ast.Attribute | ast.Call) else ""
            reads = text in ("os.environ", "os.getenv") and name not in (
                "sparring.cli.app",
                "sparring.kernels",
            )
            runs = isinstance(node, ast.Call) and ast.unparse(node.func) in ("eval", "exec")
            if reads or runs:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {text[:60]}")
    assert not [line for line in wrong if "sandbox" not in line], wrong


def test_an_option_with_a_metavar_names_itself():
    """Typer 0.27.0 takes the metavar for the name otherwise: `--MODEL`."""
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in FILES
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "typer.Option"
        and any(keyword.arg == "metavar" for keyword in node.keywords)
        and not (node.args and ast.unparse(node.args[0]).startswith("'--"))
    ]
    assert not wrong, wrong


READS_THE_CARDS_SIZE = re.compile(r"mem_get_info|total_memory|set_per_process_memory_fraction")
MAY_READ_IT = {
    "sparring.environment": "writes down what the machine is",
    "sparring.models.memory": "what is free, to refuse a model before it is read",
}


def test_the_cards_size_is_read_in_train_alone():
    """`[run] memory` is the one budget: chunks and tiles do not depend on what a card has."""
    wrong = []
    for path in FILES:
        name = module_name(path)
        room = name.split(".")[1] if "." in name else name
        if name in MAY_READ_IT or FLOORS.get(room, 0) >= FLOORS["train"]:
            continue
        wrong += [name] if READS_THE_CARDS_SIZE.search(path.read_text(encoding="utf-8")) else []
    assert not wrong, f"the budget comes from above: {wrong}"


def seconds(*command: str) -> float:
    """The quickest of three, since other processes may be at work beside."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, capture_output=True, cwd=ROOT)
        times.append(time.perf_counter() - start)
    return min(times)


def test_help_answers_in_a_second():
    assert seconds("-m", "sparring", "--help") < 1.0


def test_import_takes_under_three_seconds():
    assert seconds("-c", "import sparring") < 3.0


@pytest.mark.parametrize("module", ["sparring", "sparring.cli", "sparring.recipe"])
def test_import_leaves_heavy_packages_alone(module: str):
    heavy = ("torch", "transformers", "datasets", "pyarrow", "sympy", "rich")
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"


def test_version_is_the_newest_of_the_changelog():
    import sparring

    found = re.findall(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert found[0] == sparring.__version__
    assert project["dynamic"] == ["version"]


USED_WITHOUT_EXTRAS = """
import importlib, pkgutil, sys

sys.modules.update(dict.fromkeys({absent!r}))
import sparring

for module in pkgutil.walk_packages(sparring.__path__, "sparring."):
    if module.name != "sparring.__main__":
        importlib.import_module(module.name)
model, tokenizer = sparring.load("quickstart")
(rollout,), = sparring.generate(
    model, tokenizer, [[dict(role="user", content="Compute 2 + 3.")]], max_completion_tokens=4
)
sparring.score(model, [[1, 2, 3, 4]])
print(len(rollout.token_ids), "tokens written")
"""


def test_all_of_it_works_without_the_packages_that_are_optional():
    """As `make quickstart` installs it: no Triton beside the CPU build of torch, no oracles."""
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    asked = [re.match(r"[\w-]+", line)[0] for group in options.values() for line in group]
    absent = sorted({"pytest-xdist": "xdist"}.get(name, name) for name in asked)
    assert "triton" in absent
    code = USED_WITHOUT_EXTRAS.format(absent=absent)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "4 tokens written" in done.stdout
