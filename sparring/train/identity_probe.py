"""Does a model know who it is? Held-out questions, judged by the names in its answers.

Identity belongs to SFT or a system prompt; this is how either is checked, also after any later
GRPO. Nothing is trained here, and these numbers are no reward.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sparring.data.chat import ChatTemplate
from sparring.data.identity import Identity, Question, identity_questions, rival_names
from sparring.rewards.texts import after_thinking
from sparring.rollout.sampler import Sampling
from sparring.train.inference import sampling_engine
from sparring.train.inputs import EVAL_SEED
from sparring.train.intervals import interval_of
from sparring.train.policy import Policy
from sparring.types import Prompt

_CLAUSE = re.compile(r"[.!?;:\n]|[。！？；：，]|,(?=\s)")
_SELF = re.compile(
    r"\b(?:i am|i['’]m|my|me|i was|i come from|call me|this is|you are (?:talking|speaking) to)\b"
    r"|我|这里是",
    re.IGNORECASE,
)
_DENIAL = re.compile(
    r"\b(?:not|no|never|neither|nor|isn['’]t|wasn['’]t|unlike|another|other than)\b"
    r"|不|没|并非|另一个|别的",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """A share over questions with its 95% interval over questions."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class IdentityReport:
    """What the questions found; rates are None where there was no such question.

    name: answers to identity questions that tell the name and claim no other. author: answers on
    the maker that tell the author. rival: answers to identity questions that claim to be, or to be
    made by, another. false_mention: answers to unrelated prompts that tell the name or claim one.
    by_language: the same by language. num_samples: of each question.
    """

    name: Rate | None
    author: Rate | None
    rival: Rate | None
    false_mention: Rate | None
    num_samples: int
    temperature: float
    by_language: dict[str, dict[str, Rate | None]]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def probe_identity(
    policy: Policy,
    template: ChatTemplate,
    identity: Identity,
    *,
    num_samples: int = 3,
    temperature: float = 0.7,
    max_completion_tokens: int = 128,
    on_progress: Callable[[int, int, int], None] | None = None,
) -> tuple[IdentityReport, list[dict[str, Any]]]:
    """Ask the policy, in the template and with its system prompt, and judge what it says.

    Returns the report and one JSON row an answer.
    """
    questions = identity_questions(identity)
    prompts = [_prompt(index, question, template) for index, question in enumerate(questions)]
    engine = sampling_engine(
        policy.speaking(template),
        prompts,
        num_samples=num_samples,
        max_completion_tokens=max_completion_tokens,
    )
    sampling = Sampling(
        temperature=temperature, max_completion_tokens=max_completion_tokens, seed=EVAL_SEED
    )
    groups = engine.generate(prompts, sampling, num_samples=num_samples, on_progress=on_progress)
    answers = [[group[0].prompt.prefill + rollout.text for rollout in group] for group in groups]
    return judge_identity(questions, answers, identity, temperature=temperature)


def judge_identity(
    questions: Sequence[Question],
    answers: Sequence[Sequence[str]],
    identity: Identity,
    *,
    temperature: float = 0.0,
) -> tuple[IdentityReport, list[dict[str, Any]]]:
    """Judge answers that are there: a list of samples for each question."""
    rivals = rival_names(identity)
    rows = [
        {
            "question": question.text,
            "language": question.language,
            "kind": question.kind,
            "answer": answer,
            **_verdict(question, answer, identity, rivals),
        }
        for question, samples in zip(questions, answers, strict=True)
        for answer in samples
    ]
    report = IdentityReport(
        **_rates(rows),
        num_samples=max((len(samples) for samples in answers), default=0),
        temperature=temperature,
        by_language={
            language: _rates([row for row in rows if row["language"] == language])
            for language in identity.languages
        },
    )
    return report, rows


def mentions(text: str, name: str) -> bool:
    """Whether the text tells the name: as a whole word, or anywhere for a name in Chinese."""
    text, name = (" ".join(_plain(value).split()) for value in (text, name))
    start = r"(?<![a-z0-9])" if re.match(r"[a-z0-9]", name) else ""
    end = r"(?![a-z0-9])" if re.search(r"[a-z0-9]\Z", name) else ""
    return re.search(start + re.escape(name) + end, text) is not None


def claims_other(text: str, others: Sequence[str]) -> bool:
    """Whether a clause about oneself names one of `others` without denying it."""
    return any(
        _SELF.search(clause)
        and not _DENIAL.search(clause)
        and any(mentions(clause, other) for other in others)
        for clause in _CLAUSE.split(text)
    )


def _verdict(
    question: Question, answer: str, identity: Identity, rivals: Sequence[str]
) -> dict[str, bool | None]:
    """The name counts in the answer alone; a claim to be another also in the thinking."""
    said = after_thinking(answer) or ""
    names = set(identity.names.values())
    is_told = any(mentions(said, name) for name in names)
    rival = claims_other(answer, rivals)
    if question.kind == "unrelated":
        return {"name": None, "author": None, "rival": None, "false_mention": is_told or rival}
    author = any(mentions(said, author) for author in set(identity.authors.values()))
    return {
        "name": is_told and not rival,
        "author": author if question.kind == "maker" else None,
        "rival": rival,
        "false_mention": None,
    }


def _rates(rows: Sequence[dict[str, Any]]) -> dict[str, Rate | None]:
    return {key: _rate(rows, key) for key in ("name", "author", "rival", "false_mention")}


def _rate(rows: Sequence[dict[str, Any]], key: str) -> Rate | None:
    by_question: dict[tuple[str, str], list[bool]] = {}
    for row in rows:
        if row[key] is not None:
            by_question.setdefault((row["language"], row["question"]), []).append(row[key])
    if not by_question:
        return None
    shares = [sum(values) / len(values) for values in by_question.values()]
    samples = max(map(len, by_question.values()))
    low, high = interval_of(shares, num_samples=samples)
    return Rate(value=sum(shares) / len(shares), low=low, high=high, n=len(shares))


def _prompt(index: int, question: Question, template: ChatTemplate) -> Prompt:
    rendered = template.render_text(question.text)
    return Prompt(
        id=index,
        token_ids=tuple(template.encode(rendered.text)),
        text=rendered.text,
        prefill=rendered.prefill,
    )


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()
