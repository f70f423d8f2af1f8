"""The benchmark of trainer against sampler runs, and its own decoding is the engine's."""

from __future__ import annotations

from pathlib import Path

from benchmarks.mismatch import TINY, measure


def test_a_small_case_on_the_cpu(tmp_path: Path) -> None:
    found = measure(TINY["tiny"], tmp_path, "cpu")
    assert found["tokens"] == 64
    assert found["decoding - sampler"]["max"] < 1e-5
    for pair in ("trainer - sampler", "trainer - exact", "decoding - exact"):
        assert 0 < found[pair]["mean"] < 0.005, pair
    assert len(found["stream, decoding - trainer"]) == 2
    assert found["qkv numbers that differ"][0] == 0.0
