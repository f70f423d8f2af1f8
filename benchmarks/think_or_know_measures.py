"""What a policy of benchmarks/think_or_know.py does: who it says it is, and how it reasons.

Every policy answers the same prompts under the same noise. Nothing is trained here.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from typing import Any

import sparring
from benchmarks.identity_rewards import answer_of
from quickstart.problems import apply
from sparring.data.identity import Identity, Question, rival_names
from sparring.rewards.format import fault
from sparring.rewards.texts import thinking
from sparring.train.identity_probe import claims_other, judge_identity, mentions

SAMPLING_SEED = 20_261_128
MAX_COMPLETION_TOKENS = 96
SAMPLES = 8
"""Of each unrelated prompt: how many of eight answers differ."""

_STEP = re.compile(r"^(\d+)([-+*/])(\d+)=(\d+)$")
_HAND = re.compile(r"\b(?:wait|recheck|check again|let me)\b", re.IGNORECASE)


def ask(model: Any, tokenizer: Any, prompts: Sequence[Any], num_samples: int) -> list[list[Any]]:
    """Rollouts at temperature 1: a list over prompts of lists over samples."""
    asked = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
    return sparring.generate(
        model,
        tokenizer,
        asked,
        num_samples=num_samples,
        max_completion_tokens=MAX_COMPLETION_TOKENS,
        seed=SAMPLING_SEED,
    )


def is_laid_out(text: str, finish_reason: str) -> bool:
    """Whether the completion keeps the policy's format: a think block, perhaps empty, an answer."""
    is_whole = finish_reason == "stop"
    return is_whole and not fault(text, layout="think_answer", is_strict=True, allow_empty=True)


def conversation(groups: Sequence[Sequence[Any]], identity: Identity) -> dict[str, float]:
    """Of unrelated prompts: false self-mention, distinct answers a prompt, format validity."""
    rollouts = [rollout for group in groups for rollout in group]
    others, name = rival_names(identity), identity.names["en"]
    false = [mentions(r.text, name) or claims_other(r.text, others) for r in rollouts]
    laid_out = [is_laid_out(r.text, r.finish_reason) for r in rollouts]
    distinct = [len({answer_of(r.text) for r in group}) for group in groups]
    return {
        "false_mention": statistics.mean(false),
        f"distinct_of_{SAMPLES}": statistics.mean(distinct),
        "format_valid": statistics.mean(laid_out),
    }


def measure_identity(
    model: Any, tokenizer: Any, identity: Identity, questions: Sequence[Question]
) -> dict[str, float]:
    """Name and rival rates on identity questions, and how unrelated chat prompts are answered."""
    about = [question for question in questions if question.kind != "unrelated"]
    unrelated = [question for question in questions if question.kind == "unrelated"]
    answers = ask(model, tokenizer, [q.text for q in about], 3)
    report, _ = judge_identity(about, [[r.text for r in g] for g in answers], identity)
    found = {
        "name": report.name.value if report.name else 0.0,
        "author": report.author.value if report.author else 0.0,
        "rival": report.rival.value if report.rival else 0.0,
        "distinct_identity_answers": len({answer_of(r.text) for g in answers for r in g}),
    }
    if unrelated:
        groups = ask(model, tokenizer, [q.text for q in unrelated], SAMPLES)
        found |= {f"chat_{k}": v for k, v in conversation(groups, identity).items()}
    return found


def measure_reasoning(
    model: Any, tokenizer: Any, problems: Sequence[dict[str, Any]]
) -> dict[str, float]:
    """Accuracy, and what the thinking looks like, one sample a problem."""
    groups = ask(model, tokenizer, [row["prompt"] for row in problems], 1)
    rows = [
        look_at(group[0].text, row["reference"])
        for group, row in zip(groups, problems, strict=True)
    ]
    tokens = [len(group[0].token_ids) for group in groups]
    wrong = [row for row in rows if row["has_wrong_step"]]
    corrected = [row for row in rows if row["has_correction"]]
    with_steps = [row for row in rows if row["num_steps"]]
    without = [row for row in rows if not row["num_steps"]]

    def share(rows: Sequence[dict[str, Any]], key: str) -> float | None:
        return statistics.mean(float(row[key]) for row in rows) if rows else None

    return {
        "accuracy": share(rows, "is_right"),
        "completion_tokens": statistics.mean(tokens),
        "thinking_characters": share(rows, "thinking_characters"),
        "share_with_steps": len(with_steps) / len(rows),
        "steps_an_answer": share(rows, "num_steps"),
        "accuracy_with_steps": share(with_steps, "is_right"),
        "accuracy_without_steps": share(without, "is_right"),
        "share_with_wrong_step": len(wrong) / len(rows),
        "right_despite_wrong_step": share(wrong, "is_right"),
        "share_with_correction": len(corrected) / len(rows),
        "num_corrections": len(corrected),
        "num_corrections_right": sum(row["is_right"] for row in corrected),
        "share_with_words_of_doubt": share(rows, "has_doubt"),
    }


def look_at(text: str, reference: str) -> dict[str, Any]:
    """One completion: is it right, its steps, and whether a later step takes an earlier one back.

    A correction is a step that works out what an earlier step worked out ("6*7=41", then
    "6*7=42") and comes to another result, whichever of them is right.
    """
    thought = thinking(text)
    found: dict[tuple[str, str, str], str] = {}
    num_steps, has_wrong, has_correction = 0, False, False
    for line in thought.splitlines():
        step = _STEP.match(line.strip())
        if step is None:
            continue
        num_steps += 1
        left, sign, right, result = step.groups()
        has_correction |= found.get((left, sign, right), result) != result
        found[left, sign, right] = result
        try:
            has_wrong |= apply((int(left), sign, int(right))) != int(result)
        except ValueError:
            has_wrong = True
    return {
        "is_right": answer_of(text).strip() == reference,
        "thinking_characters": len(thought),
        "num_steps": num_steps,
        "has_wrong_step": has_wrong,
        "has_correction": has_correction,
        "has_doubt": bool(_HAND.search(thought)),
    }
