"""The command `sparring`: words of a command line in, one function called, an exit code out.

What a machine reads goes to standard output alone, what a person reads to standard error. Exit
codes: 0 done, 1 a run failed, 2 the user's input is wrong, 130 interrupted (143 by SIGTERM). Heavy
imports wait until a command needs them, so that `sparring --help` answers at once.
"""

from __future__ import annotations

# isort: off
# Each module gives the app its commands, in the order of --help.
from sparring.cli import training
from sparring.cli import measuring
from sparring.cli import sampling
from sparring.cli import judging
from sparring.cli import advising
from sparring.cli import planning
from sparring.cli import teaching
from sparring.cli import exporting

# isort: on
from sparring.cli.app import app

__all__ = [
    "advising",
    "app",
    "exporting",
    "judging",
    "main",
    "measuring",
    "planning",
    "sampling",
    "teaching",
    "training",
]


def main() -> None:
    """Entry point of the console script."""
    app()
