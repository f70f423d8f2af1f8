"""Reading rows: every format, every way a file can be wrong."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import sparring.data.rows as rows_module
from sparring.data.rows import build_rows, load_rows
from sparring.errors import DataError

ROWS = [{"prompt": "a", "reference": "1"}, {"prompt": "b", "reference": "2"}]


def write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return str(path)


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def test_jsonl_lines_end_at_line_feeds_only(tmp_path):
    text = '\ufeff{"prompt": "one\u2028two\x85three"}\r\n\n{"prompt": "b", "extra": [1, null]}'
    rows = load_rows(write(tmp_path / "x.jsonl", text))
    assert [row["prompt"] for row in rows] == ["one\u2028two\x85three", "b"]
    assert rows.where(1) == f"{tmp_path}/x.jsonl:3"
    assert rows.columns == ("prompt", "extra")
    assert rows[1]["extra"] == [1, None]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b'{"prompt": ', "not JSON"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (b'["prompt"]', "array"),
        (b'"prompt"', "string"),
        (b"17", "number"),
        (b'{"prompt": "\\ud83d"}', "surrogate"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_bad_jsonl_line_is_named_or_skipped(tmp_path, line, what):
    source = write(tmp_path / "x.jsonl", b'{"prompt": "a"}\n' + line + b'\n{"prompt": "c"}\n')
    with pytest.raises(DataError, match=what) as caught:
        load_rows(source)
    assert f"{source}:2: " in str(caught.value)
    assert "bad_rows" in str(caught.value)
    rows = load_rows(source, bad_rows="skip")
    assert [row["prompt"] for row in rows] == ["a", "c"]
    assert rows.num_bad == 1
    assert f"{source}:2: " in rows.bad[0]
    assert rows.where(1).endswith(":3")


def test_unknown_policy_for_bad_rows(tmp_path):
    with pytest.raises(DataError, match="'error' or 'skip'"):
        load_rows(write(tmp_path / "x.jsonl", jsonl(ROWS)), bad_rows="ignore")


def test_json_array_and_json_lines_in_a_json_file(tmp_path):
    array = load_rows(write(tmp_path / "x.json", json.dumps(ROWS, indent=1)))
    assert list(array) == ROWS
    assert array.where(1).endswith("x.json:row 2")
    lines = load_rows(write(tmp_path / "y.json", jsonl(ROWS)))
    assert list(lines) == ROWS
    with pytest.raises(DataError, match=r"z\.json:3: not JSON"):
        load_rows(write(tmp_path / "z.json", '[{"prompt": "a"},\n{"prompt": "b"}\n'))
    with pytest.raises(DataError, match=r"w\.json:row 2"):
        load_rows(write(tmp_path / "w.json", '[{"prompt": "a"}, 3]'))


def test_csv_values_stay_strings_and_lines_are_counted(tmp_path):
    text = '\ufeffprompt,reference\n"one\ntwo",007\n\nb,2.50\n'
    rows = load_rows(write(tmp_path / "x.csv", text))
    assert list(rows) == [
        {"prompt": "one\ntwo", "reference": "007"},
        {"prompt": "b", "reference": "2.50"},
    ]
    assert [rows.where(index)[-2:] for index in (0, 1)] == [":2", ":5"]
    tabs = load_rows(write(tmp_path / "x.tsv", "prompt\treference\na,b\t1\n"))
    assert tabs[0] == {"prompt": "a,b", "reference": "1"}


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b"a,1,2\n", "3 cells where the header has 2"),
        (b"a\n", "1 cells"),
        (b"\xff,1\n", "not UTF-8"),
        (b'"a"b,1\n', "not CSV"),
    ],
)
def test_bad_csv_line_is_named_or_skipped(tmp_path, line, what):
    source = write(tmp_path / "x.csv", b"prompt,reference\na,1\n" + line + b"c,3\n")
    with pytest.raises(DataError, match=what) as caught:
        load_rows(source)
    assert f"{source}:3: " in str(caught.value)
    rows = load_rows(source, bad_rows="skip")
    assert [row["prompt"] for row in rows] == ["a", "c"]
    assert rows.num_bad == 1


def test_csv_with_an_open_quote_or_a_doubled_header(tmp_path):
    with pytest.raises(DataError, match=r"x\.csv:3: .*not CSV"):
        load_rows(write(tmp_path / "x.csv", 'prompt,reference\na,1\n"b,2\nc,3\n'))
    with pytest.raises(DataError, match="'a' more than once"):
        load_rows(write(tmp_path / "y.csv", "a,a\n1,2\n"))


def test_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    nested = [{**row, "turns": [{"role": "user", "content": "x"}]} for row in ROWS] * 3
    pq.write_table(pa.Table.from_pylist(nested), tmp_path / "x.parquet", row_group_size=2)
    rows = load_rows(str(tmp_path / "x.parquet"))
    assert list(rows) == nested
    assert [rows.where(index).rsplit(":")[-1] for index in range(6)] == [
        f"row {number}" for number in range(1, 7)
    ]
    assert len(load_rows(str(tmp_path / "x.parquet"), limit=3)) == 3
    with pytest.raises(DataError, match="not a Parquet file"):
        load_rows(write(tmp_path / "y.parquet", b"PAR1 nonsense"))


def test_folders_saved_by_datasets(tmp_path, capfd):
    import datasets

    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk(str(tmp_path / "one"))
    both = datasets.DatasetDict({"train": one, "test": one.select([1])})
    both.save_to_disk(str(tmp_path / "both"))
    capfd.readouterr()
    assert list(load_rows(str(tmp_path / "one"), split="anything")) == ROWS
    assert list(load_rows(str(tmp_path / "both"), split="test")) == ROWS[1:]
    assert load_rows(str(tmp_path / "both")).where(0).endswith("both/train:row 1")
    assert len(load_rows(str(tmp_path / "one"), limit=1)) == 1
    with pytest.raises(DataError, match="no split 'dev'; it has train, test"):
        load_rows(str(tmp_path / "both"), split="dev")
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        load_rows(str(tmp_path / "one"))
    assert capfd.readouterr().err == ""


def test_folder_of_files_named_after_splits(tmp_path):
    write(tmp_path / "train-00000-of-00002.jsonl", jsonl(ROWS[:1]))
    write(tmp_path / "train-00001-of-00002.jsonl", jsonl(ROWS[1:]))
    write(tmp_path / "test.jsonl", jsonl([{"prompt": "t"}]))
    write(tmp_path / "dataset_infos.json", "{}")
    rows = load_rows(str(tmp_path))
    assert list(rows) == ROWS
    assert rows.where(1).endswith("train-00001-of-00002.jsonl:1")
    assert load_rows(str(tmp_path), split="test")[0]["prompt"] == "t"
    with pytest.raises(DataError, match=r"no file of the split 'dev'; it holds test\.jsonl"):
        load_rows(str(tmp_path), split="dev")


def test_folder_layouts(tmp_path):
    write(tmp_path / "a" / "part1.jsonl", jsonl(ROWS))
    assert list(load_rows(str(tmp_path / "a"), split="test")) == ROWS  # one set, no split names
    write(tmp_path / "b" / "data" / "train.csv", "prompt\nx\n")
    assert load_rows(str(tmp_path / "b"))[0] == {"prompt": "x"}
    write(tmp_path / "c" / "test" / "anything.jsonl", jsonl(ROWS[1:]))
    write(tmp_path / "c" / "train" / "anything.jsonl", jsonl(ROWS[:1]))
    assert list(load_rows(str(tmp_path / "c"), split="test")) == ROWS[1:]
    write(tmp_path / "a" / "part2.csv", "prompt\nx\n")
    with pytest.raises(DataError, match=r"mixes \.csv and \.jsonl"):
        load_rows(str(tmp_path / "a"))
    (tmp_path / "d").mkdir()
    with pytest.raises(DataError, match="holds no data"):
        load_rows(str(tmp_path / "d"))


def test_nothing_there_or_nothing_in_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source in ("missing.jsonl", "data/missing.jsonl", "/a/b/c/d", "alone"):
        with pytest.raises(DataError) as caught:
            load_rows(source)
        assert str(Path(source).absolute()) in str(caught.value)
        assert "org/name" in str(caught.value)
    with pytest.raises(DataError, match="no data is named"):
        load_rows("")
    with pytest.raises(DataError, match="holds no rows"):
        load_rows(write(tmp_path / "x.jsonl", "\n\n"))
    with pytest.raises(DataError, match="holds no rows"):
        load_rows(write(tmp_path / "x.csv", "prompt,reference\n"))
    with pytest.raises(DataError, match="all 2 rows are bad; the first is"):
        load_rows(write(tmp_path / "x.jsonl", "1\n2\n"), bad_rows="skip")
    with pytest.raises(DataError, match=r"'\.txt'; data files end in \.jsonl"):
        load_rows(write(tmp_path / "x.txt", "a"))
    with pytest.raises(DataError, match="cannot read"):
        load_rows("x" * 5000)


def test_limit(tmp_path):
    write(tmp_path / "train-1.jsonl", jsonl(ROWS))
    write(tmp_path / "train-2.jsonl", jsonl(ROWS))
    assert len(load_rows(str(tmp_path), limit=3)) == 3


def test_rows_in_memory():
    rows = build_rows(ROWS, name="mine")
    assert rows.where(1) == "mine:row 2"
    with pytest.raises(DataError, match="row 1 is a str"):
        build_rows(["a"])  # type: ignore[list-item]
    with pytest.raises(DataError, match="no rows"):
        build_rows([])


def test_jsonl_and_csv_need_no_library(tmp_path):
    write(tmp_path / "x.jsonl", jsonl(ROWS))
    write(tmp_path / "x.csv", "prompt\nx\n")
    script = (
        "import sys; from sparring.data.rows import load_rows\n"
        f"load_rows({str(tmp_path / 'x.jsonl')!r}); load_rows({str(tmp_path / 'x.csv')!r})\n"
        "heavy = {'datasets', 'pyarrow', 'pandas', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


class Hub:
    """Stands in for the Hub: `dataset_info` answers with `info`, `load_dataset` with `data`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, info: Any, data: Any = None) -> None:
        import datasets
        import huggingface_hub

        self.calls: list[tuple[Any, ...]] = []
        self.info, self.data = info, data
        api = SimpleNamespace(dataset_info=self.dataset_info)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
        monkeypatch.setattr(datasets, "load_dataset", self.load_dataset)

    def dataset_info(self, name: str, *, timeout: float) -> Any:
        assert timeout <= 30
        return self.info() if callable(self.info) else self.give(self.info)

    def load_dataset(self, name: str, config: str | None, *, split: str) -> Any:
        self.calls.append((name, config, split))
        return self.give(self.data)

    @staticmethod
    def give(value: Any) -> Any:
        if isinstance(value, BaseException):
            raise value
        return value


