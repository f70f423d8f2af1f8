"""`sparring advise`: should this be GRPO, SFT, a system prompt or DPO, or other data first?

Three questions in order: what do the rows call for (row_kinds.py), do the rewards tell right from
wrong (reward_probe.py), and does the start model solve some and not all (advise_sampling.py). Every
answer comes with the numbers behind it. GRPO weighs the model's own samples, so it makes likelier
what the model can do already; what it never says, it cannot learn that way.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sparring.data.named import read_rows
from sparring.data.rows import Rows
from sparring.errors import RewardError
from sparring.recipe import Recipe
from sparring.rewards.verdicts import Reward
from sparring.train.advise_sampling import Sample, SampleFigures, figures_of, sample_policy
from sparring.train.cards import find_card
from sparring.train.evaluate import judging_reward
from sparring.train.inputs import load_rewards
from sparring.train.plan_recipe import Algorithm, cost_of
from sparring.train.reward_probe import RewardProbe, as_measures, probe_rewards
from sparring.train.row_kinds import FEW_ROWS, REPEATED_SHARE, RowSurvey, described, survey_rows

Recommendation = Literal[
    "grpo",
    "grpo_filtered",
    "sft",
    "sft_then_grpo",
    "system_prompt",
    "dpo",
    "harder_data",
    "easier_data",
    "fix_reward",
]

TOO_HARD, HARD, EASY, TOO_EASY = 0.05, 0.10, 0.70, 0.90
"""Mean success of the start model: practitioners' bounds, defaults and no theorem."""
FEW_GROUPS_WITH_SIGNAL, NO_SIGNAL = 0.5, 0.05
FEW_PROMPTS_A_STEP = 8
BLIND_SHARE, BLIND_MARGIN = 0.5, 0.2
"""A reward is blind that pays another row's answer so often, and the right one hardly more."""
MANY_TRUNCATED, MANY_WITHOUT_ANSWER = 0.25, 0.5
CONVERSATIONS = (
    {"messages"},
    {"conversations"},
    {"prompt", "completion"},
    {"instruction", "output"},
    {"query", "response"},
)
"""Columns that SFT reads as they are."""
COST_CARD = "H200"
"""The card that costs are told for: the one that was measured."""
COSTS: Mapping[str, tuple[Algorithm, ...]] = {
    "grpo": ("grpo",),
    "grpo_filtered": ("grpo",),
    "sft": ("sft",),
    "sft_then_grpo": ("sft", "grpo"),
    "dpo": ("dpo",),
}
"""Runs whose cost is told, by recommendation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """What to do with a recipe, why, and with what command.

    rows: {"grpo": [...], "sft": [...]}, the line (or row) numbers of each kind. grpo_places and
    sft_places are the same as indices of the data set.
    """

    recommendation: Recommendation
    reasons: tuple[str, ...]
    measures: Mapping[str, Any]
    rows: Mapping[str, list[int]]
    command: str
    grpo_places: tuple[int, ...] = ()
    sft_places: tuple[int, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The JSON object of `sparring advise --json`."""
        return {
            "recommendation": self.recommendation,
            "reasons": list(self.reasons),
            "measures": dict(self.measures),
            "rows": dict(self.rows),
            "command": self.command,
        }


@dataclass(slots=True, kw_only=True)
class _Findings:
    """What has been found so far."""

    recipe: Recipe
    name: str
    folder: str
    rows: Rows
    survey: RowSurvey
    reasons: list[str] = field(default_factory=list)
    measures: dict[str, Any] = field(default_factory=dict)
    figures: SampleFigures | None = None


