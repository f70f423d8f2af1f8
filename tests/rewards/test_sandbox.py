"""The sandbox's parts: levels and refusal, results, filter, cleaning, and leaving nothing."""

from __future__ import annotations

import errno
import gc
import json
import os
import struct
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sparring.errors import RewardError, RunError
from sparring.rewards.sandbox import run_directory, seccomp, server
from sparring.rewards.sandbox.ladder import FULL, LANDLOCK, LEVELS, RLIMITS, find_fault
from sparring.rewards.sandbox.limits import Limits
from sparring.rewards.sandbox.python_tool import run_python
from sparring.rewards.sandbox.runner import Sandbox, run_level
from sparring.rewards.sandbox.syscalls import numbers


@pytest.fixture(scope="module")
def sandbox():
    """The strongest sandbox that this machine offers."""
    try:
        made = Sandbox()
    except RewardError as error:
        pytest.skip(f"this machine offers no isolating level: {error}")
    with made:
        yield made


# the ladder


def test_level_is_found_by_self_test_and_recorded(sandbox):
    level = run_level()
    assert level == sandbox.level
    record = json.loads(json.dumps(level.to_json()))
    assert record["name"] in (FULL, LANDLOCK)
    assert record["landlock_abi"] >= 1
    assert len(record["failures"]) == LEVELS.index(level.name)


def test_unknown_level_names_the_known():
    with pytest.raises(RewardError, match="full, landlock\\+seccomp, rlimits"):
        Sandbox(require="chroot")


def test_a_level_that_fails_is_refused_with_reasons(monkeypatch):
    def refuse(level, **_):
        raise server.ServerError(f"no {level} here")

    monkeypatch.setattr(server, "start", refuse)
    with pytest.raises(RewardError) as caught:
        Sandbox(require=LANDLOCK)
    assert "no full here" in str(caught.value)
    assert "no landlock+seccomp here" in str(caught.value)
    assert "no rlimits here" not in str(caught.value), "never asked for, never tried"


def test_ladder_goes_down_when_a_step_fails(monkeypatch):
    real = server.start

    def start(level, **arguments):
        if level == FULL:
            raise server.ServerError("unshare: Operation not permitted")
        return real(level, **arguments)

    monkeypatch.setattr(server, "start", start)
    try:
        with Sandbox() as weaker:
            assert weaker.level.name == LANDLOCK
            assert weaker.level.failures == ("full: unshare: Operation not permitted",)
            result = weaker.run("print(6 * 7)")
            assert (result.stdout, result.level) == ("42\n", LANDLOCK)
    except RewardError as error:
        pytest.skip(f"this machine does not offer {LANDLOCK}: {error}")


def test_rlimits_only_warns_loudly():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            weak = Sandbox(require=RLIMITS, strongest=RLIMITS)
        except RewardError as error:
            pytest.skip(f"this machine does not offer the level {RLIMITS}: {error}")
    assert any("can read your files" in str(one.message) for one in caught)
    with weak:
        result = weak.run("print(input())", stdin="hello")
        assert (result.stdout, result.level) == ("hello\n", RLIMITS)
        assert weak.run("while True: pass", limits=Limits(wall_seconds=0.3)).status == "time_limit"


GOOD_PROBE = {
    "library": "",
    "write here": 0,
    "start a thread": 0,
    "read a file": errno.EACCES,
    "write a file": errno.EACCES,
    "make a file": errno.EACCES,
    "list a folder": errno.EACCES,
    "read an environment": errno.EACCES,
    "signal a process": errno.ESRCH,
    "open a socket": errno.EPERM,
    "start a program": errno.EPERM,
    "enter a namespace": -1,
    "raise a limit": errno.EPERM,
    "user": 65534,
    "names": [],
}


@pytest.mark.parametrize("name", [name for name, value in GOOD_PROBE.items() if type(value) is int])
def test_self_test_notices_every_leak(name):
    assert find_fault(FULL, GOOD_PROBE) == ""
    leaky = {**GOOD_PROBE, name: errno.EACCES if name in ("write here", "start a thread") else 0}
    assert find_fault(FULL, leaky) != ""
    assert find_fault(LANDLOCK, {**GOOD_PROBE, "library": "no heapq"}) != ""


def test_a_step_of_containment_that_fails_starts_nothing(sandbox, tmp_path):
    limits = Limits(cpu_seconds=2**70)  # no kernel takes that
    result = sandbox.run("print('ran')", limits=limits)
    assert result.status == "not_started"
    assert not result.is_judged
    assert result.stdout == ""
    assert "containment failed" in result.notes[0]
    assert sandbox.run("print('next')").stdout == "next\n"


