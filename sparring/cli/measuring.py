"""The command that measures a model: eval."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from sparring.cli.app import PASS_ON, Adapter, Model, Traceback, app, load, recipe_secrets, split
from sparring.cli.terminal import emit, interval, opened, progress, reporting, say, table
from sparring.errors import UserError

if TYPE_CHECKING:
    from sparring.recipe import Recipe
    from sparring.train.measure import Report


@app.command(name="eval", context_settings=PASS_ON)
def evaluate(
    words: Annotated[list[str] | None, typer.Argument(metavar="[RECIPE]")] = None,
    model: Model = "",
    adapter: Adapter = "",
    data: Annotated[
        str,
        typer.Option(
            "--data", help="Evaluation data: a file, a Hub id, or: gsm8k.", metavar="FILE"
        ),
    ] = "",
    reward: Annotated[str, typer.Option("--reward", help="What judges.", metavar="NAME")] = "",
    against: Annotated[
        str,
        typer.Option(
            "--against",
            help="Measure another model on the same prompts too: base, or a model.",
            metavar="MODEL",
        ),
    ] = "",
    samples: Annotated[
        str, typer.Option("--samples", help="Write a row for each sample.", metavar="FILE.jsonl")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    traceback: Traceback = False,
) -> None:
    """Measure accuracy with its 95% interval: of a RECIPE, or by --model --data --reward."""
    with reporting(traceback):
        recipe = _evaluation_recipe(words or [], model, adapter, data, reward)
        from sparring.train.measure import measure

        with opened(samples) as file:
            with progress("evaluating") as on_progress:
                report = measure(
                    recipe,
                    against=against,
                    say=say,
                    on_progress=on_progress,
                    secrets=recipe_secrets(recipe),
                )
            if file is not None:
                for row in report.rows(recipe.model.path):
                    emit(row, file)
        if as_json:
            names = {"model": recipe.model.path, "data": recipe.data.eval}
            emit({**names, **report.as_dict()}, sys.stdout)
        else:
            _show(report)


def _show(report: Report) -> None:
    """An evaluation for people: accuracy, more samples, rates, and the other model's."""
    evaluation, other = report.measured.evaluation, report.other
    rows = {"model": evaluation.as_dict()}
    if other is not None:
        rows["against"] = other.evaluation.as_dict()
    say(table(rows))
    for title, at in (("pass", evaluation.pass_at), ("maj", evaluation.majority_at)):
        for k, found in at.items() if evaluation.num_samples > 1 else ():
            say(f"{title}@{k:5}{found['value']:>9.1%}  {interval(found):^17}")
    rates = [f"cut by the length limit {evaluation.truncated:.1%}"]
    if evaluation.no_answer is not None:
        rates.insert(0, f"without an answer {evaluation.no_answer:.1%}")
    say(", ".join(rates))
    if (better := report.comparison) is not None:
        say(
            f"difference {better.difference:+.1%} (95% interval {better.low:+.1%} to"
            f" {better.high:+.1%}), {better.won} prompts won, {better.lost} lost,"
            f" {better.tied} tied; p = {better.p_value:.3g} ({better.test} test)"
            f" against {report.other_name}"
        )


def _evaluation_recipe(
    words: Sequence[str], model: str, adapter: str, data: str, reward: str
) -> Recipe:
    from sparring.recipe import build_recipe

    names, options = split(words)
    given = {"--model.path": model, "--model.adapter": adapter, "--data.eval": data}
    flags = [word for option, value in given.items() if value for word in (option, value)]
    overrides = [f"{option}={value}" for option, value in options]
    if names:
        if reward:
            raise UserError(
                "a RECIPE has its own [[reward]]; --reward goes with --model and --data"
            )
        return load([*names, *flags, *overrides], "eval")
    if not (model and data and reward):
        raise UserError("eval takes a RECIPE, or --model MODEL, --data FILE and --reward NAME")
    return build_recipe({"reward": [{"name": reward}]}, [*flags, *overrides], command="eval")