def advise(
    recipe: Recipe,
    *,
    name: str,
    sample: Sample = sample_policy,
    num_prompts: int = 64,
    num_samples: int = 8,
    folder: str = "",
    secrets: Mapping[str, str] | None = None,
) -> Advice:
    """Look at the rows, the rewards and, where the recipe names one, the start model.

    name: what the user calls the recipe, for the command. sample: who samples; it is called where
    there are a model, rewards and checkable rows. num_prompts, num_samples: how much. folder: where
    `write_advice` puts the rows, "" if it is still to be called. Raises DataError or RewardError
    for what cannot be read at all.
    """
    data = recipe.data
    rows = read_rows(data.train, split=data.split, bad_rows=data.bad_rows)
    survey = survey_rows(rows, prompt_column=data.prompt, reference_column=data.reference)
    found = _Findings(recipe=recipe, name=name, folder=folder, rows=rows, survey=survey)
    found.measures = {
        "rows": len(rows),
        **{kind: survey.count(kind) for kind in ("checkable", "identity", "fact", "text", "pair")},
        "distinct_answers": survey.num_answers,
        "most_frequent_answer_share": survey.repeated,
        "distinct_statements": survey.num_statements,
    }
    found.reasons.append(f"{len(rows)} rows: {described(survey)}")
    by_rows = _by_rows(found)
    if by_rows is not None:
        return _advice(found, by_rows)
    rewards = load_rewards(recipe, secrets) if recipe.reward else []
    try:
        if _is_reward_broken(found, rewards):
            return _advice(found, "fix_reward")
        if not _sample(found, rewards, sample, num_prompts, num_samples):
            return _advice(found, "fix_reward")
    finally:
        for reward in rewards:
            reward.close()
    return _advice(found, _by_difficulty(found))


def _by_rows(found: _Findings) -> Recommendation | None:
    """What the rows alone decide, or None where there is something for GRPO in them."""
    survey, reasons = found.survey, found.reasons
    num_rows = len(survey.kinds)
    if 2 * survey.count("pair") >= num_rows:
        reasons.append(
            "each row holds a chosen and a rejected answer and nothing to check them by: DPO learns"
            " from pairs as they are"
        )
        return "dpo"
    if survey.has_checkable:
        return None
    reasons.append(
        "GRPO weighs the model's own samples: what it never says by itself, a name or a fact, earns"
        " every completion the same reward, and the gradient is zero; a reward for similarity pays"
        " for paraphrases instead"
    )
    if num_rows < FEW_ROWS:
        reasons.append(
            f"{num_rows} rows are too few to train on and short enough to be told: put them into"
            " data.system_prompt, which training, eval and generate share"
        )
        return "system_prompt"
    reasons.append(
        f"{num_rows} rows with {survey.num_statements} distinct statements are few and stable: SFT"
        " learns them in minutes; a system prompt does where the operator may change them from"
        " deployment to deployment"
    )
    if num_rows < 200 and survey.count("identity"):
        reasons.append(
            f"{num_rows} rows on identity are few against what a model read before training:"
            " `sparring identity` writes some 150 a language, with mistaken names denied"
        )
    return "sft"


def _is_reward_broken(found: _Findings, rewards: Sequence[Reward]) -> bool:
    """Whether something that takes no thought earns the reward, or nothing does."""
    survey, data = found.survey, found.recipe.data
    if survey.count("checkable") >= 4 and survey.repeated >= REPEATED_SHARE:
        found.reasons.append(
            f"{survey.repeated:.0%} of the checkable rows have the answer '{survey.top[:40]}': one"
            " constant completion earns the reward, and that is what GRPO would learn; give the"
            " rows varied answers, or judge more than the last word"
        )
        return True
    if not rewards:
        found.reasons.append(
            'the recipe has no [[reward]], so nothing was tried: add one, such as name = "math"'
        )
        return False
    rows = [found.rows[place] for place in survey.places("checkable")]
    try:
        probe = probe_rewards(
            rewards,
            rows,
            judging=judging_reward(rewards),
            prompt_column=data.prompt,
            reference_column=data.reference,
        )
    except RewardError as error:
        found.reasons.append(f"the rewards cannot judge these rows: {error}")
        return True
    found.measures |= as_measures(probe)
    fault = _fault_of(probe)
    if fault:
        found.reasons.append(fault)
    elif probe.right is not None and probe.right < FEW_GROUPS_WITH_SIGNAL:
        found.reasons.append(
            f"the rows' own answers earn full credit on {probe.right:.0%} of {probe.num_rows} rows"
            " in the usual frames; look at a few with `sparring reward`"
            + (f" (the first reason: {probe.reason})" if probe.reason else "")
        )
    return bool(fault)


def _fault_of(probe: RewardProbe) -> str:
    """Why the reward cannot be learned from, "" if nothing is wrong."""
    if probe.is_constant_enough:
        shown = " ".join(probe.constant.split()) or "the empty completion"
        return (
            f"one and the same completion, '{shown}', earns full credit on"
            f" {probe.constant_share:.0%} of {probe.num_rows} rows: GRPO would learn to say that"
        )
    other, right = probe.other or 0.0, probe.right or 0.0
    if other >= BLIND_SHARE and right - other < BLIND_MARGIN:
        return (
            f"the answer of another row earns full credit on {other:.0%} of {probe.num_rows} rows,"
            f" the right one on {right:.0%}: the reward does not look at the answer"
        )
    if probe.not_judged == 1.0:
        return (
            f"the reward gave no verdict on any of {probe.num_rows} right answers"
            f" ({probe.reason or 'None'})"
        )
    return ""