def hub_error(kind: str) -> BaseException:
    from huggingface_hub import errors

    cls = getattr(errors, kind)
    error = cls.__new__(cls)  # the constructors want a response of the transport library
    Exception.__init__(error, f"{kind} text")
    return error


def test_hub_data_set(monkeypatch):
    import datasets

    hub = Hub(monkeypatch, SimpleNamespace(), datasets.Dataset.from_list(ROWS))
    rows = load_rows("org/name:main", split="test", limit=1)
    assert list(rows) == ROWS[:1]
    assert rows.where(0) == "org/name:main[test]:row 1"
    load_rows("org/name")
    assert hub.calls == [("org/name", "main", "test"), ("org/name", None, "train")]


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("RepositoryNotFoundError", "check the spelling"),
        ("GatedRepoError", "is gated: ask its owner"),
        ("HfHubHTTPError", "cannot be reached"),
    ],
)
def test_hub_says_no(monkeypatch, kind, what):
    hub = Hub(monkeypatch, hub_error(kind))
    with pytest.raises(DataError, match=what):
        load_rows("org/name")
    assert hub.calls == []


def test_hub_does_not_answer(monkeypatch):
    forever = threading.Event()
    Hub(monkeypatch, lambda: forever.wait(30))
    monkeypatch.setattr(rows_module, "HUB_PROBE_SECONDS", 0.2)
    started = time.monotonic()
    with pytest.raises(DataError, match=r"cannot be reached for 'org/name' \(no answer within"):
        load_rows("org/name")
    assert time.monotonic() - started < 5
    forever.set()


def test_hub_probe_leaves_room_for_half_a_minute():
    assert rows_module.HUB_PROBE_SECONDS <= 25


def test_hub_offline_uses_what_was_downloaded(monkeypatch):
    import datasets

    Hub(monkeypatch, hub_error("OfflineModeIsEnabled"), datasets.Dataset.from_list(ROWS))
    assert list(load_rows("org/name")) == ROWS


@pytest.mark.parametrize("error", [ValueError("Unknown split 'x'"), OSError("disk"), "found"])
def test_hub_data_that_cannot_be_loaded(monkeypatch, error):
    from datasets.exceptions import DatasetNotFoundError

    raised = DatasetNotFoundError("gated dataset") if error == "found" else error
    Hub(monkeypatch, SimpleNamespace(), raised)
    with pytest.raises(DataError, match=r"cannot be loaded: .*org/name:config"):
        load_rows("org/name", split="x")
