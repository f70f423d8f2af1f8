"""A fixed run gives the numbers on record: an unmeant change of arithmetic shows here.

golden_run.py tells how to record them again. `make golden REV=<commit>` compares bits between two
commits on one machine; the numbers here hold on every machine and so to 1e-4 only.
"""

from __future__ import annotations

import json
from types import ModuleType

import pytest


@pytest.mark.parametrize("case", ["dapo", "grpo", "gspo", "lora_cispo"])
def test_a_fixed_run_gives_the_numbers_on_record(case: str, golden_run: ModuleType) -> None:
    assert set(golden_run.CASES) == {"dapo", "grpo", "gspo", "lora_cispo"}
    expected = json.loads(golden_run.GOLDEN.read_text(encoding="utf-8"))[case]
    found = golden_run.run_case(case)
    assert len(found["steps"]) == len(expected["steps"]) == golden_run.STEPS * golden_run.PASSES
    for step, on_record in zip(found["steps"], expected["steps"], strict=True):
        assert step == pytest.approx(on_record, rel=1e-4, abs=1e-4)
    assert found["weights"] == pytest.approx(expected["weights"], rel=1e-4, abs=1e-6)


def test_a_run_repeats_bit_for_bit(golden_run: ModuleType) -> None:
    assert golden_run.run_case("gspo") == golden_run.run_case("gspo")
