"""A call with a wall clock."""

from __future__ import annotations

import threading
import time

import pytest

from sparring.deadline import within


def test_result_and_error_reach_the_caller():
    assert within(5.0, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        within(5.0, lambda: 1 // 0)


def test_a_hanging_call_is_left_behind():
    release = threading.Event()
    started = time.monotonic()
    with pytest.raises(TimeoutError, match="no answer within 0 seconds"):
        within(0.2, release.wait)
    assert time.monotonic() - started < 2.0
    release.set()
