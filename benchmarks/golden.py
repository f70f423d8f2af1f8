"""Do two versions of Sparring train the same, to the last bit, on this machine?

    python benchmarks/golden.py [REV]        (make golden REV=<commit>; without: HEAD)

Runs tests/train/golden_run.py of the working tree twice, against the package as it was at REV (in a
temporary git worktree) and as it is now, and compares every metric and the bits of all weights.
Exit code 0: the same; 1: they differ; 2: REV could not be run. A commit whose functions take other
arguments than golden_run.py gives cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tests" / "train" / "golden_run.py"


def measure(package_root: Path) -> dict[str, Any]:
    """What golden_run.py prints with the package under `package_root`."""
    environment = {**os.environ, "PYTHONPATH": str(package_root), "OMP_NUM_THREADS": "1"}
    origin = subprocess.run(
        [sys.executable, "-c", "import sparring.types; print(sparring.types.__file__)"],
        env=environment,
        cwd=package_root,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    assert Path(origin).is_relative_to(package_root), f"{origin} is not under {package_root}"
    output = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env=environment,
        cwd=package_root,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    found: dict[str, Any] = json.loads(output)
    return found


def measure_commit(revision: str) -> dict[str, Any]:
    """The same for a commit, in a worktree that is removed again."""
    with tempfile.TemporaryDirectory(prefix="sparring-golden-") as folder:
        tree = Path(folder).resolve() / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), revision], check=True)
        try:
            return measure(tree)
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs: per case the metrics of the first update that does, and the weights."""
    lines = []
    for case in sorted(set(then) | set(now)):
        if case not in then or case not in now:
            lines.append(f"{case}: only in one of the two")
            continue
        for index, (before, after) in enumerate(
            zip(then[case]["steps"], now[case]["steps"], strict=True)
        ):
            if before != after:
                lines += [
                    f"{case}, update {index + 1}, {key}: {before.get(key)} -> {after.get(key)}"
                    for key in sorted(set(before) | set(after))
                    if before.get(key) != after.get(key)
                ]
                break
        if then[case]["bits"] != now[case]["bits"]:
            lines.append(f"{case}: the weights at the end differ")
    return lines


def main() -> int:
    """Compare and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("revision", nargs="?", default="HEAD", help="the commit to compare with")
    revision = parser.parse_args().revision
    try:
        then = measure_commit(revision)
    except subprocess.CalledProcessError as error:
        print(f"{revision} could not be run: {error}", file=sys.stderr)
        return 2
    lines = differences(then, measure(ROOT))
    for line in lines:
        print(line)
    if not lines:
        print(f"the same bits as {revision}")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
