"""Every error that Sparring raises on purpose, in one tree.

    SparringError
    |-- UserError (also a ValueError)    the input is wrong; the command line exits with 2
    |   |-- RecipeError                  a recipe key, value or override
    |   |-- DataError                    a data file, row or column
    |   |-- CheckpointError              a model, adapter or tokenizer: unreadable or unfit
    |   |-- RewardError                  a reward that is missing or breaks its contract
    |   |-- RunDirectoryError            a directory that holds a run, or cannot be resumed
    |   `-- MemoryBudgetError            something that can never fit into its memory
    |-- RunError (also a RuntimeError)   a run that had started failed; exit code 1
    `-- Interrupted                      the run was asked to end; exit code 130 or 143

A message says what happened, what was found, what is allowed, and how to mend it.
"""


class SparringError(Exception):
    """Base of every error that Sparring raises on purpose."""


class UserError(SparringError, ValueError):
    """The user's input is wrong. Exit code 2, one message, no traceback."""


class RecipeError(UserError):
    """A recipe key, value or command-line override is unknown or not allowed."""


class DataError(UserError):
    """A data file is missing or unreadable, or a row or column is not what it must be."""


class CheckpointError(UserError):
    """A model, adapter or tokenizer cannot be read, is not supported, or does not fit the rest."""


class RewardError(UserError):
    """A reward function cannot be found, takes other arguments, or breaks its contract."""


class RunDirectoryError(UserError):
    """A run directory already holds a run, or holds one that cannot be resumed as asked."""


class MemoryBudgetError(UserError):
    """Something can never fit into the memory it was given."""


class RunError(SparringError, RuntimeError):
    """A run that had started failed. Exit code 1; what was written before stays intact."""


class Interrupted(SparringError):
    """The run was asked to end; `exit_code` is 130 (interrupt) or 143 (SIGTERM)."""

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
