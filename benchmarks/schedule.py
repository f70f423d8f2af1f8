"""What the scheduler makes of ragged lengths, in steps: no model, no clock, no GPU.

    python -m benchmarks.schedule OUTPUT.json

The work is that of the ragged row of benchmarks/rollouts.py: 32 prompts of 64 to 1,024 tokens, 8
completions each of log-normal length (median 400) cut at 4,096, at most 128 at once, blocks of 64
tokens, bursts of 16 steps. Four draws of lengths. First without a limit on memory, then with a
quarter of the blocks that this took at most, for several shares of the mean completion that are
left free for each sequence in memory when another is admitted (the scheduler's own is 0.25), and
for several first guesses of that mean.

steps: of decoding. rows: tokens a step, the mean and that while others wait. recomputed: tokens
computed again after a preemption, as a share of the completions' tokens. fewest steps: of those
blocks, were they never idle and nothing computed twice: the blocks each sequence holds, summed over
its steps, divided by the blocks there are.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sparring.rollout import scheduler as rules
from sparring.rollout.block_pool import BlockPool, blocks_for
from sparring.rollout.scheduler import Scheduler, SequenceState

BLOCK, BURST, MOST = 64, 16, 128
SEEDS = (2, 12, 22, 32)
SHARES = (0.0, 0.1, 0.15, 0.25, 0.5)
GUESSES = (20.0, 128.0, 558.0)


@dataclass(kw_only=True)
class Work:
    """Prompt lengths [P] and completion lengths [P][G]."""

    prompts: list[int]
    lengths: list[list[int]]
    flat: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.flat = [length for line in self.lengths for length in line]

    def block_steps(self) -> int:
        """Blocks times steps that the work takes: each sequence its own, a prompt's until its
        longest completion ends.
        """
        total = 0
        for prompt, line in zip(self.prompts, self.lengths, strict=True):
            shared = prompt // BLOCK
            own = (blocks_for(prompt + t, BLOCK) - shared for n in line for t in range(n))
            total += sum(own) + shared * max(line)
        return total


def drawn(seed: int) -> Work:
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(64, 1025, (32,), generator=generator).tolist()
    normal = torch.randn(32, 8, generator=generator)
    lengths = (400 * normal.mul(0.8).exp()).clamp(1, 4096).long().tolist()
    return Work(prompts=prompts, lengths=lengths)


def simulate(work: Work, num_blocks: int, guess: float) -> dict[str, Any]:
    """Runs the scheduler as the engine does where it looks before each burst."""
    pool = BlockPool(1 + num_blocks, BLOCK)
    scheduler = Scheduler(
        pool, max_running=MOST, max_prefill_tokens=8192, expected_completion_tokens=guess
    )
    for prompt, line in zip(work.prompts, work.lengths, strict=True):
        scheduler.add(prompt_length=prompt, max_completion_tokens=line)

    def draw(sequence: SequenceState, most: int) -> int:
        left = work.flat[sequence.index] - sequence.num_completion_tokens
        sequence.num_completion_tokens += min(most, left)
        if most >= left:
            scheduler.finish(sequence)
        return min(most, left)

    steps = tokens = crowded_steps = crowded_tokens = 0
    while scheduler.has_work:
        while chunks := scheduler.next_prefill():
            scheduler.complete_prefill(chunks)
            for chunk in chunks:
                for sequence in chunk.drawing:
                    draw(sequence, 1)
        running = scheduler.next_decode(BURST)
        if not running:
            continue
        waits = scheduler.has_waiting
        left = max(work.flat[s.index] - s.num_completion_tokens for s in running)
        size, got = min(BURST, left), 0
        for sequence in running:
            sequence.num_cached += size
            got += draw(sequence, size)
        steps, tokens = steps + size, tokens + got
        if waits:
            crowded_steps, crowded_tokens = crowded_steps + size, crowded_tokens + got
    return {
        "steps": steps,
        "rows": tokens / steps,
        "crowded steps": crowded_steps,
        "crowded rows": crowded_tokens / max(1, crowded_steps),
        "preemptions": scheduler.num_preemptions,
        "recomputed": scheduler.num_recomputed_tokens / sum(work.flat),
        "peak blocks": pool.peak_used,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    found: list[dict[str, Any]] = []
    own_share = rules._RESERVE_SHARE
    for seed in SEEDS:
        work = drawn(seed)
        mean = sum(work.flat) / len(work.flat)
        free = simulate(work, 10**6, mean)
        quarter = max(free["peak blocks"] // 4, blocks_for(1024 + max(work.flat), BLOCK))
        fewest = work.block_steps() / quarter
        line: dict[str, Any] = {"seed": seed, "no limit": free, "blocks": quarter}
        line |= {"fewest steps": fewest, "by share": {}, "by guess": {}}
        for share in SHARES:
            rules._RESERVE_SHARE = share
            line["by share"][share] = simulate(work, quarter, mean)
        rules._RESERVE_SHARE = own_share
        for guess in GUESSES:
            line["by guess"][guess] = simulate(work, quarter, guess)
        found.append(line)
        print(
            f"seed {seed}: {free['steps']} steps, {free['crowded rows']:.1f} rows of {MOST} over "
            f"{free['crowded steps']} while others wait, {free['rows']:.1f} in all"
        )
        print(f"  a quarter, {quarter} blocks: at least {fewest:.0f} steps")
        for name in ("by share", "by guess"):
            for value, row in line[name].items():
                print(
                    f"    {name} {value}: {row['steps']} steps, {row['crowded rows']:.1f} rows "
                    f"while others wait, {row['preemptions']} preempted, {row['recomputed']:.1%} "
                    "computed again"
                )
    output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