# results


def test_results_tell_how_a_program_ended(sandbox):
    result = sandbox.run(
        "import sys\nprint(input())\nsys.stderr.write('e')\nsys.exit(3)", stdin="a"
    )
    assert (result.status, result.exit_code) == ("error", 3)
    assert (result.stdout, result.stderr) == ("a\n", "e")
    assert result.seconds < 5
    assert sandbox.run("raise SystemExit('bye')").stderr == "bye\n"
    assert sandbox.run("import sys\nsys.exit()").status == "ok"
    printed = "import atexit, threading, time\natexit.register(print, 'last')\n"
    printed += (
        "threading.Thread(target=lambda: (time.sleep(0.1), print('thread'))).start()\nprint('main')"
    )
    assert sandbox.run(printed).stdout == "main\nthread\nlast\n"
    ended = "class A:\n    def __del__(self): print('end')\na = A()\nprint('x')"
    assert sandbox.run(ended).stdout == "x\nend\n"


def test_tracebacks_show_the_program_alone(sandbox):
    result = sandbox.run("def f():\n    return 1 / 0\nf()")
    assert 'program.py", line 2, in f' in result.stderr
    assert "sparring" not in result.stderr.replace("sparring-sandbox", "")


def test_ordinary_library_use_works(sandbox):
    program = """
import asyncio, collections, csv, dataclasses, datetime, decimal, io, json, queue, re, sqlite3
import statistics, subprocess, tempfile, threading, urllib.parse, uuid, zoneinfo
from concurrent.futures import ThreadPoolExecutor
async def double(x):
    await asyncio.sleep(0.001)
    return 2 * x
print(asyncio.run(double(21)))
print(sum(ThreadPoolExecutor(2).map(abs, [-1, -2])))
with tempfile.TemporaryFile() as file:
    file.write(b"x")
print(sqlite3.connect(":memory:").execute("select 1 + 1").fetchone())
print(datetime.datetime(2024, 1, 1, tzinfo=zoneinfo.ZoneInfo("UTC")).isoformat())
"""
    result = sandbox.run(program)
    expected = "42\n3\n(2,)\n2024-01-01T00:00:00+00:00\n"
    assert result.stdout == expected, result.stderr


def test_packages_are_importable_only_where_listed(tmp_path):
    package = tmp_path / "lib"
    package.mkdir()
    (package / "my_package.py").write_text("VALUE = 5\n")
    for folder in (tmp_path, package):
        folder.chmod(0o755)
    program = "import my_package\nprint(my_package.VALUE)"
    try:
        with Sandbox(packages=[str(package)]) as allowed, Sandbox() as bare:
            assert allowed.run(program).stdout == "5\n"
            assert "ModuleNotFoundError" in bare.run(program).stderr
    except RewardError as error:
        pytest.skip(f"this machine offers no isolating level: {error}")


def test_hash_order_is_the_same_in_every_run(sandbox):
    program = "print({'alpha', 'beta', 'gamma', 'delta'})"
    assert len({sandbox.run(program).stdout for _ in range(4)}) == 1


def test_python_tool(sandbox):
    result = run_python("x = [1, 2]\nprint('hi')\nx + [3.5]", sandbox=sandbox)
    assert (result.stdout, result.value, result.value_text) == ("hi\n", [1, 2, 3.5], "[1, 2, 3.5]")
    assert run_python("x = 1", sandbox=sandbox).value_text == ""
    odd = run_python("object", sandbox=sandbox)
    assert (odd.value, odd.value_text) == (None, "<class 'object'>")
    failed = run_python("1 / 0", sandbox=sandbox)
    assert failed.status == "error"
    assert "ZeroDivisionError" in failed.stderr
    assert run_python("int(input()) * 2", sandbox=sandbox, stdin="4").value == 8
    colliding = "{n * (2**61 - 1) for n in range(3000)}"  # all of one hash: never rebuilt here
    assert run_python(colliding, sandbox=sandbox).value is None


def test_limits_must_be_positive():
    with pytest.raises(ValueError, match="wall_seconds is 0"):
        Limits(wall_seconds=0)
    with pytest.raises(RewardError, match="num_workers"):
        Sandbox(num_workers=1)


# many runs


