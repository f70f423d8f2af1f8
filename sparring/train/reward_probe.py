"""What a recipe's rewards give to texts that no model had to think for.

Empty and constant completions must not earn them, the answer of another row must not, and the
row's own answer should. No model is loaded; token ids, where a reward asks for them, are the bytes
of the text.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparring.data.rows import Row
from sparring.rewards.calling import call_all
from sparring.rewards.math_extract import gold
from sparring.rewards.signatures import Samples
from sparring.rewards.verdicts import Reward

MOST_ROWS = 24
"""Rows that are probed, evenly spread: every probe calls every reward once on each of them."""
CONSTANT_SHARE = 0.9
MOST_STEPS = 3
"""A reward with more different values than this is graded: only 1 is full credit then."""

CONSTANTS = ("", "I don't know.", "0", "1")
FORMS = (
    "{answer}",
    "<think>\nI work it out.\n</think>\n\n<answer>{answer}</answer>",
    "<think>\nI work it out.\n</think>\n\n\\boxed{{{answer}}}",
)
"""How an answer is put: alone, and behind thinking in the two usual frames."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardProbe:
    """What texts without thought earn, as shares of rows with full credit.

    Every reward that any text can earn counts, and the smallest share is told. constants: by text;
    constant, constant_share: the best of them. right, other: the row's own answer and that of
    another row, in the best form; None where rows have none. num_rows: how many were probed.
    not_judged: share of the verdicts on the row's own answer that were None; reason: the first
    reason for one.
    """

    constants: dict[str, float]
    constant: str
    constant_share: float
    right: float | None
    other: float | None
    num_rows: int
    not_judged: float
    reason: str

    @property
    def is_constant_enough(self) -> bool:
        """Whether one and the same completion earns the reward nearly everywhere."""
        return self.constant_share >= CONSTANT_SHARE


def probe_rewards(
    rewards: Sequence[Reward],
    rows: Sequence[Row],
    *,
    judging: str,
    prompt_column: str,
    reference_column: str,
) -> RewardProbe:
    """Call the rewards on constants, on right answers and on those of other rows.

    judging: the reward whose verdict counts as right. Raises RewardError where a reward cannot be
    called on these rows, or breaks its contract.
    """
    step = max(1, math.ceil(len(rows) / MOST_ROWS))
    chosen = list(rows)[::step][:MOST_ROWS]
    asked = _Probe(rewards, chosen, prompt_column, reference_column)
    answers = [_answers(row, reference_column) for row in chosen]
    frequent = Counter(found[0] for found in answers if found).most_common(1)
    bare = [*CONSTANTS, *(answer for answer, _ in frequent)]
    texts = dict.fromkeys(form.format(answer=text) for text in bare for form in FORMS)
    values = {text: asked.values([text] * len(chosen)) for text in texts}
    right = [asked.values(filled) for filled in _filled(answers)]
    wrong = [
        asked.values(filled, among=_differing(answers)) for filled in _filled(_turned(answers))
    ]
    full = {
        name: _credit([v for found in (*values.values(), *right) for v in _numbers(found[name])])
        for name in asked.names
    }
    constants = {text: _share(found, full) for text, found in values.items()}
    constant = max(constants, key=lambda text: constants[text])
    own = [value for found in right for value in found[judging]]
    return RewardProbe(
        constants=constants,
        constant=constant,
        constant_share=constants[constant],
        right=_best(right, judging, full),
        other=_best(wrong, judging, full),
        num_rows=len(chosen),
        not_judged=sum(value is None for value in own) / len(own) if own else 0.0,
        reason=asked.reason,
    )


