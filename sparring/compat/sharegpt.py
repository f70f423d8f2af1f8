"""Rows of from/value (ShareGPT) as messages of role and content, under Unsloth's names."""

from __future__ import annotations

from typing import Any

from sparring.data.conversations import dialogue_reader
from sparring.data.rows import build_rows


def standardize_sharegpt(dataset: Any, *_: Any, **__: Any) -> Any:
    """The data set with its column `conversations` as messages of role and content.

    A datasets.Dataset gives one of its kind, a list a list. Raises DataError with the row.
    """
    read = dialogue_reader(build_rows(dataset, name="dataset"))

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "conversations": [dict(turn) for turn in read(row).messages]}

    if hasattr(dataset, "map"):
        return dataset.map(convert, load_from_cache_file=False)
    return [convert(row) for row in dataset]


standardize_data_formats = standardize_sharegpt


def unsloth_train(trainer: Any, *given: Any, **named: Any) -> Any:
    """As trainer.train(...)."""
    return trainer.train(*given, **named)