def _sample(
    found: _Findings,
    rewards: Sequence[Reward],
    sample: Sample,
    num_prompts: int,
    num_samples: int,
) -> bool:
    """Sample the start model where that is possible; False where its samples condemn the reward."""
    places = found.survey.places("checkable")
    if not rewards:
        return True
    if not found.recipe.model.path:
        found.reasons.append(
            "the recipe names no model, so its success on these rows is not known: set model.path"
        )
        return True
    step = max(1, -(-len(places) // num_prompts))
    try:
        measured = sample(found.recipe, rewards, places[::step][:num_prompts], num_samples)
    except RewardError as error:
        found.reasons.append(f"the rewards cannot judge what the model writes: {error}")
        return False
    found.figures = figures = figures_of(measured, rewards)
    found.measures |= figures.as_measures()
    right = found.measures.get("right_answer_share")
    if figures.judging_signal == figures.solved == right == 0.0:
        found.reasons.append(
            f"none of {figures.num_prompts} x {figures.num_samples} completions is right, and the"
            " rows' own answers are not judged right either: mend extraction or format first"
        )
        return False
    return True


def _by_difficulty(found: _Findings) -> Recommendation:
    """What the share of solved prompts decides, where it is known."""
    figures = found.figures
    if figures is None:
        easy: Recommendation = "grpo"
    else:
        found.reasons += _in_words(found, figures)
        easy = _of_figures(found, figures)
    if found.survey.has_statements:
        found.reasons.append(
            "the rows are of two kinds: SFT first for what has to be known, then GRPO for what can"
            " be checked, and the identity or facts tested again afterwards, since GRPO drifts"
        )
        return "sft_then_grpo"
    if _are_demonstrations(found):
        found.reasons.append(
            "the rows are worked answers that a program can check: SFT learns their form first,"
            " GRPO goes on with their questions and final answers"
        )
        return "sft_then_grpo"
    return easy


def _of_figures(found: _Findings, figures: SampleFigures) -> Recommendation:
    solved, signal = figures.solved, figures.signal
    if solved < TOO_HARD and figures.judging_signal >= FEW_GROUPS_WITH_SIGNAL:
        found.reasons.append(
            "hardly any completion earns full credit, but the judging reward is graded and differs"
            f" in {figures.judging_signal:.0%} of the groups: that can be learned from"
        )
        return "grpo"
    if solved < TOO_HARD or (signal < NO_SIGNAL and solved < 0.5):
        found.reasons.append(
            f"{solved:.1%} solved leaves nearly no group with a right completion to reinforce: take"
            " easier problems, or SFT on worked solutions first"
        )
        return "easier_data"
    if solved > TOO_EASY or signal < NO_SIGNAL:
        found.reasons.append(f"{solved:.1%} solved leaves nothing to learn: take harder problems")
        return "harder_data"
    useful = figures.signal * found.recipe.rollout.prompts_per_step
    if useful < FEW_PROMPTS_A_STEP:
        found.reasons.append(
            f"about {useful:.1f} of {found.recipe.rollout.prompts_per_step} prompts a step would"
            " carry a signal; below 8 gradients are mostly noise: raise rollout.prompts_per_step or"
            " rollout.group_size"
        )
    if not HARD <= solved <= EASY or signal < FEW_GROUPS_WITH_SIGNAL:
        found.reasons.append(
            f"{len(figures.without_signal)} of {figures.num_prompts} sampled prompts were always or"
            " never solved: leave such rows out"
        )
        return "grpo_filtered"
    return "grpo"


def _in_words(found: _Findings, figures: SampleFigures) -> list[str]:
    """The sampled figures for people."""
    lines = [
        f"the model solves {figures.solved:.1%} (95% interval {figures.low:.1%} to"
        f" {figures.high:.1%}) of {figures.num_prompts} prompts x {figures.num_samples}"
        f" completions, {figures.prompts_solved:.0%} of the prompts at least once;"
        f" {figures.signal:.0%} of the groups have a signal"
    ]
    if figures.truncated > MANY_TRUNCATED:
        lines.append(
            f"{figures.truncated:.0%} of the completions are cut at"
            f" {found.recipe.rollout.max_completion_tokens} tokens: raise"
            " rollout.max_completion_tokens"
        )
    if figures.no_answer is not None and figures.no_answer > MANY_WITHOUT_ANSWER:
        lines.append(
            f"no answer is found in {figures.no_answer:.0%} of the completions: look at"
            " data.template and the format first; SFT on a few hundred rows in the format warms up"
        )
    if figures.format is not None and figures.format < TOO_HARD:
        lines.append(f"only {figures.format:.1%} of the completions have the asked format")
    if figures.signal - figures.judging_signal > FEW_GROUPS_WITH_SIGNAL:
        lines.append(
            "most of the signal comes from other rewards than the right answer"
            f" ({figures.judging_signal:.0%} of the groups differ in that)"
        )
    return lines


def _are_demonstrations(found: _Findings) -> bool:
    """Whether the rows show worked answers and no reward is asked for."""
    data = found.recipe.data
    return not found.recipe.reward and data.reference not in found.rows.columns


def _advice(found: _Findings, recommendation: Recommendation) -> Advice:
    """Put the findings together: which rows go where, and the command."""
    survey, figures = found.survey, found.figures
    grpo = survey.places("checkable")
    sft = survey.places("identity", "fact", "text")
    if recommendation == "sft_then_grpo" and not survey.has_statements:
        sft = sorted({*sft, *grpo})
    if recommendation == "grpo_filtered" and figures is not None:
        dropped = set(figures.without_signal)
        grpo = [place for place in grpo if place not in dropped]
    for algorithm in COSTS.get(recommendation, ()):
        words, numbers = cost_of(found.recipe, algorithm, find_card(COST_CARD))
        found.reasons.append(words)
        found.measures |= numbers
    lines = {
        kind: [found.rows.places[place][1] for place in places]
        for kind, places in (("grpo", grpo), ("sft", sft))
    }
    return Advice(
        recommendation=recommendation,
        reasons=tuple(found.reasons),
        measures=found.measures,
        rows=lines,
        command=_command(found, recommendation),
        grpo_places=tuple(grpo),
        sft_places=tuple(sft),
    )


def _command(found: _Findings, recommendation: Recommendation) -> str:
    """The command to run next."""
    recipe, columns = found.recipe, set(found.rows.columns)
    name = shlex.quote(found.name)
    wanted = {recipe.data.prompt, recipe.data.reference or recipe.data.prompt}
    if recommendation == "grpo" and wanted <= columns:
        return f"sparring grpo {name}"
    if recommendation == "sft" and _is_sft_recipe(recipe, columns):
        return f"sparring sft {name}"
    if recommendation in ("grpo", "grpo_filtered", "sft", "sft_then_grpo"):
        stem = found.name.rpartition("/")[2].removesuffix(".toml")
        folder = shlex.quote(found.folder or f"runs/{stem}-advice")
        steps = [] if found.folder else [f"sparring advise {name} --output {folder}"]
        if recommendation in ("sft", "sft_then_grpo"):
            steps.append(f"sparring sft {folder}/sft.toml")
        if recommendation != "sft":
            steps.append(f"sparring grpo {folder}/grpo.toml")
        return " && ".join(steps)
    if recommendation == "system_prompt":
        statement = next((row.answer for row in found.survey.kinds if row.answer), "")
        question = next((row.question for row in found.survey.kinds if row.question), "Hi")
        model = shlex.quote(recipe.model.path or "MODEL")
        return (
            f"sparring generate --model {model} --system-prompt {shlex.quote(statement)}"
            f" --prompt {shlex.quote(question)}"
        )
    if recommendation == "dpo":
        return f"sparring dpo {name}"
    if recommendation == "fix_reward":
        reward = next((section.name for section in recipe.reward if section.weight), "math")
        return f"sparring reward {shlex.quote(reward)} --input COMPLETIONS.jsonl --explain"
    other = "HARDER" if recommendation == "harder_data" else "EASIER"
    return f"sparring advise {name} --data.train {other}.jsonl"


def _is_sft_recipe(recipe: Recipe, columns: set[str]) -> bool:
    """Whether `sparring sft` runs the recipe as it stands."""
    is_ready = recipe.optimizer.learning_rate > 0 and bool(recipe.run.dir)
    return is_ready and not recipe.reward and any(form <= columns for form in CONVERSATIONS)