class _Probe:
    """The rewards that count, called on one text a row; every row is a group of its own."""

    def __init__(
        self,
        rewards: Sequence[Reward],
        rows: Sequence[Row],
        prompt_column: str,
        reference_column: str,
    ) -> None:
        self._rewards, self._rows = list(rewards), rows
        self._prompts = [row.get(prompt_column) or "" for row in rows]
        names = dict.fromkeys(name for row in rows for name in row if name != prompt_column)
        self._columns = {name: [row.get(name) for row in rows] for name in names}
        if reference_column in names:
            self._columns["reference"] = self._columns[reference_column]
        self.names = [reward.name for reward in rewards if reward.weight > 0]
        self.reason = ""

    def values(
        self, texts: Sequence[str | None], *, among: Sequence[bool] = ()
    ) -> dict[str, list[float | None]]:
        """By reward its value for each row that has a text (and is among those asked for)."""
        places = [
            place
            for place, text in enumerate(texts)
            if text is not None and (not among or among[place])
        ]
        if not places:
            return {reward.name: [] for reward in self._rewards}
        said = [str(texts[place]) for place in places]
        prompts = [self._prompts[place] for place in places]
        samples = Samples(
            prompts=prompts,
            completions=[
                text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
                for text, prompt in zip(said, prompts, strict=True)
            ],
            completion_ids=[list(text.encode()) for text in said],
            prefills=[""] * len(said),
            finish_reasons=["stop"] * len(said),
            group_ids=list(range(len(said))),
            columns={
                name: [column[place] for place in places] for name, column in self._columns.items()
            },
        )
        verdicts = call_all(self._rewards, samples, {"step": 0, "max_steps": 1})
        for verdict in verdicts.values():
            trace = verdict.first_traceback.strip().splitlines()
            found = trace[-1:] or list(verdict.reasons)
            self.reason = self.reason or (found[0] if found else "")
        return {name: verdict.values for name, verdict in verdicts.items()}


def _answers(row: Row, reference_column: str) -> list[str]:
    """What a right completion may end in: the final answer, and a solution where there is one."""
    found = []
    reference = row.get(reference_column) if reference_column else None
    if isinstance(reference, str | int | float) and not isinstance(reference, bool):
        final, _ = gold(reference)
        found += [final] if final else []
    solution = row.get("solution")
    if isinstance(solution, str) and solution.strip():
        found.append(solution.strip())
    return found


def _filled(answers: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """One list of texts for each form and kind of answer."""
    return [
        [form.format(answer=found[kind]) if len(found) > kind else None for found in answers]
        for kind in range(max(map(len, answers), default=0))
        for form in FORMS
    ]


def _turned(answers: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """The answers, each at the place of the row before its own."""
    return [*answers[1:], *answers[:1]]


def _differing(answers: Sequence[Sequence[str]]) -> list[bool]:
    """Where the next row's answer is another one."""
    pairs = zip(answers, _turned(answers), strict=True)
    return [bool(one and other) and one[0] != other[0] for one, other in pairs]


def _best(
    found: Sequence[Mapping[str, Sequence[float | None]]],
    judging: str,
    full: Mapping[str, float],
) -> float | None:
    """The largest share among the forms that the judging reward judged at all."""
    return max(
        (_share(values, full) for values in found if _numbers(values[judging])), default=None
    )


def _share(values: Mapping[str, Sequence[float | None]], full: Mapping[str, float]) -> float:
    """Share of rows with full credit, the smallest over the rewards that any text can earn."""
    shares = [_full(values[name], credit) for name, credit in full.items() if credit > 0]
    return min(shares, default=0.0)


def _credit(values: Sequence[float]) -> float:
    """What counts as full credit: 1, or the most of a reward that gives a few values below it.

    0 where no text earns anything.
    """
    top = max(values, default=0.0)
    if top <= 0:
        return 0.0
    return min(1.0, top) if len(set(values)) <= MOST_STEPS else 1.0


def _full(values: Sequence[float | None], credit: float) -> float:
    """Share of the values that are full credit."""
    if not values or credit <= 0:
        return 0.0
    return sum(value is not None and value >= credit - 1e-9 for value in values) / len(values)


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def as_measures(probe: RewardProbe) -> dict[str, Any]:
    """The probe as plain values for JSON."""
    return {
        "rows_probed": probe.num_rows,
        "constant_completion": probe.constant,
        "constant_completion_share": probe.constant_share,
        "empty_completion_share": probe.constants[""],
        "right_answer_share": probe.right,
        "other_rows_answer_share": probe.other,
        "right_answer_not_judged": probe.not_judged,
    }
