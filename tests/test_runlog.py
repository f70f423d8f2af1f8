"""Run directories: written line by line, never over another run, cut back on resume."""

from __future__ import annotations

import errno
import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparring import runlog
from sparring.environment import describe_environment
from sparring.errors import RunDirectoryError, RunError
from sparring.progress import (
    Progress,
    as_lines,
    format_bytes,
    format_seconds,
    most_telling,
    printable,
    sparkline,
)
from sparring.runlog import RunLog
from sparring.types import Group, Prompt, Rollout


def filled(directory: Path) -> Path:
    with RunLog.create(directory) as log:
        log.recipe("[model]\n")
        log.environment({"versions": {}})
        for step in (1, 2, 3):
            log.step(step, {"reward": step / 10, "loss": math.nan})
            log.rollouts(step, [{"completion": f"\u4f60\u597d {step}", "reward": None}])
            log.event(step, "note", f"step {step}")
        log.evaluation(0, {"accuracy": 0.5})
        log.evaluation(3, {"accuracy": 0.75})
        log.rollouts(0, [{"completion": "x"}], kind="eval")
        log.summary({"before": {"accuracy": 0.5}})
    return directory


def test_what_is_written_is_read_back(tmp_path):
    run = filled(tmp_path / "a" / "run")
    assert [record.step for record in runlog.read_steps(run)] == [1, 2, 3]
    assert runlog.read_steps(run)[1].metrics == {"reward": 0.2, "loss": None}
    assert [record.values["accuracy"] for record in runlog.read_evaluations(run)] == [0.5, 0.75]
    assert runlog.read_rollouts(run, 2) == [{"completion": "\u4f60\u597d 2", "reward": None}]
    assert runlog.read_rollouts(run, 9) == []
    assert runlog.rollout_steps(run) == [1, 2, 3]
    assert runlog.rollout_steps(run, kind="eval") == [0]
    assert runlog.read_events(run)[-1].message == "step 3"
    assert runlog.read_summary(run) == {"before": {"accuracy": 0.5}}
    assert runlog.find_runs(tmp_path) == [run]
    assert (run / "rollouts" / "step_000001.jsonl").is_file()
    assert not [path for path in run.rglob("*") if path.name.endswith(".partial")]


def test_a_line_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    with RunLog.create(tmp_path) as log:
        log.step(1, {"reward": 1.0})
        assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "reward": 1.0}\n'


