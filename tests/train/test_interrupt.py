"""Signals: left at once where nothing changes, held back where weights do, final on the second."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from sparring.errors import Interrupted
from sparring.train.interrupt import Interruptions


def interrupted_phase(reached: list[str]) -> None:
    with Interruptions() as interruptions, interruptions.interruptible():
        reached.append("before")
        os.kill(os.getpid(), signal.SIGINT)
        reached.append("after")


def test_an_interruptible_phase_is_left_at_once() -> None:
    reached: list[str] = []
    with pytest.raises(Interrupted) as caught:
        interrupted_phase(reached)
    assert reached == ["before"]
    assert caught.value.exit_code == 130


def test_any_other_phase_runs_to_its_end() -> None:
    with Interruptions() as interruptions:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted) as caught:
            interruptions.check()
        with pytest.raises(Interrupted), interruptions.interruptible():
            raise AssertionError("a phase that may be left must not begin after a signal")
    assert caught.value.exit_code == 143


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interruptions():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_second_signal_ends_the_process_on_the_spot(name: str, code: int) -> None:
    program = (
        "import os, signal\n"
        "from sparring.train.interrupt import Interruptions\n"
        "with Interruptions():\n"
        f"    os.kill(os.getpid(), signal.{name})\n"
        f"    os.kill(os.getpid(), signal.{name})\n"
        "    print('still here')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == code
    assert done.stdout == ""
    assert "the last checkpoint is intact" in done.stderr
