"""pass@k and maj@k against published values and against counting every choice of k samples."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest

from sparring.train.intervals import compare, sign_test, standard_error
from sparring.train.pass_at_k import canonical_answer, ks_up_to, majority_at_k, pass_at_k


@pytest.mark.parametrize(
    ("n", "c", "k", "value"),
    [
        (4, 1, 2, 0.5),
        (10, 3, 5, 0.916667),
        (16, 4, 8, 0.961538),
        (16, 1, 8, 0.5),
        (16, 1, 16, 1.0),
        (64, 8, 16, 0.914746),
        (8, 0, 4, 0.0),
        (8, 7, 2, 1.0),
    ],
)
def test_pass_at_k_matches_worked_values(n, c, k, value):
    assert pass_at_k(n, c, k) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 2), (4, 2, 5), (4, 2, 0), (4, -1, 1)])
def test_pass_at_k_refuses_impossible_counts(n, c, k):
    with pytest.raises(ValueError, match="must hold"):
        pass_at_k(n, c, k)


@pytest.mark.parametrize(
    ("votes", "right", "k", "value"),
    [
        (["A", "A", "B", "B", "C"], "A", 5, 0.5),
        (["B", None, "A", None, None], "B", 5, 0.5),
        (["A", "B", None, None], "B", 4, 0.5),
        (["A", "B", "B", None, None], "B", 5, 1.0),
        (["A", "A", "B", "C"], "A", 3, 2 / 3),
        ([None, None], "A", 2, 0.0),
        (["B", "C"], "A", 2, 0.0),
    ],
)
def test_majority_matches_worked_values(votes, right, k, value):
    assert majority_at_k(votes, right, k) == pytest.approx(value, abs=1e-12)


def test_majority_is_the_mean_over_all_choices_of_k():
    draw = random.Random(3)
    for _ in range(60):
        votes = draw.choices(["A", "B", "C", "D", None], k=draw.randint(1, 9))
        k = draw.randint(1, len(votes))
        values = []
        for chosen in itertools.combinations(votes, k):
            counts = Counter(vote for vote in chosen if vote is not None)
            most = max(counts.values(), default=0)
            top = [vote for vote, count in counts.items() if count == most]
            values.append(1 / len(top) if "A" in top else 0.0)
        assert majority_at_k(votes, "A", k) == pytest.approx(sum(values) / len(values), abs=1e-9)


def test_majority_of_many_samples_stays_in_range():
    draw = random.Random(4)
    votes = draw.choices(range(20), k=256)
    total = sum(majority_at_k(votes, right, 64) for right in range(20))
    assert total == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1,000", "1000.0"),
        (r"\frac{1}{2}", "0.5"),
        ("$7$", "7"),
        ("50%", "1/2"),
        ("(B)", "B"),
        ("The North", "north"),
        (r"x + 1", "x+1"),
    ],
)
def test_one_meaning_has_one_vote(one, other):
    assert canonical_answer(one) == canonical_answer(other)


def test_different_meanings_have_different_votes():
    assert len({canonical_answer(text) for text in ["7", "-7", "70", "x", "B", "north"]}) == 6


def test_ks_double_up_to_the_number_of_samples():
    assert [ks_up_to(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


@pytest.mark.parametrize(
    ("won", "lost", "value"),
    [(30, 15, 0.036), (20, 10, 0.099), (40, 20, 0.013), (28, 18, 0.184), (0, 0, 1.0), (3, 3, 1.0)],
)
def test_sign_test_matches_worked_values(won, lost, value):
    assert sign_test(won, lost) == pytest.approx(value, abs=6e-4)
    assert sign_test(lost, won) == sign_test(won, lost)


def test_standard_error_matches_worked_values():
    assert standard_error([1, 0.5, 0.25, 0]) == pytest.approx(0.213478, abs=1e-6)


def test_a_comparison_pairs_problems():
    found = compare([0.25, 0.5, 0.5, 0.25], [0.0, 0.0, 0.5, 0.5], num_samples=4)
    assert found.difference == pytest.approx(0.125)
    assert found.standard_error == pytest.approx(0.161374, abs=1e-6)
    assert (found.won, found.lost, found.tied, found.test) == (2, 1, 1, "paired")
    assert found.low < 0 < found.high
    assert found.p_value == pytest.approx(0.4386, abs=1e-3)


def test_one_sample_a_problem_takes_the_sign_test():
    found = compare([1.0] * 30 + [0.0] * 15 + [1.0] * 5, [0.0] * 30 + [1.0] * 20, num_samples=1)
    assert (found.won, found.lost, found.tied, found.test) == (30, 15, 5, "sign")
    assert found.p_value == pytest.approx(0.036, abs=6e-4)


def test_equal_models_do_not_differ():
    found = compare([0.5, 1.0], [0.5, 1.0], num_samples=4)
    assert (found.difference, found.p_value) == (0.0, 1.0)