def test_a_directory_that_holds_a_run_is_refused_and_left_alone(tmp_path):
    run = filled(tmp_path / "run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(RunDirectoryError, match=r"--resume.*--run\.dir"):
        RunLog.create(run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("sign", ["recipe.toml", "metrics.jsonl", "checkpoints", "final"])
def test_any_sign_of_a_run_counts(tmp_path, sign):
    (tmp_path / sign).mkdir()
    assert runlog.holds_run(tmp_path)


def test_other_files_do_not_make_a_run(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    RunLog.create(tmp_path).close()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(RunDirectoryError, match=r"--run\.dir"):
        RunLog.create(tmp_path / "run")


def test_resume_cuts_records_after_the_checkpoint(tmp_path):
    run = filled(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')
    with RunLog.reopen(run, step=2) as log:
        assert runlog.read_summary(run) is None
        log.step(3, {"reward": 9.0})
    assert [record.metrics["reward"] for record in runlog.read_steps(run)] == [0.1, 0.2, 9.0]
    assert [record.step for record in runlog.read_evaluations(run)] == [0]
    assert runlog.rollout_steps(run) == [1, 2]
    assert runlog.rollout_steps(run, kind="eval") == [0]
    assert (run / "recipe.toml").is_file()


def test_a_growing_last_line_is_not_read(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2')
    assert [record.step for record in runlog.read_steps(tmp_path)] == [1]


def test_a_broken_line_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": \n')
    with pytest.raises(RunDirectoryError, match=r"metrics\.jsonl:2"):
        runlog.read_steps(tmp_path)


def test_two_processes_do_not_write_one_run(tmp_path):
    code = (
        "import sys; from sparring.runlog import RunLog\n"
        "log = RunLog.create(sys.argv[1]); print('open', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[1],
    )
    assert other.stdout is not None
    with other:
        assert other.stdout.readline() == "open\n"
        with pytest.raises(RunDirectoryError, match="another process"):
            RunLog.create(tmp_path)
        other.communicate("")
    RunLog.create(tmp_path).close()


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_keeps_what_was_written(tmp_path, monkeypatch):
    with RunLog.create(tmp_path) as log:
        log.step(1, {"reward": 0.5})
        log.summary({"seconds": 1})
        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(RunError, match=r"No space left on device.*--resume"):
            log.summary({"seconds": 2})
    assert runlog.read_summary(tmp_path) == {"seconds": 1}
    assert len(runlog.read_steps(tmp_path)) == 1
    assert not list(tmp_path.glob(".*.partial"))


def test_a_full_device_is_a_failed_run(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    (tmp_path / "events.jsonl").symlink_to("/dev/full")
    with RunLog.create(tmp_path) as log:
        log.step(1, {"reward": 1.0})
        with pytest.raises(RunError, match=r"events\.jsonl.*No space left on device"):
            log.event(1, "note", "does not fit")


def test_half_characters_do_not_stop_a_run(tmp_path):
    with RunLog.create(tmp_path) as log:
        log.rollouts(1, [{"completion": "a\ud83d b"}])
    assert runlog.read_rollouts(tmp_path, 1) == [{"completion": "a\ud83d b"}]
    assert json.loads((tmp_path / "rollouts" / "step_000001.jsonl").read_text(encoding="utf-8"))


def test_environment_says_nothing_of_user_host_or_variables(monkeypatch):
    import getpass
    import socket

    monkeypatch.setenv("SPARRING_SECRET", "tell-nobody")
    found = describe_environment()
    text = json.dumps(found)
    assert found.keys() == {"versions", "hardware", "commit"}
    assert found["versions"]["torch"] == torch.__version__
    assert found["hardware"]["cores"] >= 1
    assert "tell-nobody" not in text
    assert f'"{socket.gethostname()}"' not in text
    assert f'"{getpass.getuser()}"' not in text


def group(rewards: list[float], text: str = "completion") -> Group:
    prompt = Prompt(id=0, token_ids=(1,), text="How many?")
    rollouts = tuple(
        Rollout(
            prompt=prompt,
            sample_index=index,
            token_ids=torch.zeros(2, dtype=torch.int64),
            logprobs=torch.zeros(2),
            loss_mask=torch.ones(2, dtype=torch.bool),
            text=f"{text} {index}",
            finish_reason="stop",
            policy_version=0,
        )
        for index in range(len(rewards))
    )
    total = torch.tensor(rewards)
    return Group(
        prompt=prompt, rollouts=rollouts, rewards_G=total, reward_parts={"math": total, "x": total}
    )


METRICS = {
    "reward": 0.5,
    "completion_tokens": 34.0,
    "truncated": 0.25,
    "groups": 4.0,
    "groups_without_signal": 3.0,
    "tokens_per_second/rollout": 1234.0,
    "tokens_per_second/train": 5678.0,
    "memory_bytes": 2.0**30,
}


def shown(*, is_live: bool) -> str:
    stream = io.StringIO()
    with Progress(title="a run", num_steps=9, stream=stream, is_live=is_live) as progress:
        progress.warn("look here")
        progress.phase("rollout")
        progress.rollout(3, 8, 40)
        progress.step(
            1, METRICS, [group([0.0, 0.0]), group([1.0, 0.0, math.nan], "[b]text\x1b[2J")]
        )
        progress.step(2, METRICS)
    return stream.getvalue()


@pytest.mark.parametrize("is_live", [True, False])
def test_progress_shows_what_the_step_was(is_live):
    text = shown(is_live=is_live)
    wanted = ["a run", "look here", "reward 0.500", "length 34", "truncated 25%", "no signal 3/4"]
    wanted += ["rollout 1,234 tokens/s", "train 5,678 tokens/s", "1.0 GiB", "2/9", "left"]
    wanted += ["How many?", "[b]text", "reward 1 (math 1 x 1)", "not judged"]
    flat = " ".join(text.split())
    assert [word for word in wanted if word not in flat] == []
    assert "\x1b[2J" not in text


def test_plain_progress_is_lines_without_terminal_codes():
    text = shown(is_live=False)
    assert "\x1b" not in text
    assert len([line for line in text.splitlines() if line.startswith("step ")]) == 2


def test_the_group_that_differs_most_is_shown():
    dull, telling = group([1.0, 1.0]), group([0.0, 1.0])
    assert most_telling([dull, telling]) is telling
    assert most_telling([group([math.nan, math.nan]), dull]) is dull
    best_first = as_lines(group([0.25, 1.0, 0.5, math.nan])).splitlines()[1:]
    assert [line.split("(")[0].strip() for line in best_first] == [
        "reward 1",
        "reward 0.25",
        "not judged",
    ]


def test_numbers_for_people():
    assert [format_seconds(s) for s in (0.4, 59.4, 185, 7800)] == ["0s", "59s", "3m05s", "2h10m"]
    assert [format_bytes(b) for b in (7, 2048, 3 * 2**20)] == ["7 B", "2 KiB", "3 MiB"]
    assert format_bytes(1.5 * 2**30) == "1.5 GiB"
    assert sparkline([0.0, 1.0, math.nan, 0.5]) == "▁█▅"
    assert sparkline([]) == ""
    assert printable("a\x1b[1m\tb\n\u4f60") == "a·[1m·b\n\u4f60"
