"""The reward `code`: extraction, shapes of tests, verdicts, and programs that try to cheat."""

from __future__ import annotations

import ast
import json
import textwrap
import time

import pytest

from sparring.errors import RewardError
from sparring.rewards.code import CodeReward, same_lines
from sparring.rewards.code_constants import NotConstantError, constant
from sparring.rewards.code_program import assemble, extract_code, prompt_code
from sparring.rewards.code_tests import TestsError, parse_tests
from sparring.rewards.verdicts import load_reward


@pytest.fixture(scope="module")
def make():
    """Makes code rewards on the strongest sandbox of this machine, and ends them."""
    made: list[CodeReward] = []

    def build(**knobs) -> CodeReward:
        try:
            made.append(CodeReward(num_workers=2, **knobs))
        except RewardError as error:
            pytest.skip(f"this machine offers no isolating level: {error}")
        return made[-1]

    yield build
    for one in made:
        one.close()


@pytest.fixture(scope="module")
def all_tests(make):
    return make()


@pytest.fixture(scope="module")
def share(make):
    return make(credit="share")


def fenced(code: str) -> str:
    return f"Here it is:\n```python\n{textwrap.dedent(code).strip()}\n```\n"


def judge(reward: CodeReward, code: str, tests, *, prompt: str = "Write f.", **columns):
    """(value, reason) of one completion."""
    notes: dict[str, list[object]] = {}
    (value,) = reward(
        prompts=[prompt],
        completions=[code if "```" in code else fenced(code)],
        tests=[tests],
        log_extra=lambda name, values: notes.update({name: values}),
        **{name: [column] for name, column in columns.items()},
    )
    return value, str(notes["reason"][0])


# extraction


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```python\na = 1\n```", "a = 1"),
        ("```py\nold\n```\ntext\n```Python\nnew\n```\nend", "new"),
        ("```python\ncode\n```\nIt prints:\n```\n5\n```", "code"),
        ("```\nplain\n```", "plain"),
        ("~~~python\nx\n~~~", "x"),
        ("1. so:\n   ```python\n   if x:\n       y\n   ```", "if x:\n    y"),
        ("````python\na = '''\n```\n'''\n````", "a = '''\n```\n'''"),
        ("<think>\n```python\nno\n```\n</think>\n```python\nyes\n```", "yes"),
        ("```python\r\na\r\n```\r\n", "a"),
        ("```python\nnever closed", "never closed"),
        ("def f():\n    return 1", "def f():\n    return 1"),
        ("<think>```python\nno\n```", None),
        ("```bash\nls\n```", None),
        ("```python\n\n```", None),
        ("", None),
        ("  \n ", None),
    ],
)
def test_last_code_block_after_the_thinking(text, code):
    assert extract_code(text) == code


OPEN_PROMPT = '''from typing import List

def helper(x):
    return x + 1

def f(x: int) -> int:
    """Adds 2."""
'''


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("    return helper(helper(x))", 3),  # the body alone
        ("return helper(helper(x))", 3),  # not even indented
        ("def f(x):\n    return helper(x) + 1", 3),  # whole, with the prompt's helper
        ("def g(x):\n    return x\ndef f(x): return g(x)", 1),
        ("from __future__ import annotations\ndef f(x): return 9", 9),
    ],
)
def test_prompt_and_completion_make_a_program(all_tests, code, expected):
    for prompt in (
        OPEN_PROMPT,
        f"Complete:\n```python\n{OPEN_PROMPT}```\n",
        OPEN_PROMPT + "<|end|>",
    ):
        tests = f"def check(candidate):\n    assert candidate(1) == {expected}\n"
        fence = f"```python\n{code}\n```"
        assert judge(all_tests, fence, tests, prompt=prompt, entry_point="f") == (
            1.0,
            "passed 1 of 1",
        )


