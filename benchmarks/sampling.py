"""Drawing tokens on a GPU: right first (the float64 reference), then time, as JSON.

    python benchmarks/sampling.py OUTPUT.json [--vary]

`draw_tokens` at 1 to 256 rows of the vocabularies of Qwen2.5, plain and with top-k, top-p and
min-p, against softmax, multinomial and log-softmax in torch; `advance` and `place`. Each time is of
one call inside a CUDA graph of many, whose inputs rotate among more bytes than the L2 cache holds;
logits are normal with standard deviation 1 (flat: the slow case of the race) and 3 (nearer to a
model's). Shares are of a copy measured in the same run. The head's product is timed beside it.
--vary: other launch sizes of drawing instead.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
import triton

from sparring.kernels import decode_state, sampling
from sparring.kernels.cut import CutRules
from sparring.kernels.head import head_logits
from sparring.kernels.sampling import DrawRules

CUDA = torch.device("cuda")
ROTATED_BYTES = 200 << 20
ROWS = (1, 8, 32, 128, 256)
VARIANTS = [
    (2772, 96, 0), (2772, 96, 1), (2772, 96, 2), (5544, 96, 1), (3168, 80, 1), (3168, 80, 2),
    (3696, 72, 1), (2376, 112, 2), (2112, 128, 2),
]  # fmt: skip


def rules(num_rows: int, temperature: float = 1.0, **cut: float) -> DrawRules:
    full = torch.full
    cuts = CutRules(
        top_k_R=full((num_rows,), int(cut.get("top_k", 0)), device=CUDA),
        top_p_R=full((num_rows,), cut.get("top_p", 1.0), dtype=torch.float64, device=CUDA),
        min_p_R=full((num_rows,), cut.get("min_p", 0.0), dtype=torch.float32, device=CUDA),
    )
    return DrawRules(
        inverse_temperatures_R=full((num_rows,), 1.0 / temperature, device=CUDA),
        seed_words_2=torch.tensor([12345, 678], device=CUDA),
        held_ids_H=torch.tensor([7, 11], device=CUDA),
        min_draws_R=torch.zeros(num_rows, dtype=torch.int64, device=CUDA),
        cut=cuts if cut else None,
    )


def keys(num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(1 << 32, (num_rows, 2), device=CUDA)
    return ids, torch.randint(4096, (num_rows,), device=CUDA)


def in_graph(calls: list[Callable[[], object]], replays: int = 20) -> float:
    """Median microseconds of one call, the calls captured one after another."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(replays):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / len(calls))
    return statistics.median(times)


def copy_speed() -> float:
    """GB/s read and written by a copy of 4 GiB."""
    source = torch.randn(1 << 30, device=CUDA)
    target = torch.empty_like(source)
    times = []
    for _ in range(12):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(4):
            target.copy_(source)
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 4)
    return 2 * source.nbytes / statistics.median(times[2:]) / 1e6


