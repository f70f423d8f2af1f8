"""What SFT learns from and shows: conversations, general ones mixed in, and sampled answers.

Nothing is trained here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from sparring.data.conversations import ConversationSet, load_conversations
from sparring.data.placeholders import fill_placeholders
from sparring.data.rows import load_rows
from sparring.recipe import Recipe
from sparring.train.inference import sampling_engine
from sparring.train.inputs import evaluation_sampling
from sparring.train.policy import Policy
from sparring.types import Prompt

Say = Callable[[str], None]


def load_training_rows(recipe: Recipe, policy: Policy, *, say: Say) -> ConversationSet:
    """The conversations of data.train, and beside them general_ratio times as many of data.general.

    Which general ones is drawn by the run's seed. Raises DataError.
    """
    data = recipe.data
    train = load_dialogues(recipe, policy, data.train, data.split, say=say, weight=data.weight)
    if not data.general:
        return train
    general = load_dialogues(recipe, policy, data.general, data.split, say=say)
    wanted = max(1, round(data.general_ratio * len(train)))
    order = torch.randperm(
        len(general), generator=torch.Generator().manual_seed(recipe.run.seed)
    ).tolist()
    chosen = [general[index] for index in order[:wanted]]
    short = f", all there are of the {wanted:,} wanted" if len(chosen) < wanted else ""
    total = len(train) + len(chosen)
    say(f"  {len(chosen):,} of them are mixed in{short}: {total:,} samples in all")
    return replace(train, conversations=(*train.conversations, *chosen))


def load_dialogues(
    recipe: Recipe, policy: Policy, source: str, split: str, *, say: Say, weight: str = ""
) -> ConversationSet:
    """The conversations of one data set in the policy's template, placeholders filled.

    weight: the column with each row's weight. Raises DataError.
    """
    data = recipe.data
    assert policy.template is not None, "the policy speaks before it reads"
    rows = load_rows(source, split=split, bad_rows=data.bad_rows)
    found = load_conversations(
        fill_placeholders(rows, data.placeholders),
        policy.tokenizer,
        template=policy.template,
        max_tokens=policy.max_tokens,
        weight_column=weight,
        bad_rows=data.bad_rows,
    )
    for line in found.report():
        say(line)
    return found


def shown_answers(recipe: Recipe, policy: Policy, rows: ConversationSet) -> list[dict[str, Any]]:
    """Answers of the policy, as it stands, to the first eval.num_samples conversations, a row each.

    A row has prompt, completion and `reference`, the answer of the data.
    """
    prompts = []
    for index, conversation in enumerate(rows.conversations[: recipe.eval.num_samples]):
        first = int(conversation.loss_mask.nonzero()[0])
        turn = conversation.token_ids[first:]
        rest = (~conversation.loss_mask[first:]).nonzero()
        end = int(rest[0]) if len(rest) else len(turn)
        ids = conversation.token_ids[:first].tolist()
        if 0 < first < policy.max_tokens:
            prompts.append(
                Prompt(
                    id=index,
                    token_ids=tuple(ids),
                    text=policy.tokenizer.decode(ids),
                    columns={"reference": policy.decode(turn[:end].tolist())},
                )
            )
    if not prompts:
        return []
    engine = sampling_engine(
        policy,
        prompts,
        max_completion_tokens=recipe.rollout.max_completion_tokens,
        memory=recipe.run.memory,
    )
    groups = engine.generate(prompts, evaluation_sampling(recipe))
    return [
        {
            "prompt": group[0].prompt.text,
            "completion": group[0].text,
            "reference": group[0].prompt.columns["reference"],
            "finish_reason": group[0].finish_reason,
            "num_tokens": len(group[0].token_ids),
        }
        for group in groups
    ]
