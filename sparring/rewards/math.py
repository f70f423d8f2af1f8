"""The reward `math`: is the final answer equal to the reference?

The order of verdicts: exact string, exact number, structures such as sets and intervals, then
Math-Verify in a worker process that can be killed. A number asks for a number: work that was not
done ("2+3", "12!/5!") earns nothing. Nothing a model wrote is ever run or passed to SymPy's parsers
of Python text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from sparring.errors import RewardError
from sparring.rewards.math_compare import STAGES, Decision, Policy, decide
from sparring.rewards.math_extract import DEFAULT_SOURCES, Source, extract, gold
from sparring.rewards.math_normal import normalise
from sparring.rewards.math_pool import MathPool
from sparring.rewards.texts import full_texts


@dataclass(frozen=True, slots=True, kw_only=True)
class MathVerdict:
    """verdict: True, False, or None (the reference cannot be judged).

    stage: what decided (extraction, reference, string, number, text, structure, formula). answer:
    what was extracted, None for nothing; source: where it stood. compared: both sides in normal
    form.
    """

    verdict: bool | None
    stage: str
    reason: str
    answer: str | None = None
    source: str = ""
    compared: str = ""

    def path(self) -> str:
        """The steps up to the verdict, such as "boxed > string > number"."""
        if self.stage not in STAGES:
            return self.stage
        return " > ".join([self.source, *STAGES[: STAGES.index(self.stage) + 1]])


class MathReward:
    """1.0 for a right answer, 0.0 for a wrong or missing one, None where the reference cannot be
    judged.
    """

    def __init__(
        self,
        *,
        sources: Sequence[Source] = DEFAULT_SOURCES,
        several_boxes: Literal["last", "agree"] = "last",
        percent: Literal["value", "match", "ignore"] = "value",
        units: Literal["one_side", "match", "ignore"] = "one_side",
        fractions: Literal["any", "reduced"] = "any",
        decimals: Literal["exact", "rounded"] = "exact",
        mixed_numbers: bool = True,
        limit_seconds: float = 3.0,
        budget_seconds: float = 25.0,
        num_workers: int = 2,
    ) -> None:
        """Set the policy.

        sources: where an answer may stand; the first that is there decides. several_boxes: the last
        counts, or all must agree. percent "value": 50% equals 0.5; "match": the sign must be on
        both sides or none; "ignore": 50% equals 50. units "one_side": a unit on one side only is
        dropped, two must match; "match": both must carry the same; "ignore". fractions: "reduced"
        refuses 2/4 for 1/2. decimals "rounded": the reference is a rounded decimal, half a unit of
        its last place is allowed. limit_seconds: wall clock of one comparison of formulas;
        budget_seconds: of all comparisons of a batch, None for what it leaves over (keep it below
        timeout_seconds).
        """
        if min(limit_seconds, budget_seconds, num_workers) <= 0:
            raise RewardError(
                f"reward 'math': limit_seconds = {limit_seconds}, budget_seconds = "
                f"{budget_seconds} and num_workers = {num_workers} must be positive"
            )
        self._sources: tuple[Source, ...] = tuple(sources)
        self._several_boxes = several_boxes
        self._policy = Policy(
            percent=percent,
            units=units,
            fractions=fractions,
            decimals=decimals,
            mixed_numbers=mixed_numbers,
        )
        self.pool = MathPool(
            num_workers=num_workers, limit_seconds=limit_seconds, budget_seconds=budget_seconds
        )

    def __call__(
        self,
        completions: Sequence[Any],
        reference: Sequence[Any],
        prefills: Sequence[str] | None = None,
        log_extra: Callable[..., None] | None = None,
        log_metric: Callable[..., None] | None = None,
    ) -> list[float | None]:
        """Judge a batch; `reference` is the data's reference column."""
        verdicts = self.verdicts(full_texts(completions, prefills), reference)
        if log_extra is not None:
            log_extra("reason", [verdict.reason for verdict in verdicts])
            log_extra("stage", [verdict.stage for verdict in verdicts])
            log_extra("answer", [verdict.answer for verdict in verdicts])
            log_extra("path", [verdict.path() for verdict in verdicts])
            log_extra("compared", [verdict.compared for verdict in verdicts])
        if log_metric is not None and verdicts:
            for stage, count in Counter(verdict.stage for verdict in verdicts).items():
                log_metric(f"share_{stage}", count / len(verdicts))
        return [None if v.verdict is None else float(v.verdict) for v in verdicts]

    def verdicts(self, texts: Sequence[str], references: Sequence[Any]) -> list[MathVerdict]:
        """A verdict on each completion (prefill included) against its reference."""
        first = [
            self._without_formulas(text, reference)
            for text, reference in zip(texts, references, strict=True)
        ]
        pairs = [pair for _, decision in first if decision for pair in decision.pairs]
        compared = dict(zip(pairs, self.pool.compare(pairs), strict=True))
        finished = []
        for verdict, decision in first:
            for pair in decision.pairs if decision else ():
                comparison = compared[pair]
                verdict = replace(verdict, verdict=comparison.verdict, reason=comparison.reason)
                if not comparison.verdict:
                    break
            finished.append(verdict)
        return finished

    def close(self) -> None:
        """End the worker processes."""
        self.pool.close()

    def _without_formulas(self, text: str, reference: Any) -> tuple[MathVerdict, Decision | None]:
        wanted, fault = gold(reference)
        if wanted is None:
            return MathVerdict(verdict=None, stage="reference", reason=fault), None
        found = extract(text, self._sources, several_boxes=self._several_boxes)
        if found.text is None:
            verdict = MathVerdict(
                verdict=False, stage="extraction", reason=found.reason, source=found.source
            )
            return verdict, None
        decision = decide(found.text, wanted, self._policy)
        return (
            MathVerdict(
                verdict=decision.verdict,
                stage=decision.stage,
                reason=decision.reason,
                answer=found.text,
                source=found.source,
                compared=f"{normalise(found.text)} | {normalise(wanted)}",
            ),
            decision,
        )
