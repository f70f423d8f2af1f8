"""The commands that train."""

from __future__ import annotations

from sparring.cli.app import PASS_ON, Resume, Traceback, Words, app, load
from sparring.cli.terminal import reporting, show_before_and_after


@app.command(context_settings=PASS_ON)
def grpo(words: Words, resume: Resume = False, traceback: Traceback = False) -> None:
    """Train by GRPO: sample groups, judge them, reinforce what beat its own group."""
    with reporting(traceback):
        recipe = load(words, "grpo")
        from sparring.train import grpo as loop

        show_before_and_after(loop.train(recipe, resume=resume))


@app.command(context_settings=PASS_ON)
def sft(words: Words, resume: Resume = False, traceback: Traceback = False) -> None:
    """Train on given answers, token by token."""
    with reporting(traceback):
        recipe = load(words, "sft")
        from sparring.train import sft as loop

        loop.train(recipe, resume=resume)