def test_prompt_that_is_no_code_gives_none():
    assert prompt_code("Write a function def of f that adds.", "f") == ""
    assert prompt_code("import this is not Python", "f") == ""
    assert assemble("x = 1", prompt="words", entry_point="f") == "x = 1"


# constants


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("-3", -3),
        ("3 * 19 + 2 ** 3", 65),
        ("[1, (2,), {'a': {3}}]", [1, (2,), {"a": {3}}]),
        ("1.0/4", 0.25),
        ("'ab' + 'c' * 2", "abcc"),
        ("set()", set()),
        ("int", int),
        ("10 ** 100", 10**100),
        ("{1: 2}", {1: 2}),
    ],
)
def test_constants_are_computed_without_running(text, value):
    found = constant(ast.parse(text, mode="eval").body)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    "text",
    [
        "x",
        "f(1)",
        "9 ** 9 ** 9",
        "'a' * 10 ** 9",
        "1 / 0",
        "[0] * 10 ** 8",
        "...",
        "{**{}}",
        "-'a'",
        "2 ** 0.5 ** 5000.0 if 1 else 2",
        "1 << 10**9",
        "'a' % 3",
        "[1][0]",
        "lambda: 1",
    ],
)
def test_everything_else_is_no_constant(text):
    with pytest.raises(NotConstantError):
        constant(ast.parse(text, mode="eval").body)


# shapes of tests

LOOPED = "def check(candidate):\n    for i in (3, 4):\n        assert candidate(i) == i * i\n"

SQUARE = "def f(x): return x * x"
CUBE = "def f(x): return x * x * x"

