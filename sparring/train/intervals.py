"""How sure a measured share is, and whether one model is better than another on the same problems.

Problems are what is resampled and compared, never samples: samples of one problem are not
independent. Nothing here knows of models or rewards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

BOOTSTRAP_RESAMPLES = 2000
Z_95 = 1.959963984540054


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two models on the same problems, problem by problem.

    difference: mean over problems of (new share right - old share right); low, high: its 95%
    interval, difference -+ 1.96 standard errors; standard_error: sd(d) / sqrt(n). won, lost, tied:
    problems on which the new model has a larger, smaller, equal share. p_value: two-sided; the
    exact sign test on won and lost where test is "sign", the paired z test where it is "paired".
    """

    difference: float
    low: float
    high: float
    standard_error: float
    n: int
    won: int
    lost: int
    tied: int
    p_value: float
    test: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share of n independent trials.

    Worked: 9 of 30 gives (0.167, 0.479); 0 of 8 gives (0, 0.324).
    """
    if n <= 0:
        return 0.0, 1.0
    share, z2 = successes / n, Z_95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(shares: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """95% interval of the mean of per-prompt shares, by resampling prompts (2,000 times)."""
    values = torch.tensor(shares, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    means = torch.empty(BOOTSTRAP_RESAMPLES, dtype=torch.float64)
    for start in range(0, BOOTSTRAP_RESAMPLES, 100):
        picks = torch.randint(len(values), (100, len(values)), generator=generator)
        means[start : start + 100] = values[picks].mean(dim=1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def interval_of(shares: Sequence[float], *, num_samples: int) -> tuple[float, float]:
    """95% interval of the mean of per-problem shares of `num_samples` samples each.

    Wilson's for one sample a problem, else the bootstrap over problems. Where all shares are the
    same resampling knows no doubt, and Wilson's over problems is taken, which is on the safe side.
    """
    if num_samples == 1 or len(set(shares)) < 2:
        return wilson(sum(shares), len(shares))
    return bootstrap(shares)


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean of independent values, sd (ddof 1) / sqrt(n); NaN below 2 values.

    Worked: 1, .5, .25, 0 gives .213478.
    """
    n = len(values)
    if n < 2:
        return math.nan
    mean = math.fsum(values) / n
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)


def sign_test(won: int, lost: int) -> float:
    """Two-sided exact p-value of `won` against `lost` if each were as likely; ties do not count.

    Worked: 30 to 15 gives .036, 20 to 10 gives .099, none at all gives 1.
    """
    n = won + lost
    tail = sum(math.comb(n, count) for count in range(min(won, lost) + 1))
    return min(1.0, float(2 * tail / 2**n))


def compare(new: Sequence[float], old: Sequence[float], *, num_samples: int) -> Comparison:
    """Compare per-problem shares of two models, listed in the same order of problems.

    With one sample a problem the exact sign test decides, else the paired standard error. Worked:
    differences .25, .5, 0, -.25 give .125 with standard error .161374. Raises ValueError where the
    lists differ in length or are empty.
    """
    differences = [after - before for after, before in zip(new, old, strict=True)]
    if not differences:
        raise ValueError("there is no problem to compare two models on")
    mean = math.fsum(differences) / len(differences)
    error = standard_error(differences)
    won = sum(difference > 0 for difference in differences)
    lost = sum(difference < 0 for difference in differences)
    is_sign = num_samples == 1 or not error > 0
    p_value = sign_test(won, lost) if is_sign else math.erfc(abs(mean) / error / math.sqrt(2))
    half = Z_95 * error
    return Comparison(
        difference=mean,
        low=mean - half,
        high=mean + half,
        standard_error=error,
        n=len(differences),
        won=won,
        lost=lost,
        tied=len(differences) - won - lost,
        p_value=p_value,
        test="sign" if is_sign else "paired",
    )
