"""A table of answers and references over every class, with Math-Verify's verdict beside ours.

Each row of equivalence.jsonl: kind, reference, answer, equal (ours must be that), math_verify (what
Math-Verify 0.9 says of both in a box), why (where it differs: what it does otherwise).
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path

import pytest

from sparring.rewards.math import MathReward

ROWS = [
    json.loads(line)
    for line in (Path(__file__).parent / "equivalence.jsonl")
    .read_text(encoding="utf-8")
    .splitlines()
]
KINDS = {
    "integers", "decimals", "fractions", "roots", "expressions", "unfinished", "sets", "lists",
    "tuples", "intervals", "matrices", "equations", "percent", "units", "text", "choices", "bases",
    "chinese", "mixed",
}  # fmt: skip


def test_the_table_covers_every_class_and_is_half_unequal():
    assert len(ROWS) >= 400
    assert {row["kind"] for row in ROWS} == KINDS
    assert len({(row["reference"], row["answer"]) for row in ROWS}) == len(ROWS)
    unequal = sum(not row["equal"] for row in ROWS)
    assert 0.45 <= unequal / len(ROWS) <= 0.55
    for kind, counts in _by_kind().items():
        assert min(counts.values()) >= 5, kind


def test_every_verdict_is_as_the_table_says():
    reward = MathReward(limit_seconds=20.0)
    texts = [f"\\boxed{{{row['answer']}}}" for row in ROWS]
    verdicts = reward.verdicts(texts, [row["reference"] for row in ROWS])
    reward.close()
    wrong = [
        (row["reference"], row["answer"], verdict.verdict, verdict.reason)
        for row, verdict in zip(ROWS, verdicts, strict=True)
        if verdict.verdict is not row["equal"]
    ]
    assert not wrong


def test_every_reference_of_the_table_accepts_itself():
    references = sorted({row["reference"] for row in ROWS})
    reward = MathReward()
    verdicts = reward.verdicts([f"\\boxed{{{text}}}" for text in references], references)
    reward.close()
    assert [r for r, v in zip(references, verdicts, strict=True) if v.verdict is not True] == []


def test_every_disagreement_with_math_verify_is_explained():
    for row in ROWS:
        assert bool(row["why"]) == (row["math_verify"] is not row["equal"]), row


@pytest.mark.slow
def test_the_column_of_math_verify_is_what_it_says():
    """Our own table alone goes through its default configuration; model text never does."""
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    differing = []
    for row in ROWS:
        gold = parse(f"\\boxed{{{row['reference']}}}")
        answer = parse(f"\\boxed{{{row['answer']}}}")
        verdict = verify(gold, answer) if gold else None
        if verdict is not row["math_verify"]:
            differing.append((row["reference"], row["answer"], verdict))
    assert not differing


def _by_kind() -> dict[str, Counter[bool]]:
    counts = {kind: Counter() for kind in KINDS}
    for row in ROWS:
        counts[row["kind"]][row["equal"]] += 1
    return counts