SHAPES = {
    "asserts": ["assert f(3) == 9", "assert 16 == f(4)"],
    "asserts as text": "assert f(3) == 9\nassert f(-2) == 4",
    "check": "METADATA = {}\n\ndef check(candidate):\n    assert candidate(3) == 9, 'no'\n"
    "    assert True\n",
    "check with a loop": "def check(candidate):\n    for i in range(2, 9):\n"
    "        assert candidate(i) == i ** 2\n",
    "check called": "def check(g):\n    for i in (3,): assert g(i) == i * i\n\ncheck(f)\n",
    "pytest": "from solution import f\n\ndef test_it():\n    for i in (3, 4):\n"
    "        assert f(i) == i * i\n",
    "objects": [{"args": [3], "expected": 9}, {"kwargs": {"x": 5}, "expected": 25}],
    "json text": json.dumps([{"args": [3], "expected": 9}]),
    "inputs and outputs": {"fn_name": "f", "inputs": [[3], [4]], "outputs": [9, [16]]},
    "function calls": [{"fn_name": "f", "input": [3], "output": 9, "type": "function_call"}],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_tells_right_from_wrong(all_tests, shape):
    tests = SHAPES[shape]
    value, reason = judge(all_tests, SQUARE, tests, entry_point="f")
    assert value == 1.0, reason
    value, reason = judge(all_tests, CUBE, tests, entry_point="f")
    assert value == 0.0, reason
    assert judge(all_tests, "def g(x): return x * x", tests, entry_point="f")[0] == 0.0


def test_solution_classes_are_found(all_tests):
    code = "class Solution:\n    def f(self, x):\n        return x * x"
    assert judge(all_tests, code, SHAPES["inputs and outputs"])[0] == 1.0


@pytest.mark.parametrize(
    ("tests", "part"),
    [
        ([], "nothing"),
        ("", "no assertion"),
        ("not python (", "neither JSON nor Python"),
        ("x = 1", "no assertion"),
        ([1, 2], "list of int"),
        ([{"in": 1}], "known are input and output"),
        ({"inputs": ["1"], "outputs": []}, "1 inputs and 0 outputs"),
        ({"a": 1}, "inputs and outputs are known"),
        (None, "NoneType"),
        ([{"input": 3, "output": "3"}], "not a string"),
        ([{"args": [1], "expected": 1}], "entry_point"),
    ],
)
def test_tests_that_cannot_be_understood_are_none(all_tests, tests, part):
    value, reason = judge(all_tests, SQUARE, tests)
    assert value is None
    assert part in reason


def test_test_code_that_fails_by_itself_is_none(all_tests):
    tests = "import no_such_module\n" + LOOPED
    value, reason = judge(all_tests, SQUARE, tests, entry_point="f")
    assert value is None
    assert "no_such_module" in reason


@pytest.mark.parametrize(
    ("assertion", "right", "wrong"),
    [
        ("assert f(1)", "return [0]", "return []"),
        ("assert not f(1)", "return 0", "return 1"),
        ("assert f(1) is None", "return None", "return 0"),
        ("assert f(1) is True", "return True", "return 1"),
        ("assert f(1) != 3", "return 4", "return 3"),
        ("assert abs(f(1) - 0.5) < 1e-3", "return 0.5001", "return 0.51"),
        ("assert f(1) == 0.3", "return 0.1 + 0.2", "return 0.30001"),
        ("assert f(1) == (1, 2)", "return (1, 2)", "return [1, 2]"),
        ("assert f(1) == 1", "return 1.0", "return True"),
        ("assert f(1) == {'a': [1]}", "return {'a': [1]}", "return {'a': (1,)}"),
        ("assert f(1) == {1, 2}", "return {2, 1}", "return [1, 2]"),
        ("assert f(1) == 'é\\n'", "return 'é\\n'", "return 'e'"),
        ("assert f(1) == 10 ** 60", "return 10 ** 60", "return 10 ** 60 + 1"),
        ("assert sorted(f(1)) == [1, 2]", "return [2, 1]", "return [1]"),
        ("assert len(f(1)) == 2 and f(1)[0] == 1", "return [1, 5]", "return [5, 1]"),
        ("assert f(f(1)) == 1", "return x", "return x + 1"),
        ("assert f(2) * 2 == 4", "return x", "return x + 1"),
    ],
)
def test_assertions_mean_what_they_say(all_tests, assertion, right, wrong):
    good = judge(all_tests, f"def f(x):\n    {right}", [assertion], entry_point="f")
    bad = judge(all_tests, f"def f(x):\n    {wrong}", [assertion], entry_point="f")
    assert (good[0], bad[0]) == (1.0, 0.0), (good, bad)


def test_plain_assertions_become_inputs_alone():
    tests = parse_tests(["assert f([1, 2], k='a') == 'secret answer'"], entry_point="f")
    (call,) = tests.calls
    assert (call.args, call.kwargs) == (([1, 2],), {"k": "a"})
    assert tests.program == ""
    with pytest.raises(TestsError):
        parse_tests("import os")


def test_objects_of_the_program_are_built_in_it(all_tests):
    code = """
    class Node:
        def __init__(self, data):
            self.data, self.left = data, None
    def total(node):
        return node.data + (total(node.left) if node.left else 0)
    """
    setup = "root = Node(3)\nroot.left = Node(4)"
    tests = ["assert total(root) == 7", "assert root.left.data == 4"]
    assert judge(all_tests, code, tests, test_setup_code=setup) == (1.0, "passed 2 of 2")
    wrong = code.replace("+ (total", "- (total")
    assert judge(all_tests, wrong, tests, test_setup_code=setup)[0] == 0.0


def test_expected_exceptions_can_be_tested(all_tests):
    tests = """
def check(candidate):
    try:
        candidate(-1)
    except ValueError:
        raised = True
    else:
        raised = False
    assert raised
    assert candidate(4) == 2
"""
    right = "def f(x):\n    if x < 0: raise ValueError(x)\n    return x // 2"
    assert judge(all_tests, right, tests, entry_point="f")[0] == 1.0
    assert judge(all_tests, "def f(x): return x // 2", tests, entry_point="f")[0] == 0.0


# standard input and output


def test_whole_programs_are_judged_by_their_output(all_tests, share):
    tests = [{"input": "2\n3\n", "output": "5\n"}, {"input": "-1\n1", "output": "0"}]
    right = "print(int(input()) + int(input()))"
    assert judge(all_tests, right, tests) == (1.0, "passed 2 of 2")
    assert judge(all_tests, "print(5)", tests)[0] == 0.0
    assert judge(share, "print(5)", tests) == (0.5, "passed 1 of 2; test 2: other output")
    assert judge(all_tests, right + "\nprint('more')", tests)[0] == 0.0
    assert judge(all_tests, right + "\nraise SystemExit(1)", tests)[0] == 0.0
    assert judge(all_tests, right, {"inputs": ["2\n3"], "outputs": [["5"]]})[0] == 1.0


@pytest.mark.parametrize(
    ("expected", "actual", "same"),
    [
        ("1\n2", "1 \n2\n\n", True),
        ("1\n2", "1\n2\n3", False),
        ("1\n2", "1", False),
        ("1\n\n2", "1\n2", False),
        (" 1", "1", False),
        ("a\r\nb", "a\nb", True),
        ("", "\n", True),
    ],
)
def test_lines_are_compared_all_of_them(expected, actual, same):
    assert same_lines(expected, actual) is same


# credit, limits, batches


def test_credit_is_all_or_a_share(all_tests, share):
    tests = ["assert f(1) == 1", "assert f(2) == 4", "assert f(3) == 9", "assert f(0) == 0"]
    constant_answer = "def f(x): return 1"
    assert judge(all_tests, constant_answer, tests)[0] == 0.0
    assert judge(share, constant_answer, tests)[0] == 0.25
    assert judge(share, SQUARE, tests)[0] == 1.0
    loop = "def check(g):\n    for i in range(4):\n        assert g(i) == i * i\n"
    assert judge(share, constant_answer, loop, entry_point="f")[0] == 0.25
    assert judge(share, "def f(x): syntax error", tests)[0] == 0.0
    steps = (
        "def check(g):\n    for i in range(9):\n        found = g(i)\n        assert found == i\n"
    )
    half_way = "def f(x):\n    if x: raise RuntimeError\n    return x"
    assert judge(share, half_way, steps, entry_point="f")[0] == 0.0, (
        "ending tests early pays nothing"
    )


def test_limits_are_reasons(make):
    short = make(wall_seconds=0.5, cpu_seconds=5, memory_mib=128)
    for code, part in [
        ("def f(x):\n    while True: pass", "time limit"),
        ("while True: pass", "time limit"),
        ("def f(x): return bytearray(10 ** 9)", "MemoryError"),
        ("import os\ndef f(x): os._exit(0)", "ok"),
        ("def f(x): return object()", "does not travel"),
        ("def f(x): return f(x)", "RecursionError"),
        ("import numpy_that_is_not_there", "ModuleNotFoundError"),
        ("def f(x): print('x' * 10 ** 7)", "output limit"),
    ]:
        value, reason = judge(short, code, ["assert f(1) == 1"])
        assert value == 0.0
        assert part in reason, (code, reason)


def test_a_batch_keeps_its_order_and_runs_equal_programs_once(all_tests):
    codes = [SQUARE, CUBE, SQUARE, "no code at all is no program", CUBE] * 4
    values = all_tests(
        prompts=["p"] * 20, completions=[fenced(c) for c in codes], tests=[SHAPES["asserts"]] * 20
    )
    assert values == [1.0, 0.0, 1.0, 0.0, 0.0] * 4
    chat = [[{"role": "assistant", "content": fenced(SQUARE)}]]
    prompt = [[{"role": "user", "content": "Write f."}]]
    assert all_tests(prompts=prompt, completions=chat, tests=[SHAPES["asserts"]]) == [1.0]
    opened = "```python\n"
    assert all_tests(
        prompts=["p"], completions=[SQUARE], tests=[SHAPES["asserts"]], prefills=[opened]
    ) == [1.0]
    thinking = all_tests(
        prompts=["p"], completions=[SQUARE], tests=[SHAPES["asserts"]], prefills=["<think>\n"]
    )
    assert thinking == [0.0], "a thinking part that never ends holds no answer"


def test_what_is_not_judged_in_time_is_none(make):
    hurried = make(batch_seconds=1.5, wall_seconds=0.5)
    slow = [fenced(f"def f(x):\n    import time\n    time.sleep(9)\n# {n}") for n in range(12)]
    started = time.monotonic()
    values = hurried(
        prompts=["p"] * 13,
        completions=[fenced(SQUARE), *slow],
        tests=[["assert f(1) == 1"]] * 13,
    )
    assert time.monotonic() - started < 2.5
    assert values[:2] == [1.0, 0.0], "a wall limit of its own is the program's fault"
    assert 4 <= values.count(0.0) <= 6
    assert values[-1] is None, "the batch's is not"


def test_reward_is_known_by_name_and_checks_its_knobs(all_tests):
    for knobs, part in [
        ({"credit": "half"}, "share"),
        ({"sandbox": "none"}, "rlimits"),
        ({"wall_seconds": 0}, "wall_seconds"),
        ({"memory": 3}, "memory_mib"),
        ({"batch_seconds": 0}, "batch_seconds"),
        ({"tolerance": -1}, "tolerance"),
    ]:
        with pytest.raises(RewardError, match=part):
            load_reward("code", knobs=knobs)
    reward = load_reward("code", knobs={"credit": "share"})
    assert reward.function(["p"], [fenced(SQUARE)], [SHAPES["asserts"]]) == [1.0]
    reward.close()


# cheats

TARGET = ["assert f(3) == 9", "assert f(4) == 16", "assert f([]) == 'x'"]
GENERIC = ["assert sorted(f(3)) == [9]", "assert f(4) == 16"]

CHEATS = {
    "exit 0": "import os\nos._exit(0)",
    "exit in the call": "import os\ndef f(x): os._exit(0)",
    "system exit": "raise SystemExit(0)",
    "system exit in the call": "def f(x): raise SystemExit(0)",
    "printed success": "print('passed 3 of 3')\nprint('OK')\ndef f(x): return 0",
    "equal to everything": "class A:\n    def __eq__(s, o): return True\n"
    "    def __bool__(s): return True\n"
    "def f(x): return A()",
    "an int that is equal to everything": "class A(int):\n    def __eq__(s, o): return True\n"
    "    __hash__ = int.__hash__\ndef f(x): return A(1)",
    "a str with its own equality": "class A(str):\n    def __eq__(s, o): return True\n"
    "    __hash__ = str.__hash__\ndef f(x): return A('y')",
    "a list of such": "class A(int):\n    def __eq__(s, o): return True\n"
    "    __hash__ = int.__hash__\ndef f(x): return [A(1)]",
    "patched built-ins": "import builtins\n"
    "for name in ('isinstance', 'bool', 'all', 'sorted', 'len'):\n"
    "    setattr(builtins, name, lambda *a, **k: True)\ndef f(x): return 1",
    "patched json": 'import json\njson.dumps = lambda *a, **k: \'{"index": 0, "value": true}\'\n'
    "def f(x): return 1",
    "assertion error swallowed": "import sys\nsys.excepthook = lambda *a: None\n"
    "def f(x): assert False",
    "raised in the test's name": "def f(x): raise AssertionError",
    "a planted module": "for name in ('json', 'sparring', 'ast', 'math'):\n"
    "    open(name + '.py', 'w').write('raise SystemExit(0)')\ndef f(x): return 1",
    "rewritten program": "open('program.py', 'w').write('def f(x): return x * x')\n"
    "def f(x): return 1",
    "searching the stack": """
import sys, gc
def f(x):
    frame = sys._getframe()
    while frame:
        for value in list(frame.f_locals.values()):
            if isinstance(value, dict) and "expected" in value:
                return value["expected"]
        frame = frame.f_back
    for value in gc.get_objects():
        if isinstance(value, dict) and "expected" in value:
            return value["expected"]
    return None
""",
    "forged replies": """
import os, sys
def tag():
    frame = sys._getframe()
    while frame:
        for value in frame.f_locals.values():
            if type(value).__name__ == "Reply":
                return value.tag
        frame = frame.f_back
verdict = b'{"passed": 9, "failed": 0, "first_failure": "", "num_calls": 9, "error": ""}'
for line in (b'{"verdict": ' + verdict + b'}',
             b'{"index": 0, "value": true}', b'{"index": 1, "value": {"t": "handle", "v": 0}}',
             b'{"ready": true}', b'{"value": true}', b'{"value": {"t": "handle", "v": "f"}}',
             b'{"command": {"do": "get"}}', b'[]', b'null', b'7', b'"x"'):
    os.write(3, tag() + line + b"\\n")
def f(x): return 1
""",
    "mutated arguments": "def f(x):\n    if isinstance(x, list): x.append('x')\n    return x",
    "a function for an answer": "def f(x): return f",
    "a generator": "def f(x): yield x * x",
    "not a number": "def f(x): return float('nan')",
    "endless": "def f(x):\n    while True: pass",
    "killed": "import os, signal\ndef f(x): os.kill(os.getpid(), signal.SIGKILL)",
    "a thread that lives on": "import threading, time\n"
    "threading.Thread(target=time.sleep, args=(60,)).start()"
    "\ndef f(x): return 1",
}


@pytest.fixture(scope="module")
def strict(make):
    return make(wall_seconds=3.0, cpu_seconds=1)


@pytest.mark.parametrize("name", CHEATS)
@pytest.mark.parametrize("tests", [TARGET, LOOPED, GENERIC], ids=["inputs", "loop", "mixed"])
def test_no_cheat_earns_anything(strict, name, tests):
    value, reason = judge(strict, CHEATS[name], tests, entry_point="f")
    assert value == 0.0, reason


def test_a_helper_of_the_task_cannot_be_replaced(all_tests):
    prompt = (
        "def poly(c, x):\n    return sum(a * x ** i for i, a in enumerate(c))\n\n"
        'def find_zero(c):\n    """Find x with poly(c, x) == 0."""\n'
    )
    tests = (
        "def check(candidate):\n    for c in ([1, 1], [-4, 2]):\n"
        "        assert abs(poly(c, candidate(c))) < 1e-6\n"
    )
    right = "def find_zero(c): return -c[0] / c[1]"
    cheat = "def poly(c, x): return 0\ndef find_zero(c): return 5"
    columns = {"prompt": prompt, "entry_point": "find_zero"}
    assert judge(all_tests, right, tests, **columns)[0] == 1.0
    assert judge(all_tests, cheat, tests, **columns)[0] == 0.0


def test_a_test_that_asks_the_candidate_twice_asks_the_reference(all_tests):
    tests = "def check(candidate):\n    assert tuple(candidate([2, 1])) == tuple(f([2, 1]))\n"
    prompt = 'def f(x):\n    """Sort."""\n'
    columns = {"prompt": prompt, "entry_point": "f", "reference": "    return sorted(x)\n"}
    assert judge(all_tests, "def f(x): return sorted(x)", tests, **columns)[0] == 1.0
    assert judge(all_tests, "def f(x): return x", tests, **columns)[0] == 0.0


def test_arguments_of_a_test_are_out_of_reach(all_tests):
    tests = LOOPED.replace("(3, 4)", "([1, 2], [3])").replace("i * i", "sum(i)")
    cheat = "def f(x):\n    x.clear()\n    return 0"
    assert judge(all_tests, cheat, tests, entry_point="f")[0] == 0.0
    assert judge(all_tests, "def f(x): return sum(x)", tests, entry_point="f")[0] == 1.0
