"""The reward `code`: does the program in the completion pass the row's tests?

The last code block runs in the sandbox and is given inputs alone. What it must answer stays here,
or, for tests that compute it, in a sandbox of their own: the program never shares a process with
what judges it, so exit codes, printed text and patched functions say nothing.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from sparring.errors import RewardError
from sparring.rewards.code_program import assemble, extract_code, prompt_text
from sparring.rewards.code_tests import Call, Tests, TestsError, parse_tests
from sparring.rewards.sandbox.ladder import SandboxLevel
from sparring.rewards.sandbox.limits import Limits
from sparring.rewards.sandbox.runner import Sandbox
from sparring.rewards.sandbox.runs import RunResult
from sparring.rewards.sandbox.values import Equality
from sparring.rewards.texts import full_texts

_MAX_WORKERS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeVerdict:
    """How many tests passed of how many; total 0 where no test ran.

    is_judged False: the row or the sandbox is broken, which says nothing of the program. code: the
    program that was run, None where there was none.
    """

    passed: int
    total: int
    reason: str
    is_judged: bool = True
    code: str | None = None

    def value(self, credit: str) -> float | None:
        """The reward: 1 for all tests and else 0 ("all"), or the share of tests ("share")."""
        if not self.is_judged:
            return None
        if credit == "share" and self.total:
            return self.passed / self.total
        return float(self.total > 0 and self.passed == self.total)


class _BatchOverError(Exception):
    """The batch's time ended before this program could be judged."""


