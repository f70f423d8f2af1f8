"""Checkpoints: everything that a run needs to go on, bit for bit, as safetensors and JSON.

    checkpoints/step_000100/
        state.json              step, the caller's state, numbers of the optimizer, sizes of files
        optimizer.safetensors   moments and masters by parameter name
        generators.safetensors  torch's random generators
        <part>/                 a folder for each of the caller's savers: policy, reference

A checkpoint is written beside its final name, flushed to the disk and then renamed, so one that
carries its name is whole. Nothing is unpickled. What the weights look like is the savers' business.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparring.errors import CheckpointError, RunError
from sparring.train.optimizer import Optimizer

FOLDER = "checkpoints"
STATE_FILE = "state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
GENERATORS_FILE = "generators.safetensors"
FORMAT = 1

_UNFINISHED = ".tmp-"
_NAME = re.compile(r"step_(\d{6,})")

Saver = Callable[[Path], None]
"""Writes one part of a checkpoint into the empty folder that it is given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What `load_checkpoint` read: path / "<part>" holds what the savers wrote."""

    path: Path
    step: int
    state: Mapping[str, Any]
    optimizer_tensors: Mapping[str, Tensor]
    optimizer_numbers: Mapping[str, float]
    generator_tensors: Mapping[str, Tensor]
    generator_values: Mapping[str, Any]


def save_checkpoint(
    run_dir: Path,
    *,
    step: int,
    parts: Mapping[str, Saver],
    optimizer: Optimizer,
    state: Mapping[str, Any],
    keep: int = 0,
) -> Path:
    """Write checkpoints/step_<step>, random generators included; keep the newest `keep` (0: all).

    state: the caller's own JSON values, such as data cursor, recipe hash and policy version.
    Raises RunError where it cannot be written, a full disk above all: earlier checkpoints are
    untouched then and nothing half-written is left.
    """
    folder = run_dir / FOLDER
    final = folder / f"step_{step:06d}"
    unfinished = folder / f"{_UNFINISHED}{final.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(stale)
        unfinished.mkdir()
        for name, save in parts.items():
            (unfinished / name).mkdir()
            save(unfinished / name)
        _save_tensors(optimizer.state_tensors(), unfinished / OPTIMIZER_FILE)
        generator_tensors, generator_values = _generators()
        _save_tensors(generator_tensors, unfinished / GENERATORS_FILE)
        content = {
            "format": FORMAT,
            "step": step,
            "state": dict(state),
            "optimizer": optimizer.state_numbers(),
            "generators": generator_values,
            "bytes": _sizes(unfinished),
        }
        (unfinished / STATE_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        _flush(unfinished)
        if final.exists():
            final.rename(folder / f"{_UNFINISHED}replaced-{final.name}")
        unfinished.rename(final)
        _flush_folder(folder)
    except (OSError, SafetensorError) as error:
        raise _write_error(final, error) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    _prune(folder, final, keep)
    return final


def find_latest(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run or None; unfinished and damaged ones are passed over."""
    for path in _by_step(run_dir / FOLDER):
        if _damage(path) is None:
            return path
    return None


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint and verify it; CheckpointError says what is missing or damaged."""
    if (damage := _damage(path)) is not None:
        raise CheckpointError(
            f"the checkpoint {path.absolute()} cannot be used: {damage};"
            " remove it to go on from the one before"
        )
    content = _read_state(path)
    try:
        optimizer_tensors = load_file(path / OPTIMIZER_FILE)
        generator_tensors = load_file(path / GENERATORS_FILE)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"the checkpoint {path.absolute()} cannot be read: {error};"
            " remove it to go on from the one before"
        ) from error
    return Checkpoint(
        path=path,
        step=int(content["step"]),
        state=content["state"],
        optimizer_tensors=optimizer_tensors,
        optimizer_numbers=content["optimizer"],
        generator_tensors=generator_tensors,
        generator_values=content["generators"],
    )


def restore_generators(checkpoint: Checkpoint) -> None:
    """Set Python's, numpy's and torch's generators to where they stood when it was written.

    Generators of GPUs that this machine lacks are left out.
    """
    version, numbers, gauss = checkpoint.generator_values["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = checkpoint.generator_values["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(checkpoint.generator_tensors["cpu"])
    for index in range(torch.cuda.device_count()):
        if (state := checkpoint.generator_tensors.get(f"cuda:{index}")) is not None:
            torch.cuda.set_rng_state(state, index)


def recipe_hash(values: Mapping[str, Any]) -> str:
    """SHA-256 of the values as JSON with sorted keys: equal for equal settings in any order."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _generators() -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states = torch.cuda.get_rng_state_all()
        tensors |= {f"cuda:{index}": state for index, state in enumerate(states)}
    kind, keys, *rest = np.random.get_state(legacy=True)
    values = {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
    }
    return tensors, values


def _save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


def _sizes(path: Path) -> dict[str, int]:
    """Bytes of every file under `path` but state.json, by relative name."""
    files = (file for file in path.rglob("*") if file.is_file() and file != path / STATE_FILE)
    return {file.relative_to(path).as_posix(): file.stat().st_size for file in sorted(files)}


def _flush(path: Path) -> None:
    """Have the disk hold every file and folder under `path`."""
    for entry in path.rglob("*"):
        if entry.is_file():
            with entry.open("rb") as file:
                os.fsync(file.fileno())
        else:
            _flush_folder(entry)
    _flush_folder(path)


def _flush_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_error(final: Path, error: Exception) -> RunError:
    free = shutil.disk_usage(next(p for p in final.parents if p.exists())).free
    last = find_latest(final.parent.parent)
    kept = f"the last good checkpoint is {last.name}" if last else "there is no earlier checkpoint"
    return RunError(
        f"the checkpoint {final.absolute()} could not be written: {error}. The disk has"
        f" {free / 2**20:.0f} MiB left; {kept}. Make room, or point --run.dir elsewhere, and go on"
        " with --resume"
    )


def _by_step(folder: Path) -> list[Path]:
    """Checkpoint folders, the newest first, whole or not."""
    if not folder.is_dir():
        return []
    named = [(int(found[1]), p) for p in folder.iterdir() if (found := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(named, reverse=True)]


def _read_state(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    return content


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint folder; None: all its files are there in full length."""
    try:
        content = _read_state(path)
        if content["format"] != FORMAT:
            return f"its format is {content['format']}, this version reads {FORMAT}"
        expected, found = content["bytes"], _sizes(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{STATE_FILE} is missing or unreadable ({type(error).__name__}: {error})"
    for name, size in expected.items():
        if found.get(name) != size:
            return f"{name} has {found.get(name, 'no')} bytes instead of {size}"
    return None


def _prune(folder: Path, newest: Path, keep: int) -> None:
    """Remove what `keep` leaves no room for; each is renamed first, so none is left half there."""
    for stale in folder.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(stale, ignore_errors=True)
    if keep <= 0:
        return
    others = [path for path in _by_step(folder) if path != newest]
    for path in others[keep - 1 :]:
        doomed = path.rename(folder / f"{_UNFINISHED}old-{path.name}")
        shutil.rmtree(doomed, ignore_errors=True)