def test_threads_share_a_sandbox(sandbox):
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(lambda n: sandbox.run(f"print({n} ** 2)"), range(40)))
    assert [int(result.stdout) for result in results] == [n**2 for n in range(40)]


def test_a_server_that_is_killed_is_replaced(sandbox):
    victims = sandbox.server_pids
    box = {}

    def work():
        box["result"] = sandbox.run("import time\ntime.sleep(30)")

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.3)
    (busy,) = set(victims) - set(sandbox.server_pids)
    os.kill(busy, 9)
    thread.join(10)
    assert box["result"].status == "lost"
    assert not box["result"].is_judged
    assert len(sandbox.server_pids) == len(victims)
    assert all(sandbox.run("print(1)").stdout == "1\n" for _ in range(4))


TRAINER = """
import sys, threading, time
from sparring.rewards.sandbox.runner import Sandbox
made = Sandbox(require=sys.argv[1], strongest=sys.argv[1])
pids = made.server_pids
threading.Thread(target=made.run, args=("import time; time.sleep(60)",), daemon=True).start()
time.sleep(0.3)
print(*pids, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("level", [FULL, LANDLOCK])
def test_nothing_outlives_a_trainer_that_is_killed(sandbox, level):
    command = [sys.executable, "-c", TRAINER, level]
    before = temporary_files()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    ) as trainer:
        assert trainer.stdout is not None
        line = trainer.stdout.readline().split()
        servers = [int(word) for word in line]
        alive = [one for pid in servers for one in [pid, *map(int, all_below(pid))]]
        scores = [Path(f"/proc/{pid}/oom_score_adj").read_text().strip() for pid in alive]
        assert set(scores) <= {"1000"}, "if memory runs out, programs go first"
        trainer.kill()
    if not servers:
        pytest.skip(f"this machine does not offer the level {level}")
    assert len(alive) > len(servers)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and any(os.path.exists(f"/proc/{pid}") for pid in alive):
        time.sleep(0.02)
    assert not [pid for pid in alive if os.path.exists(f"/proc/{pid}")]
    assert temporary_files() == before


def all_below(pid: int) -> list[str]:
    return [one for child in children(pid) for one in [child, *all_below(int(child))]]


def test_a_closed_sandbox_says_so():
    try:
        closed = Sandbox()
    except RewardError as error:
        pytest.skip(f"this machine offers no isolating level: {error}")
    closed.close()
    closed.close()
    with pytest.raises(RunError, match="closed"):
        closed.run("print(1)")


def leave_nothing(num_runs: int) -> None:
    programs = [
        "print(1)",
        "open('x', 'w').write('x' * 1000)",
        "import os\nif os.fork() == 0:\n    import time\n    time.sleep(9)",
        "1 / 0",
        "import os\nos.mkdir('a', 0)\nos.abort()",
    ]
    for level in (FULL, LANDLOCK):
        before = (descriptors(), temporary_files(), children())
        try:
            with Sandbox(require=level, strongest=level) as made, ThreadPoolExecutor(2) as threads:
                first = programs[:1] * 4
                list(threads.map(made.run, first))
                held = descriptors()
                results = threads.map(
                    lambda n: made.run(programs[n % len(programs)]), range(num_runs)
                )
                found = Counter(result.status for result in results)
                assert set(found) <= {"ok", "error", "signal"}
                assert descriptors() == held
                servers = [pid for pid in made.server_pids if level == LANDLOCK]
                assert not [one for pid in servers for one in children(pid)]
        except RewardError:
            continue  # a level that is not offered leaves nothing either
        gc.collect()
        assert (descriptors(), temporary_files(), children()) == before


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def temporary_files() -> list[str]:
    return sorted(name for name in os.listdir(tempfile.gettempdir()) if "sparring-" in name)


def children(pid: int | None = None) -> list[str]:
    found = []
    for task in Path(f"/proc/{pid or 'self'}/task").iterdir():
        found += (task / "children").read_text().split()
    return sorted(found)


def test_runs_leave_no_process_file_or_descriptor(sandbox):
    leave_nothing(100)


@pytest.mark.slow
def test_ten_thousand_runs_leave_no_process_file_or_descriptor(sandbox):
    leave_nothing(10_000)


# the filter, on both architectures


def judge(code: bytes, machine: str, number: int, *arguments: int, arch: int | None = None) -> int:
    """Interpret the filter as the kernel would; returns the action."""
    data = struct.pack("=iIQ", number & 0x7FFFFFFF, arch or seccomp.AUDIT_ARCH[machine], 0)
    data += b"".join(struct.pack("=Q", value & (2**64 - 1)) for value in (*arguments, *[0] * 6)[:6])
    program = [struct.unpack_from("=HBBI", code, 8 * index) for index in range(len(code) // 8)]
    position, accumulator = 0, 0
    while True:
        operation, if_true, if_false, value = program[position]
        position += 1
        if operation == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, value)
        elif operation == 0x54:
            accumulator &= value
        elif operation == 0x06:
            return value
        else:
            test = accumulator == value if operation == 0x15 else accumulator > value
            position += if_true if test else if_false


ALLOW, KILL = 0x7FFF0000, 0x80000000
DENY, UNKNOWN = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("namespaces", [True, False])
def test_filter_decides_as_written(machine, namespaces):
    table = numbers(machine)
    code = seccomp.build_filter(machine, namespaces=namespaces, pid=77)
    assert len(code) // 8 < 4096, "the kernel's bound"

    def action(name, *arguments):
        return judge(code, machine, table[name], *arguments)

    assert judge(code, machine, 0, arch=0x40000003) == KILL
    assert judge(code, machine, 451) == UNKNOWN
    assert judge(code, machine, 0x40000000 + 1) == UNKNOWN
    assert action("clone3") == UNKNOWN
    for name in ("socket", "ptrace", "execve", "mount", "io_uring_setup", "bpf", "setns"):
        assert action(name) == DENY
    assert action("clone", 17) == ALLOW
    for flag in (0x80, 0x20000, 0x10000000, 0x40000000):
        assert action("clone", 17 | flag) == DENY
    assert action("socketpair", 1, 1 | 0o2000000) == ALLOW
    assert action("socketpair", 1, 2) == DENY
    assert action("socketpair", 2, 1) == DENY
    read = 0 if machine == "x86_64" else 63
    assert judge(code, machine, read) == ALLOW
    outside = ALLOW if namespaces else DENY
    for name in ("kill", "tgkill"):
        assert action(name, 77, 9) == ALLOW
        for target in (1, -1, 0, 78):
            assert action(name, target, 9) == outside
    for name in ("fchmodat", "utimensat", "setsid", "truncate", "fchownat"):
        assert action(name) == outside
    for name in ("prlimit64", "sched_setaffinity"):
        assert (action(name, 0), action(name, 77), action(name, 5)) == (ALLOW, ALLOW, outside)
    assert action("setpriority", 0, 0) == ALLOW
    assert action("setpriority", 0, 9) == outside
    assert action("setpriority", 2, 0) == outside
    assert action("fcntl", 3, 1) == ALLOW
    assert action("fcntl", 3, 8) == outside
    assert action("fcntl", 3, 15) == outside


def test_tables_name_the_same_calls():
    old_calls_of_x86 = set(numbers("x86_64")) - set(numbers("aarch64"))
    assert set(numbers("aarch64")) <= set(numbers("x86_64"))
    assert old_calls_of_x86 == {
        *("mknod", "inotify_init", "iopl", "ioperm", "modify_ldt", "uselib", "sysfs", "ustat"),
        *("chmod", "chown", "lchown", "utime", "utimes", "futimesat"),
    }
    for machine in ("x86_64", "aarch64"):
        assert len(set(numbers(machine).values())) == len(numbers(machine))
    with pytest.raises(OSError, match="riscv64"):
        numbers("riscv64")


# cleaning


def test_any_tree_is_measured_and_removed(tmp_path):
    top = tmp_path / "top"
    (top / "shut" / "inner").mkdir(parents=True)
    (top / "shut" / "file").write_bytes(b"x" * 5000)
    (top / "outside").symlink_to(tmp_path / "kept")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("stays")
    current = os.getcwd()
    os.chdir(top)
    try:
        for _ in range(1500):
            os.mkdir("deep")
            os.chdir("deep")
    finally:
        os.chdir(current)
    assert not run_directory.is_over(str(top), max_bytes=1 << 30, max_files=10_000)
    assert run_directory.is_over(str(top), max_bytes=4096, max_files=10_000)
    assert run_directory.is_over(str(top), max_bytes=1 << 30, max_files=100)
    (top / "shut" / "inner").chmod(0)
    (top / "shut").chmod(0)
    run_directory.remove(str(top))
    assert sorted(os.listdir(tmp_path)) == ["kept"]
    assert (tmp_path / "kept" / "file").read_text() == "stays"
