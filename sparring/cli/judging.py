"""The command that tries a reward on rows of a file: reward."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from sparring.cli.app import PASS_ON, Traceback, app, secrets_of, split
from sparring.cli.terminal import emit, reporting, say
from sparring.errors import UserError


@app.command(context_settings=PASS_ON)
def reward(
    words: Annotated[
        list[str], typer.Argument(metavar="NAME", help="--knob VALUE turns its knobs.")
    ],
    input_file: Annotated[
        str, typer.Option("--input", help='Rows with "completion".', metavar="FILE.jsonl")
    ],
    explain: Annotated[bool, typer.Option("--explain", help="Add what the reward noted.")] = False,
    traceback: Traceback = False,
) -> None:
    """Judge the rows of a file; prints them with `reward` (a number or null) and `reason`."""
    with reporting(traceback):
        names, knobs = split(words)
        if len(names) != 1:
            raise UserError(f"reward takes one NAME, got {len(names)}: {', '.join(names)}")
        from sparring.data.rows import load_rows
        from sparring.recipe.toml_text import read_value
        from sparring.rewards.rows import judge_rows
        from sparring.rewards.verdicts import load_reward
        from sparring.train.inputs import give_secret

        rows = load_rows(input_file)
        pairs = {option.removeprefix("--"): read_value(value) for option, value in knobs}
        judge = load_reward(names[0], knobs=pairs)
        give_secret(judge, secrets_of([pairs]))
        try:
            judged = judge_rows(judge, rows.values, explain=explain)
        finally:
            judge.close()
        for row in judged:
            emit(row, sys.stdout)
        values = [row["reward"] for row in judged if row["reward"] is not None]
        mean = f", mean {sum(values) / len(values):.4f}" if values else ""
        say(f"{judge.name}: {len(values)} of {len(judged)} rows judged{mean}")
