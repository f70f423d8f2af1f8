"""The command before a run that tells its bytes and seconds: plan."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from sparring.cli.app import PASS_ON, Traceback, Words, app, load
from sparring.cli.terminal import emit, reporting, say
from sparring.errors import UserError

if TYPE_CHECKING:
    from sparring.recipe import Recipe
    from sparring.train.cards import Card
    from sparring.train.plan import Plan
    from sparring.train.plan_job import Job

MEASURED = "H200"


@app.command(context_settings=PASS_ON)
def plan(
    words: Words,
    memory: Annotated[
        str, typer.Option(help="The budget, such as 24GiB; else run.memory, or the card's.")
    ] = "",
    card: Annotated[str, typer.Option(help="A card of the table, such as 4090.")] = "",
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the longest prompt.", min=0)] = 0,
    algorithm: Annotated[
        str, typer.Option("--for", help="grpo, ppo, sft or dpo; else what the recipe is for.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    traceback: Traceback = False,
) -> None:
    """Predict a RECIPE's bytes by part and seconds a step, and propose settings that fit."""
    with reporting(traceback):
        if algorithm not in ("", "grpo", "ppo", "sft", "dpo"):
            raise UserError(f"--for {algorithm} is not known; known: grpo, ppo, sft, dpo")
        recipe = load(words, "plan")
        from sparring.train.cards import find_card
        from sparring.train.plan_recipe import (
            dtype_of,
            job_of,
            own_card,
            plan_recipe,
            proposal_lines,
        )
        from sparring.train.plan_table import as_dict, plan_lines

        own = own_card()
        chosen = find_card(card) if card else own or find_card(MEASURED)
        budget, whose = _budget(recipe, memory, chosen if card else None)
        job = job_of(recipe, algorithm=algorithm or None, prompt_tokens=prompt_tokens)  # type: ignore[arg-type]
        asked, best = plan_recipe(recipe, job, budget=budget, card=chosen)
        if as_json:
            plans: dict[str, Plan | None] = {"recipe": asked, "proposal": best}
            emit({k: None if v is None else as_dict(v) for k, v in plans.items()}, sys.stdout)
            return
        _say_job(recipe, job, prompt_tokens)
        if chosen.arch < 80:
            if dtype_of(recipe) == "bfloat16":
                say(f'a {chosen.name} has no bfloat16 arithmetic: write [model] dtype = "float16"')
            say(f"attention is PyTorch's own on a {chosen.name}: what it takes is not counted here")
        lines = plan_lines(asked, "the recipe as it stands", whose)
        if best is not None and best.settings == asked.settings:
            lines += ["no settings that fit are faster; to paste:"]
            lines += [f"  {line}" for line in proposal_lines(best)]
        elif best is not None:
            lines += plan_lines(best, "the fastest settings that fit", whose)
            lines += ["to paste:", *(f"  {line}" for line in proposal_lines(best))]
        else:
            lines.append("no limit was given: --memory 24GiB or --card NAME shows what fits")
        if not card and own is None:
            lines.append(f"no card was named: seconds are the {MEASURED}'s (--card NAME)")
        if job.critic is not None:
            from sparring.train.plan import predict
            from sparring.train.plan_table import algorithm_jobs, table_lines

            settings = (best or asked).settings
            found = {name: predict(j, settings) for name, j in algorithm_jobs(job).items()}
            lines.append("the training phase by algorithm and critic, same settings:")
            lines += table_lines({name: plan.training for name, plan in found.items()})
        for line in lines:
            say(line)


def _budget(recipe: Recipe, memory: str, card: Card | None) -> tuple[int | None, str]:
    """Bytes of --memory or run.memory, at most the named card's, and whose; None: no limit."""
    from sparring.recipe import parse_size
    from sparring.train.plan import gib

    budget, whose = None, ""
    if memory:
        try:
            budget, whose = parse_size(memory), "--memory"
        except ValueError as error:
            raise UserError(f"--memory {memory}: {error}") from error
    elif recipe.run.memory != "auto":
        budget, whose = int(recipe.run.memory), "run.memory"
    if card is None or (budget is not None and budget <= card.usable):
        return budget, whose
    more = f"; {whose} asks for more" if whose else ""
    return card.usable, f"{card.name}: {gib(card.memory)} less what its driver keeps{more}"


def _say_job(recipe: Recipe, job: Job, prompt_tokens: int) -> None:
    policy, work = job.policy, job.work
    bits = "NF4" if policy.is_quantised else "16 bits" if policy.item == 2 else "32 bits"
    trained = f"an adapter of rank {policy.rank}" if policy.rank else "all weights"
    assumed = "" if prompt_tokens or not job.samples else " (assumed; --prompt-tokens N tells)"
    say(
        f"{recipe.model.path}: {policy.num_linear / 1e9:.2f} billion weights in linear"
        f" layers, {bits}, {trained} trained; a step: {work.prompts} prompts x {work.group_size}"
        f" completions, {work.prompt_tokens} tokens a prompt{assumed},"
        f" {work.completion_tokens} a completion"
    )
