"""Rows of a data set, as plain dictionaries, with the place each one came from.

Reads JSONL, JSON arrays, CSV and TSV with the standard library, Parquet with pyarrow, folders saved
by `datasets` and Hub ids with `datasets` (both imported only when needed). What a row means is not
known here: prompts.py and conversations.py give it a meaning.
"""

from __future__ import annotations

import csv
import json
import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparring.deadline import within
from sparring.errors import DataError

Row = dict[str, Any]

SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv")
SPLIT_NAMES = ("train", "test", "validation", "valid", "val", "dev", "eval")
NOT_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?")
HUB_PROBE_SECONDS = 20.0
REMEDY = 'mend the row, or set data.bad_rows = "skip" to drop and count such rows'
MESSAGES_KEPT = 20


class BadRows:
    """Counts bad rows, or refuses the first: what the knob data.bad_rows turns.

    num: how many so far. messages: the first 20, each with its place.
    """

    def __init__(self, policy: str) -> None:
        if policy not in ("error", "skip"):
            raise DataError(f"data.bad_rows is {policy!r}; it is 'error' or 'skip'")
        self.policy = policy
        self.num = 0
        self.messages: list[str] = []

    def add(self, where: str, what: str) -> None:
        """Record one bad row; raises DataError where bad rows are errors."""
        if self.policy == "error":
            raise DataError(f"{where}: {what}; {REMEDY}")
        self.num += 1
        if len(self.messages) < MESSAGES_KEPT:
            self.messages.append(f"{where}: {what}")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rows:
    """Rows in the order of their files.

    source: what the user named. values: the rows. places: per row (index into files, line or row
    number from 1). files: (name, unit) with unit "" for lines and "row " where a file has no lines.
    num_bad, bad: rows that could not be read, and the first 20 of them in words.
    """

    source: str
    values: tuple[Row, ...]
    places: tuple[tuple[int, int], ...]
    files: tuple[tuple[str, str], ...]
    num_bad: int = 0
    bad: tuple[str, ...] = ()
    columns: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        seen: dict[str, None] = {}
        for row in self.values:
            seen.update(dict.fromkeys(row))
        object.__setattr__(self, "columns", tuple(seen))

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> Row:
        return self.values[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.values)

    def where(self, index: int) -> str:
        """Where row `index` came from: "train.jsonl:17", or "train.parquet:row 17"."""
        file, number = self.places[index]
        name, unit = self.files[file]
        return f"{name}:{unit}{number}"


def build_rows(values: Iterable[Mapping[str, Any]], *, name: str = "rows") -> Rows:
    """Rows that are in memory; raises DataError where there are none or one is no mapping."""
    rows: list[Row] = []
    for number, value in enumerate(values, start=1):
        if not isinstance(value, Mapping):
            raise DataError(f"{name}:row {number} is a {type(value).__name__}; a row is a mapping")
        rows.append(dict(value))
    if not rows:
        raise DataError(f"{name} holds no rows")
    places = tuple((0, number) for number in range(1, len(rows) + 1))
    return Rows(source=name, values=tuple(rows), places=places, files=((name, "row "),))


def load_rows(
    source: str, *, split: str = "train", limit: int = 0, bad_rows: str = "error"
) -> Rows:
    """Read the rows of a file, a folder or a Hub id ("org/name" or "org/name:config").

    split: which part of a saved dataset dictionary, a folder with files named after splits, or a
    Hub data set; a single file and a folder without split names are one set and are read whole.
    limit: at most so many rows, 0 for all. bad_rows: "error" or "skip" for lines that cannot be
    read. Raises DataError: nothing there, nothing in it, not readable (with file and line), or the
    Hub cannot serve it (within 30 seconds where it cannot be reached).
    """
    bad = BadRows(bad_rows)
    path = Path(source)
    if not source:
        raise DataError("no data is named; set data.train to a file, a folder or a Hub id")
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
    except OSError as error:
        raise DataError(f"cannot read {path.absolute()}: {error.strerror or error}") from error
    if is_file:
        rows = _read_files([path], source, bad, limit)
    elif is_folder:
        rows = _read_folder(path, source, split, bad, limit)
    elif HUB_ID.fullmatch(source) and path.suffix.lower() not in SUFFIXES:
        rows = _read_hub(source, split, limit)
    else:
        raise DataError(
            f"there is no data at {path.absolute()}; name a file ({', '.join(SUFFIXES)}), a "
            "folder, or a Hub data set as org/name or org/name:config"
        )
    if not rows.values:
        if bad.num:
            raise DataError(f"{source}: all {bad.num} rows are bad; the first is {bad.messages[0]}")
        raise DataError(f"{source} holds no rows ({path.absolute()})")
    return rows


