"""Loading a model: device peak, growth of host memory and seconds, at real sizes.

    python benchmarks/load.py --shape qwen2.5-7b --folder /tmp/load --output load.json

A checkpoint with random bfloat16 weights is written first (another process does it, so that its
memory is not counted), and read back while its pages are still cached: quantised on load, as it is,
and from NF4 files that were written back. Host growth is anonymous memory (pages of the mapped
files apart), sampled every 5 ms. Device peak is what the allocator reserved at most; "over" is that
minus what the loaded model holds. Without a GPU the same runs on the CPU, without the device's
columns.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.shapes import SHAPES
from sparring.environment import describe_environment
from sparring.models.checkpoint import build_model, load_model, save_model, weight_views
from sparring.models.files import INDEX

GIB = 2**30
SHARD_BYTES = 2_000_000_000


def write_random(name: str, folder: Path, device: torch.device) -> int:
    """A checkpoint of that shape in bfloat16 shards; its bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**SHAPES[name], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    shape = build_model(config, device="meta", dtype=torch.bfloat16)
    generator = torch.Generator(device).manual_seed(0)
    shards: list[dict[str, torch.Tensor]] = [{}]
    weight_map, total, size = {}, 0, 0
    for key, view in weight_views(shape):
        tensor = torch.empty(view.shape, dtype=torch.bfloat16, device=device)
        tensor.normal_(0.0, 0.02, generator=generator)
        num_bytes = 2 * tensor.numel()
        if size + num_bytes > SHARD_BYTES and shards[-1]:
            save_file(shards[-1], folder / f"part-{len(shards)}.safetensors")
            shards[-1].clear()
            shards.append({})
            size = 0
        shards[-1][key] = tensor.cpu()
        weight_map[key] = f"part-{len(shards)}.safetensors"
        size, total = size + num_bytes, total + num_bytes
    save_file(shards[-1], folder / f"part-{len(shards)}.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return total


def resident() -> tuple[int, int]:
    """Bytes of anonymous and of file-backed memory that this process holds now."""
    fields = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if line
    )
    return tuple(int(fields[key].split()[0]) * 1024 for key in ("RssAnon", "RssFile"))  # type: ignore[return-value]


class HostPeak(threading.Thread):
    """The highest anonymous memory while it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.highest = 0
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.005):
            self.highest = max(self.highest, resident()[0])


def measure(folder: Path, quantization: str, device: torch.device) -> tuple[Any, dict[str, float]]:
    is_card = device.type == "cuda"
    gc.collect()
    if is_card:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before, held = resident()[0], torch.cuda.memory_allocated() if is_card else 0
    peak = HostPeak()
    peak.start()
    start = time.perf_counter()
    model = load_model(folder, dtype="bfloat16", device=device, quantization=quantization)
    if is_card:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak.ended.set()
    peak.join()
    after, mapped = resident()
    row = {
        "seconds": round(seconds, 2),
        "host_growth_gib": round((max(peak.highest, after) - before) / GIB, 3),
        "mapped_gib": round(mapped / GIB, 3),
    }
    if is_card:
        final = torch.cuda.memory_allocated() - held
        reserved = torch.cuda.max_memory_reserved() - held
        row |= {
            "model_gib": round(final / GIB, 3),
            "peak_reserved_gib": round(reserved / GIB, 3),
            "peak_allocated_gib": round((torch.cuda.max_memory_allocated() - held) / GIB, 3),
            "peak_over_model_gib": round((reserved - final) / GIB, 3),
        }
    return model, row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="qwen2.5-7b", choices=sorted(SHAPES))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--write", action="store_true", help="only write the checkpoint")
    asked = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if asked.write:
        print(write_random(asked.shape, asked.folder, device))
        return
    start = time.perf_counter()
    command = [sys.executable, __file__, "--shape", asked.shape, "--folder", str(asked.folder)]
    written = int(subprocess.run([*command, "--write"], check=True, capture_output=True).stdout)
    result: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "shape": asked.shape,
        "checkpoint_gib": round(written / GIB, 3),
        "seconds_to_write": round(time.perf_counter() - start, 2),
        "free_disk_gib": round(shutil.disk_usage(asked.folder).free / GIB, 1),
        "rows": {},
        "environment": describe_environment(),
    }
    torch.zeros(1, device=device)
    model, result["rows"]["bfloat16, quantised to NF4 on load"] = measure(
        asked.folder, "nf4", device
    )
    start = time.perf_counter()
    save_model(model, asked.folder / "nf4")
    result["seconds_to_write_nf4"] = round(time.perf_counter() - start, 2)
    decoded = model.get_submodule("layers.0.qkv").base.dense()
    model = None
    again, result["rows"]["NF4 files"] = measure(asked.folder / "nf4", "none", device)
    assert torch.equal(again.get_submodule("layers.0.qkv").base.dense(), decoded)
    again = None
    model, result["rows"]["bfloat16"] = measure(asked.folder, "none", device)
    for name, row in result["rows"].items():
        print(name, row, flush=True)
    if asked.output:
        asked.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
