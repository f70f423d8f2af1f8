"""The commands that train."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from sparring.cli.app import PASS_ON, Resume, Traceback, Words, app, load, recipe_secrets
from sparring.cli.terminal import emit, opened, reporting, say, show_before_and_after


@app.command(context_settings=PASS_ON)
def grpo(words: Words, resume: Resume = False, traceback: Traceback = False) -> None:
    """Train by GRPO: sample groups, judge them, reinforce what beat its own group."""
    with reporting(traceback):
        recipe = load(words, "grpo")
        from sparring.train import grpo as loop

        show_before_and_after(loop.train(recipe, resume=resume, secrets=recipe_secrets(recipe)))


@app.command(context_settings=PASS_ON)
def sft(words: Words, resume: Resume = False, traceback: Traceback = False) -> None:
    """Train on given answers, token by token."""
    with reporting(traceback):
        recipe = load(words, "sft")
        from sparring.train import sft as loop

        loop.train(recipe, resume=resume)


@app.command(context_settings=PASS_ON)
def dpo(words: Words, resume: Resume = False, traceback: Traceback = False) -> None:
    """Train on pairs: raise the chosen answer over the rejected one."""
    with reporting(traceback):
        recipe = load(words, "dpo")
        from sparring.train import dpo as loop

        loop.train(recipe, resume=resume)


@app.command(context_settings=PASS_ON)
def ppo(words: Words, resume: Resume = False, traceback: Traceback = False) -> None:
    """Train by PPO: a critic says what to expect, what beats it is reinforced."""
    with reporting(traceback):
        recipe = load(words, "ppo")
        from sparring.train import ppo as loop

        show_before_and_after(loop.train(recipe, resume=resume, secrets=recipe_secrets(recipe)))


@app.command()
def pairs(
    run: Annotated[str, typer.Argument(help="A run directory of grpo or ppo.", metavar="RUN")],
    output_file: Annotated[
        str, typer.Option("--output", help="Where rows go; else printed.", metavar="FILE.jsonl")
    ] = "",
    margin: Annotated[float, typer.Option(help="Rewards must differ by more than this.")] = 0.0,
    traceback: Traceback = False,
) -> None:
    """Write pairs for dpo: the best and the worst completion of each group of a run."""
    with reporting(traceback):
        from sparring.train.pairs import pairs_of_run

        report = pairs_of_run(run, margin=margin)
        with opened(output_file) as target:
            for row in report.rows:
                emit(row, target or sys.stdout)
        say(report.line())
