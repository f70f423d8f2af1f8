"""Data sets that a recipe may call by a short name: where they lie on the Hub, and their columns.

Nothing is packaged: a name is the Hub's data set with its columns renamed. A file or folder of the
same name comes first.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sparring.data.rows import Row, Rows, load_rows
from sparring.errors import DataError

HUB = {"gsm8k": "openai/gsm8k:main"}
"""Short names, and the Hub's."""


def read_rows(
    source: str, *, split: str = "train", limit: int = 0, bad_rows: str = "error"
) -> Rows:
    """As `load_rows`, and "gsm8k" by name: `prompt`, `reference` (the number), `solution`.

    Raises DataError, within 30 seconds where the Hub cannot be reached.
    """
    if source not in HUB or Path(source).exists():
        return load_rows(source, split=split, limit=limit, bad_rows=bad_rows)
    try:
        rows = load_rows(HUB[source], split=split, limit=limit, bad_rows=bad_rows)
    except DataError as error:
        raise DataError(
            f"'{source}' is the Hub's {HUB[source]}: {error}; a copy as a file is named by its path"
        ) from error
    return replace(
        rows, source=source, values=tuple(_gsm8k(row, rows.where(i)) for i, row in enumerate(rows))
    )


def _gsm8k(row: Row, where: str) -> Row:
    question, solution = row.get("question"), row.get("answer")
    if not isinstance(question, str) or not isinstance(solution, str) or "####" not in solution:
        raise DataError(f"{where}: no row of GSM8K: it has {', '.join(row)}, or no '#### answer'")
    reference = solution.rpartition("####")[2].strip().replace(",", "").removeprefix("$")
    return {"prompt": question, "reference": reference, "solution": solution}