class CodeReward:
    """1.0 for a program that passes its tests, 0.0 for one that does not.

    None where a row's tests or the sandbox are broken.
    """

    def __init__(
        self,
        *,
        sandbox: Literal["full", "landlock+seccomp", "rlimits"] = "landlock+seccomp",
        credit: Literal["all", "share"] = "all",
        tolerance: float = 1e-9,
        wall_seconds: float = 10.0,
        cpu_seconds: int = 5,
        memory_mib: int = 1024,
        max_processes: int = 16,
        batch_seconds: float = 25.0,
        num_workers: int = 0,
        use_challenge_tests: bool = False,
        packages: Sequence[str] = (),
    ) -> None:
        """Start the sandbox; raises RewardError where this machine offers none that is good enough.

        sandbox: the weakest level allowed; "rlimits" isolates nothing. credit "share": the share of
        tests passed, which also pays constants. tolerance: relative, where either number is a
        float. cpu_seconds: of one program with all tests of a row (standard input: of each test);
        wall_seconds is longer, so that a busy machine changes no verdict. batch_seconds: what is
        not judged by then gets None; keep it below timeout_seconds. num_workers: programs at a
        time, 0: one a core. packages: folders that programs may import from.
        """
        for name, value in (("tolerance", tolerance), ("num_workers", num_workers)):
            if value < 0:
                raise RewardError(f"reward 'code': {name} = {value} must not be negative")
        if batch_seconds <= 0:
            raise RewardError(f"reward 'code': batch_seconds = {batch_seconds} must be positive")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2
        self._num_workers = max(2, num_workers or min(cores, _MAX_WORKERS))
        self._credit = credit
        self._tolerance = tolerance
        self._batch_seconds = batch_seconds
        self._use_challenge_tests = use_challenge_tests
        try:
            limits = Limits(
                wall_seconds=wall_seconds,
                cpu_seconds=cpu_seconds,
                memory_bytes=memory_mib << 20,
                max_processes=max_processes,
            )
        except ValueError as error:
            raise RewardError(f"reward 'code': {error}") from error
        self._sandbox = Sandbox(
            require=sandbox, num_workers=self._num_workers, limits=limits, packages=packages
        )

    @property
    def level(self) -> SandboxLevel:
        """The sandbox's level, for the run's records."""
        return self._sandbox.level

    def close(self) -> None:
        """End the sandbox."""
        self._sandbox.close()

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        tests: Sequence[Any],
        entry_point: Sequence[Any] | None = None,
        test_setup_code: Sequence[Any] | None = None,
        challenge_tests: Sequence[Any] | None = None,
        reference: Sequence[Any] | None = None,
        prefills: Sequence[str] | None = None,
        log_extra: Callable[..., None] | None = None,
        log_metric: Callable[..., None] | None = None,
    ) -> list[float | None]:
        """Judge a batch; `parse_tests` tells the shapes of the column `tests`.

        entry_point: the function under test. test_setup_code: runs before the tests.
        challenge_tests: further tests, used if asked for. reference: a right solution, for tests
        that use its names.
        """
        absent: list[Any] = [None] * len(completions)
        rows = [
            {
                "prompt": prompt_text(prompt),
                "tests": test,
                "entry_point": entry or "",
                "setup": setup or "",
                "challenge": challenge if self._use_challenge_tests else None,
                "reference": answer if isinstance(answer, str) else "",
            }
            for prompt, test, entry, setup, challenge, answer in zip(
                prompts,
                tests,
                entry_point or absent,
                test_setup_code or absent,
                challenge_tests or absent,
                reference or absent,
                strict=True,
            )
        ]
        verdicts = self.verdicts(full_texts(completions, prefills), rows)
        if log_extra is not None:
            log_extra("reason", [verdict.reason for verdict in verdicts])
            log_extra("passed", [verdict.passed for verdict in verdicts])
            log_extra("total", [verdict.total for verdict in verdicts])
            log_extra("answer", [verdict.code for verdict in verdicts])
            log_extra("sandbox", [self.level.name] * len(verdicts))
        if log_metric is not None and verdicts:
            shares = [v.passed / v.total for v in verdicts if v.total]
            log_metric("share_of_tests", sum(shares) / max(1, len(shares)))
            log_metric("share_without_code", sum(v.code is None for v in verdicts) / len(verdicts))
        return [verdict.value(self._credit) for verdict in verdicts]

    def verdicts(
        self, texts: Sequence[str], rows: Sequence[Mapping[str, Any]]
    ) -> list[CodeVerdict]:
        """A verdict on each completion (prefill included). Equal programs of equal rows run once.

        A row: prompt, tests, entry_point, setup, challenge, reference; all but tests may be "".
        """
        deadline = time.monotonic() + self._batch_seconds
        known: dict[str, Tests | str] = {}
        jobs: dict[tuple[str, str], Tests] = {}
        plan: list[tuple[str, str] | CodeVerdict] = []
        for text, row in zip(texts, rows, strict=True):
            key = repr(sorted(row.items()))
            if key not in known:
                known[key] = _tests_of(row)
            tests = known[key]
            code = extract_code(text)
            if isinstance(tests, str):
                plan.append(
                    CodeVerdict(passed=0, total=0, reason=tests, is_judged=False, code=code)
                )
            elif code is None:
                plan.append(CodeVerdict(passed=0, total=0, reason="no code after the thinking"))
            else:
                program = assemble(
                    code, prompt=str(row["prompt"]), entry_point=str(row["entry_point"])
                )
                jobs[key, program] = tests
                plan.append((key, program))
        found = _side_by_side(
            jobs, lambda job: self._judge(job[1], jobs[job], deadline), self._num_workers
        )
        return [
            entry if isinstance(entry, CodeVerdict) else _with_code(found[entry], entry[1])
            for entry in plan
        ]

    def _judge(self, program: str, tests: Tests, deadline: float) -> CodeVerdict:
        try:
            if tests.exchanges:
                return self._judge_exchanges(program, tests, deadline)
            if tests.calls:
                return self._judge_calls(program, tests, deadline)
            return self._judge_by_program(program, tests, deadline)
        except _BatchOverError:
            reason = f"not done within batch_seconds = {self._batch_seconds:g}"
            return CodeVerdict(passed=0, total=0, reason=reason, is_judged=False)

    def _run(
        self, deadline: float, run: Callable[[Limits], Sequence[RunResult]]
    ) -> Sequence[RunResult]:
        """Run in what is left of the batch's time; raises _BatchOverError if it is too little."""
        limits = self._sandbox.limits
        left = deadline - time.monotonic()
        if left <= 0:
            raise _BatchOverError
        results = run(replace(limits, wall_seconds=min(limits.wall_seconds, left)))
        if left < limits.wall_seconds and any(one.status == "time_limit" for one in results):
            raise _BatchOverError
        return results

    def _run_one(self, program: str, deadline: float, **arguments: Any) -> RunResult:
        """One program in one sandbox."""
        return self._run(
            deadline, lambda limits: [self._sandbox.run(program, limits=limits, **arguments)]
        )[0]

    def _equality(self, tests: Tests) -> Equality:
        return Equality(
            tolerance=self._tolerance,
            tuple_is_list=tests.is_json,
            int_is_bool=not tests.is_json,
        )

    def _judge_calls(self, program: str, tests: Tests, deadline: float) -> CodeVerdict:
        calls = [
            {"function": call.function, "args": list(call.args), "kwargs": call.kwargs}
            for call in tests.calls
        ]
        result = self._run_one(program, deadline, mode="calls", calls=calls)
        if not result.is_judged:
            return _unjudged(result)
        equality = self._equality(tests)
        replies = _replies_by_index(result.replies)
        passed, complaint = 0, ""
        for index, call in enumerate(tests.calls):
            reply = replies.get(index)
            if (
                reply is not None
                and "value" in reply
                and call.check.accepts(reply["value"], equality)
            ):
                passed += 1
            elif not complaint:
                complaint = _complaint(call, reply, result)
        return _verdict(passed, len(tests.calls), complaint)

    def _judge_exchanges(self, program: str, tests: Tests, deadline: float) -> CodeVerdict:
        passed, complaint = 0, ""
        for index, exchange in enumerate(tests.exchanges):
            result = self._run_one(program, deadline, stdin=exchange.stdin)
            if not result.is_judged:
                return _unjudged(result)
            if result.status == "ok" and same_lines(exchange.stdout, result.stdout):
                passed += 1
                continue
            if not complaint:
                what = "other output" if result.status == "ok" else _ending(result)
                complaint = f"test {index + 1}: {what}"
            if self._credit == "all":
                break
        return _verdict(passed, len(tests.exchanges), complaint)

    def _judge_by_program(self, program: str, tests: Tests, deadline: float) -> CodeVerdict:
        request = {
            "program": tests.program,
            "equality": [*self._equality(tests)],
            "stop_early": self._credit == "all",
        }
        trusted, served = self._run(
            deadline, lambda limits: self._sandbox.run_tests(program, request, limits=limits)
        )
        if not (trusted.is_judged and served.is_judged):
            return _unjudged(trusted if not trusted.is_judged else served)
        verdict = next((reply["verdict"] for reply in trusted.replies if "verdict" in reply), None)
        if verdict is None:
            return _verdict(0, 1, f"the tests did not end: {_ending(trusted)}")
        passed, failed = int(verdict["passed"]), int(verdict["failed"])
        complaint = str(verdict["first_failure"])
        if verdict["error"]:
            if not verdict["num_calls"]:
                reason = f"the tests fail before they call the program: {verdict['error']}"
                return CodeVerdict(passed=0, total=0, reason=reason, is_judged=False)
            # It ended half-way: how many assertions were left is not known, so none counts.
            passed, failed = 0, max(1, passed + failed)
            complaint = complaint or str(verdict["error"])
        if served.status not in ("ok", "stopped"):
            complaint = f"{complaint} ({_ending(served)})"
        if passed + failed == 0:
            return CodeVerdict(
                passed=0, total=0, reason="no assertion was reached", is_judged=False
            )
        return _verdict(passed, passed + failed, complaint)


