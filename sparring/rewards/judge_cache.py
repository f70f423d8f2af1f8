"""Verdicts on disk by the hash of all that led to them: never a failure, never a key."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

from sparring.errors import RewardError
from sparring.rewards.judge_prompt import JudgeVerdict


class JudgeCache:
    """A folder of small JSON files, and what was read or written in this process.

    folder: where, made if absent; None keeps verdicts in memory alone. Raises RewardError where the
    folder cannot be made. Several runs may share a folder.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._known: dict[str, JudgeVerdict] = {}
        self.num_write_errors = 0
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise RewardError(
                    f"reward 'judge': cache = {str(folder.absolute())!r} cannot be made: {error}; "
                    'give another folder, or cache = "" for none'
                ) from error

    def get(self, key: str) -> JudgeVerdict | None:
        """The verdict under `key`; a file that cannot be read counts as absent."""
        if key not in self._known and self._folder is not None:
            try:
                document = json.loads(self._path(self._folder, key).read_text(encoding="utf-8"))
                probability, raw = document["probability"], document["raw"]
            except (OSError, ValueError, KeyError, TypeError):
                return None
            if not isinstance(probability, float) or not 0 <= probability <= 1:
                return None
            self._known[key] = JudgeVerdict(probability, str(raw))
        return self._known.get(key)

    def put(self, key: str, verdict: JudgeVerdict) -> None:
        """Keep a verdict. A disk that cannot be written is counted and costs nothing else."""
        self._known[key] = verdict
        if self._folder is None:
            return
        path = self._path(self._folder, key)
        fresh = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
        try:
            path.parent.mkdir(exist_ok=True)
            document = {"probability": float(verdict.probability), "raw": verdict.raw}
            fresh.write_text(json.dumps(document), encoding="utf-8")
            os.replace(fresh, path)
        except OSError:
            self.num_write_errors += 1

    @staticmethod
    def _path(folder: Path, key: str) -> Path:
        return folder / key[:2] / f"{key}.json"


def cache_key(parts: Any) -> str:
    """The hash of a JSON document, whatever the order of its keys."""
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
