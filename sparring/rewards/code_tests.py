"""Tests of a row, in any of their shapes, turned into inputs and what is expected of the outputs.

`assert f(2) == 4` becomes a call and a check: the call goes to the sandbox, the check stays here.
Test code that computes (loops, helpers, random inputs) becomes a program of its own, which calls
the model's program over a pipe (`sandbox/remote.py`); see `code_test_program.py`. Tests come from
the data set and are trusted; nothing of them is run in this process.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sparring.rewards.code_constants import NotConstantError, constant
from sparring.rewards.code_program import parse
from sparring.rewards.code_test_program import build_test_program
from sparring.rewards.sandbox.values import Equality, NotPlainError, encode, matches

CheckKind = Literal["equal", "identical", "either", "different", "truthy", "falsy", "near"]


class TestsError(ValueError):
    """A row's tests cannot be understood: the row cannot be judged."""

    __test__ = False  # no test class, for all its name


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What an output must be. near: |output - expected| < tolerance; either: one of several.

    identical: what `is` asks of True, False and None.
    expected: a value, or for "either" a list of values. It never leaves this process.
    """

    kind: CheckKind
    expected: Any = None
    tolerance: float = 0.0

    def accepts(self, document: Any, equality: Equality) -> bool:
        """Whether the output, as typed JSON, is as it must be."""
        if self.kind == "equal":
            return matches(self.expected, document, equality)
        if self.kind == "identical":
            return matches(self.expected, document, Equality(tolerance=0.0))
        if self.kind == "either":
            return any(matches(value, document, equality) for value in self.expected)
        if self.kind == "different":
            return not matches(self.expected, document, equality)
        if self.kind == "near":
            is_number = type(document) is int or (
                type(document) is dict and document.get("t") == "float"
            )
            near = Equality(tolerance=0.0)
            return is_number and (
                abs(_number(document) - self.expected) < self.tolerance
                or matches(self.expected, document, near)
            )
        is_false = document in (None, False, 0, "", []) or (
            type(document) is dict and document.get("v") in ([], "", "0.0", "-0.0", "0j")
        )
        return is_false == (self.kind == "falsy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One test: call `function` with typed JSON, check what comes back. source is for people."""

    function: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    check: Check
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """One test of a whole program: what it reads and what it must print."""

    stdin: str
    stdout: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tests:
    """A row's tests: calls, or exchanges, or a program that computes what it expects.

    is_json: the tests were data and not assertions, so they know no tuples.
    """

    __test__ = False

    calls: tuple[Call, ...] = ()
    exchanges: tuple[Exchange, ...] = ()
    program: str = ""
    is_json: bool = False


def _number(document: Any) -> float:
    try:
        return float(document["v"] if isinstance(document, dict) else document)
    except (ValueError, TypeError, OverflowError):
        return float("nan")


def parse_tests(
    tests: Any, *, entry_point: str = "", setup: str = "", prompt: str = "", reference: str = ""
) -> Tests:
    """Understand a row's `tests` column.

    tests: a test program as text (asserts, a `check(candidate)`, `test_...` functions), a list of
    assert statements, a list of {"input", "output"} (standard input and output), of {"args" |
    "kwargs", "expected"} (calls of `entry_point`), a mapping {"inputs", "outputs", "fn_name"}, or
    the JSON text of one of these. setup: code that runs before the tests. prompt: code that the
    prompt gave. reference: a right solution; test code may use its names. Raises TestsError.
    """
    if isinstance(tests, str):
        tests = _from_json(tests)
    if isinstance(tests, dict):
        return _from_mapping(tests)
    if isinstance(tests, Sequence) and not isinstance(tests, str):
        items = list(tests)
        if items and all(isinstance(item, dict) for item in items):
            return _from_records(items, entry_point)
        if not items or not all(isinstance(item, str) for item in items):
            raise TestsError(
                f"tests are a list of {_kinds(items)}; a list of strings or objects is known"
            )
        tests = "\n".join(item.strip() for item in items)
    if not isinstance(tests, str):
        raise TestsError(f"tests are {type(tests).__name__}; a string, list or object is known")
    tests, setup = tests.replace("\r\n", "\n"), (setup or "").replace("\r\n", "\n")
    tree = parse(tests)
    if tree is None:
        raise TestsError("tests are neither JSON nor Python")
    if not setup.strip():
        calls = _plain_calls(tree, entry_point)
        if calls:
            return Tests(calls=tuple(calls))
    program = build_test_program(
        tests, entry_point=entry_point, setup=setup, prompt=prompt, reference=reference
    )
    if not program:
        raise TestsError("tests hold no assertion")
    return Tests(program=program)


def _from_json(text: str) -> Any:
    if text.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return text
    return text


def _kinds(items: Sequence[Any]) -> str:
    return ", ".join(sorted({type(item).__name__ for item in items})) or "nothing"


def _from_mapping(tests: dict[str, Any]) -> Tests:
    inputs, outputs = tests.get("inputs"), tests.get("outputs")
    if not isinstance(inputs, Sequence) or not isinstance(outputs, Sequence) or not inputs:
        raise TestsError(f"tests have the keys {', '.join(tests)}; inputs and outputs are known")
    if len(inputs) != len(outputs):
        raise TestsError(f"tests have {len(inputs)} inputs and {len(outputs)} outputs")
    function = tests.get("fn_name") or ""
    if not function:
        return _exchanges(list(zip(inputs, outputs, strict=True)))
    calls = [
        _json_call(function, args, {}, Check(kind="either", expected=_alternatives(output)))
        for args, output in zip(inputs, outputs, strict=True)
    ]
    return Tests(calls=tuple(calls), is_json=True)


