"""The records of a run: what is written into its directory, and the one way to read it back.

    recipe.toml        the resolved recipe       environment.json   versions, hardware, commit
    metrics.jsonl      a line a step             evaluations.jsonl  a line an evaluation
    events.jsonl       warnings, checkpoints     summary.json       written when the run is done
    rollouts/step_000001.jsonl, rollouts/eval_000000.jsonl          a line a completion

Step N is the state after N optimizer steps. Checkpoints and `final/` lie in the same directory but
are written by train/. Nothing is drawn here, and no number is computed.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Literal

from sparring.errors import RunDirectoryError, RunError

RECIPE, ENVIRONMENT, SUMMARY = "recipe.toml", "environment.json", "summary.json"
METRICS, EVALUATIONS, EVENTS = "metrics.jsonl", "evaluations.jsonl", "events.jsonl"
ROLLOUTS, CHECKPOINTS, FINAL = "rollouts", "checkpoints", "final"

EventKind = Literal["start", "resume", "warning", "note", "checkpoint", "interrupt", "done"]
RolloutKind = Literal["step", "eval"]

_ROLLOUT_FILE = re.compile(r"(step|eval)_(\d{6,})\.jsonl")
_SIGNS_OF_A_RUN = (RECIPE, METRICS, SUMMARY, CHECKPOINTS, FINAL)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """Numbers of one optimizer step; None where a number was not finite."""

    step: int
    metrics: Mapping[str, float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRecord:
    """What an evaluation after `step` optimizer steps found."""

    step: int
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened once, in words."""

    step: int
    kind: EventKind
    message: str


