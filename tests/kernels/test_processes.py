"""The interpreter's tests in processes of their own, where every kernel must have been launched.

The switch TRITON_INTERPRET must be set before the kernels' import. Two processes share the files,
so that a machine of two cores is done sooner.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.test_every_kernel import KERNELS

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).parent
FILES = {
    path.stem.removeprefix("test_triton").strip("_") for path in FOLDER.glob("test_triton*.py")
}
FIRST = {"", "attention"}
"""What one of the two processes runs; the other runs all the rest."""
NOT_INTERPRETED = {
    "nf4_hopper._kernel",
    "nf4_hopper_wide._kernel",
    "few_rows_hopper._ring_kernel",
    "few_rows_strips._strips_kernel",
    "few_rows_tiles._tiles_kernel",
    "few_rows_attention._attention_kernel",
}
"""Gluon: its layouts and instructions are sm_90's, which no interpreter has. They are compiled in
test_compile.py; tests/models/test_order_gpu.py compares the bits of NF4 with the interpreted
kernel's, test_few_rows_*.py the others with float64.
"""


def start(names: set[str], launches: Path) -> subprocess.Popen[str]:
    files = [f"tests/kernels/test_triton{name and '_' + name}.py" for name in sorted(names)]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    return subprocess.Popen(
        [*command, "-p", "tests.kernels.launches", "--launches", str(launches), *files],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_every_kernel_in_the_interpreter(tmp_path: Path):
    pytest.importorskip("triton")
    lists = [tmp_path / "first", tmp_path / "second"]
    processes = [
        start(names, launches)
        for names, launches in zip((FIRST, FILES - FIRST), lists, strict=True)
    ]
    try:
        printed = [process.communicate(timeout=400)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, text in zip(processes, printed, strict=True):
        assert process.returncode == 0, text[-4000:]
        assert " passed" in text
    launched = {line for launches in lists for line in launches.read_text().splitlines()}
    assert NOT_INTERPRETED <= KERNELS, "the list names what is there"
    missing = KERNELS - launched - NOT_INTERPRETED
    assert not missing, f"no test in tests/kernels/test_triton*.py launches {sorted(missing)}"