def _from_records(items: list[dict[str, Any]], entry_point: str) -> Tests:
    if all("expected" in item for item in items):
        calls = []
        for item in items:
            function = item.get("function") or entry_point
            check = Check(kind="equal", expected=item["expected"])
            calls.append(
                _json_call(function, item.get("args") or [], item.get("kwargs") or {}, check)
            )
        return Tests(calls=tuple(calls), is_json=True)
    if not all("input" in item and "output" in item for item in items):
        raise TestsError(
            f"tests are objects with the keys {', '.join(sorted(items[0]))}; known are input and "
            "output, or args, kwargs and expected"
        )
    if all(item.get("fn_name") for item in items):
        return Tests(
            calls=tuple(
                _json_call(
                    item["fn_name"],
                    item["input"],
                    {},
                    Check(kind="either", expected=_alternatives(item["output"])),
                )
                for item in items
            ),
            is_json=True,
        )
    return _exchanges([(item["input"], item["output"]) for item in items])


def _alternatives(output: Any) -> list[Any]:
    """Some data sets wrap a function's output in a list, others do not: both readings count."""
    unwrapped = isinstance(output, list) and len(output) == 1
    return [output, output[0]] if unwrapped else [output]


def _exchanges(pairs: Sequence[tuple[Any, Any]]) -> Tests:
    def text(value: Any) -> str:
        if isinstance(value, list) and all(isinstance(line, str) for line in value):
            return "\n".join(value)
        if not isinstance(value, str):
            raise TestsError(f"standard input or output is {type(value).__name__}, not a string")
        return value

    return Tests(exchanges=tuple(Exchange(stdin=text(a), stdout=text(b)) for a, b in pairs))


def _json_call(function: str, args: Any, kwargs: dict[str, Any], check: Check) -> Call:
    if not function:
        raise TestsError("tests call a function, but nothing names it: add a column entry_point")
    if not isinstance(args, list | tuple):
        args = [args]
    try:
        plain = {name: encode(value) for name, value in kwargs.items()}
        source = f"{function}({', '.join(repr(item) for item in args)})"[:200]
        return Call(
            function=function,
            args=tuple(encode(item) for item in args),
            kwargs=plain,
            check=check,
            source=source,
        )
    except NotPlainError as error:
        raise TestsError(f"an input does not travel: {error}") from error


def _plain_calls(tree: ast.Module, entry_point: str) -> list[Call]:
    """The calls of a test program that is nothing but plain assertions, else []."""
    statements: list[ast.stmt] = []
    names: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            if node.name != "check" or len(node.args.args) != 1 or not entry_point or names:
                return []
            names[node.args.args[0].arg] = entry_point
            statements += node.body
        elif isinstance(node, ast.Assert):
            statements.append(node)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            if not (isinstance(node.value.func, ast.Name) and node.value.func.id == "check"):
                return []
        elif not isinstance(node, ast.Import | ast.ImportFrom | ast.Assign | ast.Expr):
            return []
    calls: list[Call] = []
    for node in statements:
        if isinstance(node, ast.Assert):
            if isinstance(node.test, ast.Constant) and node.test.value:
                continue  # `assert True` tests nothing
            call = _plain_call(node, names)
            if call is None:
                return []
            calls.append(call)
        elif not (isinstance(node, ast.Pass) or _is_text(node)):
            return []
    return calls


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _plain_call(node: ast.Assert, names: dict[str, str]) -> Call | None:
    """An assertion as a call and a check, or None for one that is more than that."""
    try:
        found = _call_and_check(node.test)
        if found is None:
            return None
        call, check = found
        if not isinstance(call.func, ast.Name) or (names and call.func.id not in names):
            return None
        kwargs = {}
        for keyword in call.keywords:
            if keyword.arg is None:
                return None
            kwargs[keyword.arg] = encode(constant(keyword.value))
        return Call(
            function=names.get(call.func.id, call.func.id),
            args=tuple(encode(constant(argument)) for argument in call.args),
            kwargs=kwargs,
            check=check,
            source=ast.unparse(node)[:200],
        )
    except (NotConstantError, NotPlainError, RecursionError):
        return None


def _call_and_check(test: ast.expr) -> tuple[ast.Call, Check] | None:
    match test:
        case ast.Call():
            return test, Check(kind="truthy")
        case ast.UnaryOp(op=ast.Not(), operand=ast.Call() as call):
            return call, Check(kind="falsy")
        case ast.Compare(left=ast.Call() as call, ops=[ast.Eq()], comparators=[value]):
            if not _is_distance(call):
                return call, Check(kind="equal", expected=constant(value))
        case ast.Compare(left=value, ops=[ast.Eq()], comparators=[ast.Call() as call]):
            return call, Check(kind="equal", expected=constant(value))
        case ast.Compare(left=ast.Call() as call, ops=[ast.NotEq()], comparators=[value]):
            return call, Check(kind="different", expected=constant(value))
        case ast.Compare(
            left=ast.Call() as call,
            ops=[ast.Is()],
            comparators=[ast.Constant(value=True | False | None as value)],
        ):
            return call, Check(kind="identical", expected=value)
        case ast.Compare(left=ast.Call(args=[difference]) as distance, ops=[ast.Lt()]) if (
            _is_distance(distance)
        ):
            bound = constant(test.comparators[0])
            match difference:
                case ast.BinOp(left=ast.Call() as call, op=ast.Sub(), right=value):
                    return call, Check(kind="near", expected=constant(value), tolerance=bound)
                case ast.BinOp(left=value, op=ast.Sub(), right=ast.Call() as call):
                    return call, Check(kind="near", expected=constant(value), tolerance=bound)
    return None


def _is_distance(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Name) and call.func.id == "abs"