def torch_draw(logits_RV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logprobs_RV = torch.log_softmax(logits_RV, dim=-1)
    tokens_R1 = torch.multinomial(logprobs_RV.exp(), 1)
    return tokens_R1, logprobs_RV.gather(1, tokens_R1)


def check() -> dict[str, float]:
    """Agreement with the reference: tokens that differ, largest error of a log-probability."""
    out = {}
    for vocabulary, scale, temperature in ((152064, 3.0, 1.0), (151936, 1.0, 0.7)):
        logits = torch.randn(256, vocabulary, device=CUDA) * scale
        ids, draws = keys(256)
        r = rules(256, temperature)
        tokens, logprobs = sampling.draw_tokens_triton(logits, ids, draws, r)
        expected, expected_logprobs = sampling.draw_tokens_reference(logits, ids, draws, r)
        same = tokens == expected
        out[f"{vocabulary}: tokens that differ, of 256"] = int((~same).sum())
        error = (logprobs - expected_logprobs)[same].abs().max()
        out[f"{vocabulary}: log-probability, largest difference"] = float(error)
    return out


def drawn(
    copy: float,
    vocabulary: int,
    num_rows: int,
    scale: float,
    *,
    peers: bool = True,
    **cuts: float,
) -> dict[str, object]:
    count = max(2, ROTATED_BYTES // (4 * num_rows * vocabulary))
    logits = torch.randn(count, num_rows, vocabulary, device=CUDA) * scale
    ids, positions = keys(num_rows)
    r = rules(num_rows, **cuts)
    us = in_graph([lambda x=x: sampling.draw_tokens_triton(x, ids, positions, r) for x in logits])
    return {
        "V": vocabulary,
        "rows": num_rows,
        "scale": scale,
        **cuts,
        "us": us,
        "share of copy": 4 * num_rows * vocabulary / us / 1e3 / copy,
        "torch us": None
        if cuts or not peers
        else in_graph([lambda x=x: torch_draw(x) for x in logits]),
    }


def head(num_rows: int, width: int, vocabulary: int) -> dict[str, object]:
    """The product that makes the logits: by the library, and in the order of bitwise mode."""
    weight = torch.randn(vocabulary, width, device=CUDA).bfloat16()
    # the weight alone exceeds the L2 cache
    inputs = [torch.randn(num_rows, width, device=CUDA).bfloat16() for _ in range(4)]
    row: dict[str, object] = {"D": width, "V": vocabulary, "rows": num_rows}
    for name, is_fixed in (("us", False), ("us, fixed order", True)):
        row[name] = in_graph(
            [lambda x=x, f=is_fixed: head_logits(x, weight, is_fixed=f) for x in inputs]
        )
    return row


def varied(copy: float) -> list[dict[str, object]]:
    """Programs, registers a thread and asking ahead: none changes a number."""
    rows = []
    logits = torch.randn(32, 151936, device=CUDA)
    ids, draws = keys(32)
    expected = sampling.draw_tokens_triton(logits, ids, draws, rules(32))
    for busy, registers, ahead in VARIANTS:
        sampling.BUSY_PROGRAMS, sampling.MAX_REGISTERS, sampling.AHEAD = busy, registers, ahead
        got = sampling.draw_tokens_triton(logits, ids, draws, rules(32))
        same = all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        for num_rows in ROWS:
            row = drawn(copy, 151936, num_rows, 3.0, peers=False)
            rows.append({"sizes": (busy, registers, ahead), "bits equal": same, **row})
            print(rows[-1], flush=True)
    return rows


def small(num_rows: int) -> dict[str, object]:
    state = decode_state.DecodeState(
        **{
            name: torch.zeros(num_rows, dtype=torch.int64, device=CUDA)
            for name in ("tokens_R", "positions_R", "draws_R")
        },
        limits_R=torch.full((num_rows,), 1 << 40, device=CUDA),
        is_done_R=torch.zeros(num_rows, dtype=torch.bool, device=CUDA),
        step_1=torch.zeros(1, dtype=torch.int64, device=CUDA),
        stop_ids_E=torch.tensor([-1, -1], device=CUDA),
        out_tokens_KR=torch.zeros(4096, num_rows, dtype=torch.int64, device=CUDA),
        out_logprobs_KR=torch.zeros(4096, num_rows, device=CUDA),
    )
    drawn, logprobs = torch.ones_like(state.tokens_R), torch.zeros(num_rows, device=CUDA)
    tables = torch.randint(1, 1000, (num_rows, 4096 // 16), dtype=torch.int32, device=CUDA)
    slots = torch.zeros_like(drawn)
    lengths = torch.zeros(num_rows, dtype=torch.int32, device=CUDA)
    advance = in_graph([lambda: decode_state.advance_triton(state, drawn, logprobs)] * 50)
    state.positions_R.remainder_(4096)
    place = in_graph(
        [
            lambda: decode_state.place_triton(
                state.positions_R, state.is_done_R, tables, slots, lengths, block_size=16
            )
        ]
        * 50
    )
    return {"rows": num_rows, "advance us": advance, "place us": place}


def main() -> None:
    torch.manual_seed(0)
    result: dict[str, object] = {
        "date": time.strftime("%Y-%m-%d"), "device": torch.cuda.get_device_name(),
        "torch": torch.__version__, "triton": triton.__version__,
    }  # fmt: skip
    result["correctness"] = check()
    print(json.dumps(result["correctness"], indent=0))
    copy = copy_speed()
    result["copy GB/s"] = copy
    print("copy GB/s", copy)
    if "--vary" in sys.argv:
        result["draw, varied"] = varied(copy)
        with open(sys.argv[1], "w") as file:
            json.dump(result, file, indent=1)
        return
    result["head"] = [head(r, d, v) for d, v in ((1536, 151936), (3584, 152064)) for r in ROWS]
    print(*result["head"], sep="\n")
    result["around a step"] = [small(num_rows) for num_rows in ROWS]
    print(*result["around a step"], sep="\n")
    result["draw"] = []
    for vocabulary in (151936, 152064):
        for num_rows in ROWS:
            for scale in (1.0, 3.0):
                result["draw"].append(drawn(copy, vocabulary, num_rows, scale))
                print(result["draw"][-1], flush=True)
    result["cut"] = []
    for num_rows in ROWS:
        for cuts in ({"top_p": 1.0}, {"top_p": 0.95}, {"top_k": 50}, {"min_p": 0.05}):
            result["cut"].append(drawn(copy, 151936, num_rows, 3.0, **cuts))
            print(result["cut"][-1], flush=True)
    with open(sys.argv[1], "w") as file:
        json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
