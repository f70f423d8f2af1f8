"""What k of n samples of a problem say: pass@k and the vote maj@k, without bias.

Each number is the exact mean over all choices of k of the n samples, without replacement. Counts
and votes come in, numbers go out: nothing is sampled or judged here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt

from sparring.rewards.math_normal import compact, normalise
from sparring.rewards.math_numbers import parse_number
from sparring.rewards.math_text import choice_letter, is_text, plain_words

Floats = npt.NDArray[np.float64]


def ks_up_to(num_samples: int) -> list[int]:
    """1, 2, 4, ... below the number of samples, and that number itself."""
    powers = [2**power for power in range(num_samples.bit_length()) if 2**power < num_samples]
    return [*powers, num_samples]


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Probability that k of the samples hold a right one: 1 - C(n - c, k) / C(n, k).

    The unbiased estimator of arXiv 2107.03374. Worked: (n, c, k) = (4, 1, 2) gives .5, (10, 3, 5)
    gives .916667. Raises ValueError unless 1 <= k <= n and 0 <= c <= n.
    """
    _check(num_samples, num_correct, k)
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def majority_at_k(votes: Sequence[Hashable | None], right: Hashable, k: int) -> float:
    """Expected share of k-subsets of the votes whose largest class is `right`, maj@k.

    A tie of t classes counts 1/t, None does not vote, and no vote at all counts 0. Worked: A, A, B,
    B, C for A at k = 5 gives .5; A, A, B, C for A at k = 3 gives 2/3. Raises ValueError unless
    1 <= k <= len(votes).
    """
    _check(len(votes), 0, k)
    counts = Counter(vote for vote in votes if vote is not None)
    num_right = counts.pop(right, 0)
    num_silent = len(votes) - num_right - sum(counts.values())
    if len(votes) == k:
        most = max(counts.values(), default=0)
        ties = sum(count == num_right for count in counts.values())
        return 1.0 / (1 + ties) if num_right and num_right >= most else 0.0
    total = 0.0
    for height in range(1, min(num_right, k) + 1):
        ways = _ways(list(counts.values()), num_silent, height, k - height)
        total += math.comb(num_right, height) * ways
    return total / math.comb(len(votes), k)


def canonical_answer(text: str) -> str:
    """One spelling for answers that are the same number, letter or words: what a vote goes by."""
    plain = normalise(text)
    number = parse_number(plain)
    if number is not None and not number.base:
        value = number.value / 100 if number.is_percent else number.value
        return str(value)
    choice = choice_letter(plain)
    if choice is not None:
        return choice[0]
    return plain_words(plain) if is_text(plain) else compact(plain)


def _ways(others: Sequence[int], num_silent: int, height: int, num_left: int) -> float:
    """Ways to draw `num_left` samples beside `height` right ones, each worth 1 / (1 + ties).

    table[t, s]: ways to draw s samples of the classes seen so far such that t of them have `height`
    votes and none has more.
    """
    most_ties = min(len(others), num_left // height)
    table: Floats = np.zeros((most_ties + 1, num_left + 1))
    table[0, 0] = 1.0
    for size in others:
        after = table.copy()
        for drawn in range(1, min(size, height - 1, num_left) + 1):
            after[:, drawn:] += float(math.comb(size, drawn)) * table[:, : num_left + 1 - drawn]
        if size >= height and height <= num_left:
            ways = float(math.comb(size, height))
            after[1:, height:] += ways * table[:-1, : num_left + 1 - height]
        table = after
    silent = np.array([float(math.comb(num_silent, num_left - s)) for s in range(num_left + 1)])
    worth = 1.0 / (1.0 + np.arange(most_ties + 1))
    return float(worth @ table @ silent)


def _check(num_samples: int, num_correct: int, k: int) -> None:
    if not (1 <= k <= num_samples and 0 <= num_correct <= num_samples):
        raise ValueError(
            f"n = {num_samples}, c = {num_correct}, k = {k}: 1 <= k <= n and 0 <= c <= n must hold"
        )
