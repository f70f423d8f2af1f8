"""`make` on machines that lack something: one message with the remedy, each time."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

PYTHON = """#!/bin/sh
# A pretended Python {version}: what it lacks is in its answers.
case "$*" in
  --version) echo "Python {version}" ;;
  *version_info*) exit {is_old} ;;
  *"import venv"*) exit {lacks_venv} ;;
  "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  *"pip install"*) echo "{pip_says}" >&2; exit {pip_fails} ;;
  *) echo "unexpected: $*" >&2; exit 9 ;;
esac
"""


def make(folder: Path, **lacks: object) -> subprocess.CompletedProcess[str]:
    answers = {"version": "3.11.7", "is_old": 0, "lacks_venv": 0, "pip_fails": 0, "pip_says": ""}
    python = folder / "python"
    python.write_text(PYTHON.format(**{**answers, **lacks}))
    python.chmod(0o755)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    outer = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES")  # where make runs these tests
    return subprocess.run(
        ["make", "--no-print-directory", f"PYTHON={python}", ".venv/.sparring-dev"],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name not in outer},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("lacks", "parts"),
    [
        ({"version": "3.9.2", "is_old": 1}, ["Python 3.9.2", "3.11", "make PYTHON="]),
        ({"lacks_venv": 1}, ["venv module", "apt-get install python3-venv"]),
        (
            {"pip_fails": 1, "pip_says": "WARNING: Retrying: connection broken"},
            ["network", "PIP_ARGS=", ".venv/install.log"],
        ),
        (
            {"pip_fails": 1, "pip_says": "ERROR: no space on the disk"},
            ["no space on the disk", ".venv/install.log"],
        ),
    ],
)
def test_what_is_missing_is_one_message(tmp_path, lacks, parts):
    done = make(tmp_path, **lacks)
    messages = [line for line in done.stderr.splitlines() if not line.startswith("make:")]
    assert done.returncode != 0
    assert len(messages) == 1, done.stderr
    assert messages[0].startswith("error: ")
    assert all(part in messages[0] for part in parts), messages[0]
    assert not (tmp_path / ".venv" / ".sparring-dev").exists()


def test_a_python_that_is_not_there_is_named(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    done = subprocess.run(
        ["make", "PYTHON=python-of-nowhere", ".venv/bin/python"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "'python-of-nowhere'" in done.stderr
    assert "make PYTHON=" in done.stderr


def test_a_second_call_installs_nothing(tmp_path):
    assert make(tmp_path).returncode == 0
    again = subprocess.run(
        ["make", ".venv/.sparring-dev"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "up to date" in again.stdout


def test_an_environment_that_is_there_is_kept(tmp_path):
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    mine = tmp_path / ".venv" / "bin" / "python"
    mine.write_text(
        PYTHON.format(version="3.12.0", is_old=0, lacks_venv=0, pip_fails=0, pip_says="")
    )
    mine.chmod(0o755)
    assert make(tmp_path, is_old=1).returncode == 0
    assert "Python 3.12.0" in mine.read_text()


def test_ci_calls_the_test_command_of_the_readme():
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == "make test"