def _read_files(paths: Sequence[Path], source: str, bad: BadRows, limit: int) -> Rows:
    values: list[Row] = []
    places: list[tuple[int, int]] = []
    files: list[tuple[str, str]] = []
    for index, path in enumerate(paths):
        unit, reader = _reader(path, bad)
        files.append((str(path), unit))
        try:
            for number, row in reader:
                values.append(row)
                places.append((index, number))
                if limit and len(values) == limit:
                    break
        except OSError as error:
            raise DataError(f"cannot read {path.absolute()}: {error}") from error
        if limit and len(values) == limit:
            break
    return Rows(
        source=source,
        values=tuple(values),
        places=tuple(places),
        files=tuple(files),
        num_bad=bad.num,
        bad=tuple(bad.messages),
    )


def _reader(path: Path, bad: BadRows) -> tuple[str, Iterator[tuple[int, Row]]]:
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return "", _read_jsonl(path, bad)
    if suffix == ".json":
        if _starts_with_bracket(path):
            return "row ", _read_json_array(path, bad)
        return "", _read_jsonl(path, bad)
    if suffix in (".csv", ".tsv"):
        return "", _read_csv(path, bad, delimiter="\t" if suffix == ".tsv" else ",")
    if suffix == ".parquet":
        return "row ", _read_parquet(path)
    raise DataError(
        f"{path.absolute()} ends in {suffix or 'no suffix'!r}; data files end in "
        f"{', '.join(SUFFIXES)}"
    )