class RunLog:
    """An open run directory, held by this process alone until `close` (or the end of its `with`).

    Every record goes to the file as it is made, past any buffer. A write that fails, a full disk
    say, raises RunError; what was written before stays readable.
    """

    def __init__(self, directory: Path, lock: int) -> None:
        """Use `create` or `reopen`."""
        self.directory = directory
        self._lock = lock
        self._files: dict[str, FileIO] = {}

    @classmethod
    def create(cls, directory: str | Path) -> RunLog:
        """Start a run in a directory that holds none; it is made if it is not there.

        Raises RunDirectoryError where it holds a run, cannot be written, or is in use.
        """
        path = Path(directory)
        if holds_run(path):
            raise RunDirectoryError(
                f"{path.absolute()} already holds a run; go on with it by --resume, or choose"
                " another directory with --run.dir"
            )
        return cls(path, _lock(path))

    @classmethod
    def reopen(cls, directory: str | Path, *, step: int) -> RunLog:
        """Go on with a run after `step` optimizer steps: records of later steps are removed.

        Raises RunDirectoryError where the directory cannot be written or is in use.
        """
        path = Path(directory)
        log = cls(path, _lock(path))
        with _writing(path):
            for name in (METRICS, EVALUATIONS, EVENTS):
                _truncate(path / name, step)
            for file in (path / ROLLOUTS).glob("*.jsonl"):
                found = _ROLLOUT_FILE.fullmatch(file.name)
                if found and int(found.group(2)) > step:
                    file.unlink()
            (path / SUMMARY).unlink(missing_ok=True)
        return log

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files and let go of the directory."""
        for file in self._files.values():
            file.close()
        self._files.clear()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def discard(self) -> None:
        """Remove the records of a run that never trained, and its directory if that is empty."""
        for file in self._files.values():
            file.close()
        self._files.clear()
        with _writing(self.directory):
            for name in (RECIPE, ENVIRONMENT, SUMMARY, METRICS, EVALUATIONS, EVENTS):
                (self.directory / name).unlink(missing_ok=True)
            for path in (self.directory / ROLLOUTS).glob("*.jsonl"):
                if _ROLLOUT_FILE.fullmatch(path.name):
                    path.unlink()
            for folder in (self.directory / ROLLOUTS, self.directory):
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()

    def recipe(self, text: str) -> None:
        """Write the resolved recipe."""
        _replace(self.directory / RECIPE, text)

    def environment(self, values: Mapping[str, Any]) -> None:
        """Write environment.json: versions, hardware and commit, see `environment.describe`."""
        _replace(self.directory / ENVIRONMENT, _json(values, indent=2) + "\n")

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a step's numbers; one that is not finite is written as null."""
        self._append(METRICS, {"step": step, **metrics})

    def evaluation(self, step: int, values: Mapping[str, Any]) -> None:
        """Append what an evaluation found."""
        self._append(EVALUATIONS, {"step": step, **values})

    def event(self, step: int, kind: EventKind, message: str) -> None:
        """Append something that happened once."""
        self._append(EVENTS, asdict(Event(step=step, kind=kind, message=message)))

    def rollouts(
        self, step: int, rows: Sequence[Mapping[str, Any]], *, kind: RolloutKind = "step"
    ) -> None:
        """Write the completions of a step or an evaluation, a row each, as one whole file."""
        text = "".join(_json(row) + "\n" for row in rows)
        _replace(self.directory / ROLLOUTS / f"{kind}_{step:06d}.jsonl", text)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Write summary.json, which says that the run is done."""
        _replace(self.directory / SUMMARY, _json(values, indent=2) + "\n")

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        path = self.directory / name
        with _writing(path):
            if name not in self._files:
                self._files[name] = path.open("ab", buffering=0)
            left = memoryview((_json(row) + "\n").encode("utf-8", errors="backslashreplace"))
            while left:
                left = left[self._files[name].write(left) :]


def holds_run(directory: str | Path) -> bool:
    """Whether a run was started in this directory."""
    return any((Path(directory) / name).exists() for name in _SIGNS_OF_A_RUN)


def find_runs(directory: str | Path) -> list[Path]:
    """The run directories at or below a directory, sorted by path."""
    root = Path(directory)
    return sorted({path.parent for path in root.rglob(RECIPE) if holds_run(path.parent)})


def read_steps(directory: str | Path) -> list[StepRecord]:
    """The steps of a run in order, also while it is being written."""
    rows = _read_lines(Path(directory) / METRICS)
    return [StepRecord(step=row.pop("step"), metrics=row) for row in rows]


def read_evaluations(directory: str | Path) -> list[EvaluationRecord]:
    """The evaluations of a run in order."""
    rows = _read_lines(Path(directory) / EVALUATIONS)
    return [EvaluationRecord(step=row.pop("step"), values=row) for row in rows]


def read_events(directory: str | Path) -> list[Event]:
    """The events of a run in order."""
    return [Event(**row) for row in _read_lines(Path(directory) / EVENTS)]


def read_rollouts(
    directory: str | Path, step: int, *, kind: RolloutKind = "step"
) -> list[dict[str, Any]]:
    """The completions of a step or an evaluation; empty where none were written."""
    return list(_read_lines(Path(directory) / ROLLOUTS / f"{kind}_{step:06d}.jsonl"))


def rollout_steps(directory: str | Path, *, kind: RolloutKind = "step") -> list[int]:
    """The steps whose completions were written, ascending."""
    names = [path.name for path in (Path(directory) / ROLLOUTS).glob(f"{kind}_*.jsonl")]
    found = [_ROLLOUT_FILE.fullmatch(name) for name in names]
    return sorted(int(match.group(2)) for match in found if match)


def read_summary(directory: str | Path) -> dict[str, Any] | None:
    """summary.json, or None while the run is not done."""
    return _read_object(Path(directory) / SUMMARY)


def read_environment(directory: str | Path) -> dict[str, Any] | None:
    """environment.json, or None where there is none."""
    return _read_object(Path(directory) / ENVIRONMENT)


def _lock(path: Path) -> int:
    """An open descriptor that holds the directory for this process."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(f"no right to write into {path}")
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise RunDirectoryError(
            f"{path.absolute()} cannot be a run directory: {error}; choose another with --run.dir"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise RunDirectoryError(
            f"{path.absolute()} is being written by another process; wait for it, end it, or choose"
            " another directory with --run.dir"
        ) from None
    return descriptor


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{path.absolute()} cannot be written: {error.strerror or error}; the last checkpoint"
            " is intact: make room, then go on with --resume"
        ) from error


def _replace(path: Path, text: str) -> None:
    """Write a whole file, or leave the one that was there."""
    partial = path.with_name(f".{path.name}.partial")
    with _writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open(
                "w", encoding="utf-8", errors="backslashreplace", newline="\n"
            ) as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


def _truncate(path: Path, step: int) -> None:
    """Keep the whole lines of steps up to `step`."""
    if path.exists():
        _replace(
            path, "".join(_json(row) + "\n" for row in _read_lines(path) if row["step"] <= step)
        )


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file that may still grow: a last line without its end is left out."""
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise RunDirectoryError(
                f"{path.absolute()}:{number}: not a line of JSON ({error}); records are written by"
                " Sparring alone: restore the file, or remove the line"
            ) from error
    return rows


def _read_object(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunDirectoryError(f"{path.absolute()}: not JSON: {error}") from error
    return found


def _json(value: object, *, indent: int | None = None) -> str:
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False, indent=indent)


def _plain(value: object) -> object:
    """The value as strict JSON holds it: null for a number that is not finite, else text."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value)
