"""A reward function in a worker process: a hang is killed, a crash costs one batch's verdicts.

Arguments and answers travel as JSON: strings, numbers, true/false, None, and lists and dictionaries
of those (tuples arrive as lists). Anything else in a column is refused by name. The worker inherits
the environment and is started again at the next call after it was killed.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from typing import Any

from sparring.errors import RewardError
from sparring.rewards.process import START_SECONDS, LineProcess
from sparring.rewards.signatures import Parameters


class WorkerCrash(RuntimeError):
    """The worker process ended while it was judging."""


class RemoteError(RuntimeError):
    """The function raised in its worker: the traceback there, and the error's type as kind."""

    def __init__(self, traceback: str, *, kind: str) -> None:
        super().__init__(traceback)
        self.kind = kind


class IsolatedFunction:
    """Stands for a reward function that lives in a worker process."""

    def __init__(self, name: str, knobs: Mapping[str, Any]) -> None:
        """Start the worker and load the function there. Raises RewardError if that fails."""
        self._name, self._knobs = name, dict(knobs)
        self._process: LineProcess | None = None
        self.short_name, self.parameters = self._start()

    def __call__(self, arguments: Mapping[str, Any], *, num_samples: int, seconds: float) -> Any:
        """Judge in the worker. Raises TimeoutError, WorkerCrash or RemoteError."""
        log_extra, log_metric = arguments.get("log_extra"), arguments.get("log_metric")
        plain = {
            key: value for key, value in arguments.items() if key not in ("log_extra", "log_metric")
        }
        for key, value in plain.items():
            where = _not_plain(value)
            if where:
                raise RewardError(
                    f"reward '{self._name}' runs isolated, and '{key}' holds {where}, which cannot "
                    "be sent to its process; allowed: strings, numbers, booleans, None, and lists "
                    "and dictionaries (with string keys) of those"
                )
        if self._process is None:
            self._start()
        process = self._process
        assert process is not None, "_start raises or sets it"
        deadline = time.monotonic() + seconds
        try:
            process.send({"arguments": plain, "num_samples": num_samples}, deadline)
            answer = process.receive(deadline)
        except (TimeoutError, EOFError) as error:
            self.close()
            if isinstance(error, EOFError):
                raise WorkerCrash(f"the worker of reward '{self._name}' {error}") from None
            raise
        if "contract" in answer:
            raise RewardError(answer["contract"])
        if "traceback" in answer:
            raise RemoteError(answer["traceback"], kind=answer["kind"])
        for column, values in answer["extras"].items():
            if log_extra is not None:
                log_extra(column, values)
        for metric, value in answer["metrics"].items():
            if log_metric is not None:
                log_metric(metric, value)
        return answer["values"]

    def close(self) -> None:
        """Kill the worker; the next call starts a new one."""
        if self._process is not None:
            self._process.kill()
            self._process = None

    def _start(self) -> tuple[str, Parameters]:
        search_path = [entry for entry in sys.path if entry]
        code = (
            "import json, sys; sys.path[:] = json.loads(sys.argv[1]);"
            "from sparring.rewards.isolation_worker import main; main()"
        )
        process = LineProcess(isolated_command(code, search_path), environment=None, quiet=False)
        deadline = time.monotonic() + START_SECONDS
        try:
            process.send({"name": self._name, "knobs": self._knobs}, deadline)
            answer = process.receive(deadline)
        except (TimeoutError, EOFError) as error:
            process.kill()
            raise RewardError(
                f"reward '{self._name}': its worker process could not load it: {error}"
            ) from error
        if "contract" in answer:
            process.kill()
            raise RewardError(answer["contract"])
        self._process = process
        fields = answer["parameters"]
        parameters = Parameters(
            names=frozenset(fields["names"]),
            required=frozenset(fields["required"]),
            knobs=frozenset(fields["knobs"]),
            required_knobs=frozenset(),
            takes_all=fields["takes_all"],
            is_async=False,
        )
        return answer["short_name"], parameters


def isolated_command(code: str, search_path: list[str]) -> list[str]:
    """A fresh interpreter that runs `code` with this process's module search path."""
    return [sys.executable, "-P", "-c", code, json.dumps(search_path)]


def _not_plain(value: Any) -> str:
    """The name of the first type inside `value` that is no JSON, "" if all of it is."""
    if value is None or isinstance(value, str | int | float | bool):
        return ""
    if isinstance(value, list | tuple):
        return next((found for found in map(_not_plain, value) if found), "")
    if isinstance(value, Mapping):
        for key, item in value.items():
            found = "a dictionary with keys that are no strings" if not isinstance(key, str) else ""
            found = found or _not_plain(item)
            if found:
                return found
        return ""
    return f"a {type(value).__name__}"
