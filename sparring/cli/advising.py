"""The command before a run: advise."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparring.cli.app import PASS_ON, Traceback, Words, app, load, recipe_secrets, split
from sparring.cli.terminal import emit, progress, reporting, say

if TYPE_CHECKING:
    from sparring.train.advise import Advice


@app.command(context_settings=PASS_ON)
def advise(
    words: Words,
    prompts: Annotated[int, typer.Option(help="Prompts to sample.", min=1)] = 64,
    samples: Annotated[int, typer.Option(help="Completions of each.", min=1)] = 8,
    output: Annotated[
        str,
        typer.Option("--output", help="Write rows and recipes of the advice here.", metavar="DIR"),
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    traceback: Traceback = False,
) -> None:
    """Say whether a RECIPE is for GRPO, SFT, a system prompt or DPO, and why."""
    with reporting(traceback):
        recipe = load(words, "advise")
        from sparring.train.advise import advise as look
        from sparring.train.advise_sampling import sample_policy

        with progress("sampling") as on_progress:
            advice = look(
                recipe,
                name=split(words)[0][0],
                sample=partial(sample_policy, on_progress=on_progress),
                num_prompts=prompts,
                num_samples=samples,
                folder=output,
                secrets=recipe_secrets(recipe),
            )
        if output:
            from sparring.train.advise_files import write_advice

            for path in write_advice(recipe, advice, Path(output)):
                say(f"written: {path}")
        if as_json:
            emit(advice.as_dict(), sys.stdout)
        else:
            _show(advice)


def _show(advice: Advice) -> None:
    """The advice for people: what, why, the numbers, the command."""
    say(f"advice: {advice.recommendation}")
    for reason in advice.reasons:
        say(f"  - {reason}")
    say("measured:")
    for name, value in advice.measures.items():
        say(f"  {name:37} {_shown(value)}")
    for kind, lines in advice.rows.items():
        if lines:
            rest = f" ... {lines[-1]}" if len(lines) > 10 else ""
            first = ", ".join(map(str, lines[:10]))
            say(f"rows for {kind}: {len(lines)} (lines {first}{rest})")
    say(f"next:\n  {advice.command}")


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())