def _read_jsonl(path: Path, bad: BadRows) -> Iterator[tuple[int, Row]]:
    """One object a line; only a line feed ends a line. Blank lines are passed over."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            row, fault = _parse_object(line)
            if row is None:
                bad.add(f"{path}:{number}", fault)
            else:
                yield number, row


def _parse_object(line: bytes) -> tuple[Row | None, str]:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return None, f"the line is not UTF-8 (byte {error.start + 1})"
    except json.JSONDecodeError as error:
        return None, f"the line is not JSON: {error.msg} at character {error.pos + 1}"
    except (ValueError, RecursionError) as error:
        return None, f"the line is not JSON that can be read: {error}"
    return _check_object(value, escapes=b"\\ud" in line.lower())


def _check_object(value: object, *, escapes: bool) -> tuple[Row | None, str]:
    if not isinstance(value, dict):
        return None, f"the row is a JSON {_json_type(value)}; a row is an object"
    if escapes:
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            return None, "the row holds half of a surrogate pair, which is not text"
    return value, ""


def _json_type(value: object) -> str:
    if isinstance(value, list):
        return "array"
    if isinstance(value, str):
        return "string"
    return "null" if value is None else "number or truth value"


def _starts_with_bracket(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
    except OSError as error:
        raise DataError(f"cannot read {path.absolute()}: {error}") from error


def _read_json_array(path: Path, bad: BadRows) -> Iterator[tuple[int, Row]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
        values = json.loads(text)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start + 1})") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON that can be read: {error}") from error
    escapes = "\\ud" in text.lower()
    for number, value in enumerate(values, start=1):
        row, fault = _check_object(value, escapes=escapes)
        if row is None:
            bad.add(f"{path}:row {number}", fault)
        else:
            yield number, row


def _read_csv(path: Path, bad: BadRows, *, delimiter: str) -> Iterator[tuple[int, Row]]:
    """The first line names the columns; every value stays a string."""
    with path.open("rb") as file:
        lines = (line.decode("utf-8", errors="surrogateescape") for line in file)
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            number = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                bad.add(f"{path}:{number}", f"the line is not CSV: {error}")
                continue
            if not cells:
                continue
            if header is None:
                header = _csv_header(path, cells)
            elif len(cells) != len(header):
                bad.add(
                    f"{path}:{number}", f"{len(cells)} cells where the header has {len(header)}"
                )
            elif not _is_text("".join(cells)):
                bad.add(f"{path}:{number}", "the line is not UTF-8")
            else:
                yield number, dict(zip(header, cells, strict=True))


def _is_text(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _csv_header(path: Path, cells: list[str]) -> list[str]:
    cells = [cells[0].removeprefix("\ufeff"), *cells[1:]]
    twice = sorted({cell for cell in cells if cells.count(cell) > 1})
    if twice:
        raise DataError(f"{path}:1: the header names {', '.join(map(repr, twice))} more than once")
    return cells


def _read_parquet(path: Path) -> Iterator[tuple[int, Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pa.ArrowException, ValueError) as error:
        raise DataError(
            f"{path.absolute()} is not a Parquet file that can be read: {error}"
        ) from error


def _read_folder(folder: Path, source: str, split: str, bad: BadRows, limit: int) -> Rows:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _read_saved(folder, source, split, limit)
    inside = [folder / split, folder / "data", folder]
    found = next((paths for paths in map(_data_files, inside) if paths), [])
    if not found:
        raise DataError(
            f"the folder {folder.absolute()} holds no data; expected files ({', '.join(SUFFIXES)}) "
            "or what datasets' save_to_disk writes"
        )
    if found[0].parent != folder / split:
        found = _files_of_split(found, folder, split)
    kinds = sorted({path.suffix.lower() for path in found})
    if len(kinds) > 1:
        raise DataError(
            f"the folder {found[0].parent.absolute()} mixes {' and '.join(kinds)} files; "
            "name one file, or a folder with one kind"
        )
    return _read_files(found, source, bad, limit)


def _data_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and path.name not in NOT_DATA and path.is_file()
    )


def _files_of_split(paths: list[Path], folder: Path, split: str) -> list[Path]:
    words = {path: set(re.split(r"[-_.]", path.stem.lower())) for path in paths}
    chosen = [path for path in paths if split.lower() in words[path]]
    if chosen:
        return chosen
    if any(words[path] & set(SPLIT_NAMES) for path in paths):
        raise DataError(
            f"the folder {folder.absolute()} has no file of the split '{split}'; it holds "
            f"{', '.join(path.name for path in paths)}; set data.split or data.eval_split"
        )
    return paths


def _read_saved(folder: Path, source: str, split: str, limit: int) -> Rows:
    import datasets

    with _quiet():
        try:
            saved = datasets.load_from_disk(str(folder))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{folder.absolute()} looks saved by datasets but cannot be read: {error}"
            ) from error
        if isinstance(saved, datasets.DatasetDict):
            if split not in saved:
                raise DataError(
                    f"{folder.absolute()} has no split '{split}'; it has "
                    f"{', '.join(map(str, saved))}; set data.split or data.eval_split"
                )
            return _from_dataset(saved[split], source, f"{folder}/{split}", limit)
        return _from_dataset(saved, source, str(folder), limit)


def _from_dataset(dataset: Any, source: str, name: str, limit: int) -> Rows:
    if limit:
        dataset = dataset.select(range(min(limit, len(dataset))))
    values = tuple(dataset.with_format(None).to_list())
    places = tuple((0, number) for number in range(1, len(values) + 1))
    return Rows(source=source, values=values, places=places, files=((name, "row "),))


def _read_hub(source: str, split: str, limit: int) -> Rows:
    import datasets

    name, _, config = source.partition(":")
    _probe_hub(source, name)
    with _quiet():
        try:
            dataset = datasets.load_dataset(name, config or None, split=split)
        except _hub_errors() as error:
            raise DataError(
                f"the Hub data set '{source}', split '{split}', cannot be loaded: "
                f"{_one_line(error)}; name it org/name or org/name:config and the split in "
                "data.split or data.eval_split; a gated one needs `hf auth login` and its owner's "
                "consent"
            ) from error
        return _from_dataset(dataset, source, f"{source}[{split}]", limit)


def _probe_hub(source: str, name: str) -> None:
    """Ask the Hub whether `name` is there, with a deadline that also holds for name resolution."""
    from huggingface_hub import HfApi
    from huggingface_hub import errors as hub

    found: BaseException
    try:
        within(
            HUB_PROBE_SECONDS,
            lambda: HfApi().dataset_info(name, timeout=HUB_PROBE_SECONDS / 2),
        )
        return
    except _hub_errors() as error:
        found = error
    local = f"nor is there a file or folder {Path(source).absolute()}"
    if isinstance(found, hub.OfflineModeIsEnabled):
        return  # offline: what was downloaded before may still be there
    if isinstance(found, hub.GatedRepoError):
        raise DataError(
            f"the Hub data set '{name}' is gated: ask its owner for access on "
            f"https://huggingface.co/datasets/{name}, then run `hf auth login`"
        ) from found
    if isinstance(found, hub.RepositoryNotFoundError):
        raise DataError(
            f"the Hub has no data set '{name}' that you may read, {local}; check the spelling, or "
            "run `hf auth login` if it is private"
        ) from found
    raise DataError(
        f"the Hub cannot be reached for '{name}' ({_one_line(found)}), {local}; check the network, "
        "or name a local file, or set HF_HUB_OFFLINE=1 if the data set was downloaded before"
    ) from found


def _hub_errors() -> tuple[type[Exception], ...]:
    """What the Hub's libraries raise; the transport's own errors share a base with the Hub's."""
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    kinds: list[type[Exception]] = [*HfHubHTTPError.__bases__]
    kinds += [datasets.exceptions.DatasetsError, OSError, ValueError, LookupError, RuntimeError]
    return tuple(kinds)


def _one_line(error: object) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep warnings of the loading libraries off the screen; what goes wrong is raised anyway."""
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub", "fsspec")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