_Job = TypeVar("_Job")


def _side_by_side(
    jobs: Iterable[_Job], judge: Callable[[_Job], CodeVerdict], num_threads: int
) -> dict[_Job, CodeVerdict]:
    """Judge all jobs in some threads; raises the first error. An exit does not wait for them."""
    waiting = deque(jobs)
    found: dict[_Job, CodeVerdict] = {}
    errors: list[BaseException] = []

    def work() -> None:
        while waiting and not errors:
            try:
                job = waiting.popleft()
            except IndexError:  # another thread took the last one
                return
            try:
                found[job] = judge(job)
            except BaseException as error:  # it is raised again in the caller's thread
                errors.append(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return found


def same_lines(expected: str, actual: str) -> bool:
    """Whether two outputs agree line by line, without blanks at line ends and empty last lines."""
    return _lines(expected) == _lines(actual)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.replace("\r\n", "\n").rstrip().split("\n")]


def _tests_of(row: Mapping[str, Any]) -> Tests | str:
    """The row's tests, or why they cannot be understood."""
    tests = row["tests"]
    if row["challenge"] and isinstance(tests, Sequence) and not isinstance(tests, str):
        tests = [*tests, *row["challenge"]]
    try:
        return parse_tests(
            tests,
            entry_point=str(row["entry_point"]),
            setup=str(row["setup"]),
            prompt=str(row["prompt"]),
            reference=str(row["reference"]).replace("\r\n", "\n"),
        )
    except TestsError as error:
        return str(error)


def _with_code(verdict: CodeVerdict, program: str) -> CodeVerdict:
    return CodeVerdict(
        passed=verdict.passed,
        total=verdict.total,
        reason=verdict.reason,
        is_judged=verdict.is_judged,
        code=program,
    )


def _verdict(passed: int, total: int, complaint: str) -> CodeVerdict:
    reason = f"passed {passed} of {total}" + (f"; {complaint}" if complaint else "")
    return CodeVerdict(passed=passed, total=total, reason=reason)


def _unjudged(result: RunResult) -> CodeVerdict:
    reason = f"the sandbox failed ({result.status}): {'; '.join(result.notes)}"
    return CodeVerdict(passed=0, total=0, reason=reason, is_judged=False)


def _replies_by_index(replies: Sequence[Any]) -> dict[int, dict[str, Any]]:
    """The first reply to each call; a program that forges more gains nothing by it."""
    found: dict[int, dict[str, Any]] = {}
    for reply in replies:
        if isinstance(reply, dict):
            index = reply.get("index")
            if type(index) is int:
                found.setdefault(index, reply)
    return found


def _complaint(call: Call, reply: Mapping[str, Any] | None, result: RunResult) -> str:
    if reply is None:
        loads = [r["load"] for r in result.replies if isinstance(r, dict) and "load" in r]
        return f"{call.source}: {str(loads[0])[:300] if loads else _ending(result)}"
    if "value" in reply:
        return f"{call.source}: gave {str(reply['value'])[:200]}"
    return f"{call.source}: {str(reply.get('error'))[:300]}"


def _ending(result: RunResult) -> str:
    if result.status == "error":
        last = result.stderr.strip().splitlines()[-1:] or [f"exit code {result.exit_code}"]
        return last[0][:300]
    if result.status == "signal":
        return f"ended by signal {result.signal}"
    return result.status.replace("_", " ")
