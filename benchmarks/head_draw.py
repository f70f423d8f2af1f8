"""Output head and draw in one launch against the library's head and a draw from its logits.

    python -m benchmarks.head_draw OUTPUT.json [--widths 896 1536 3584] [--rows 128 256]

Random states and tables of a vocabulary of 151,936; temperature 1, one end token. Captured graphs,
microseconds of head and draw together and, for the library, of each. A table is larger than the L2
cache. Before anything is timed, tokens and log-probabilities are held against those drawn from the
library's logits: a token differs only where two scores are as close as the rounding of sums.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.decode_step import captured, microseconds
from benchmarks.rollouts import environment
from sparring.kernels.head import head_logits
from sparring.kernels.head_draw import HeadForm, head_draw_triton
from sparring.kernels.sampling import draw_tokens
from sparring.kernels.split_product import SplitForm, split_product
from sparring.rollout.sampler import Sampling, draw_rules

VOCABULARY = 151_936
FORMS = (
    HeadForm(128, 128, 8, 3, 128), HeadForm(128, 128, 8, 6), HeadForm(128, 128, 8, 3, 128, 8),
    HeadForm(64, 128, 4, 3, 168), HeadForm(64, 128, 8, 4, 80),
)  # fmt: skip
PLAIN = (
    SplitForm(128, 128, 1, 8, 3), SplitForm(128, 128, 1, 8, 6), SplitForm(128, 256, 1, 8, 4),
    SplitForm(64, 128, 1, 4, 3),
)  # fmt: skip
"""Forms of the product alone, its logits written in float32."""


class Case:
    """States, a table and what a draw needs."""

    def __init__(self, width: int, rows: int) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(rows, width, device="cuda").bfloat16()
        self.weight = (torch.randn(VOCABULARY, width, device="cuda") / width**0.5 * 2).bfloat16()
        self.ids = torch.randint(0, 1 << 32, (rows, 2), device="cuda")
        self.draws = torch.arange(rows, device="cuda")
        ends = torch.tensor([VOCABULARY - 1], device="cuda")
        self.rules = draw_rules(Sampling(max_completion_tokens=9), rows, ends, self.x.device)

    def library(self) -> tuple[torch.Tensor, torch.Tensor]:
        return draw_tokens(head_logits(self.x, self.weight), self.ids, self.draws, self.rules)

    def joined(self, form: HeadForm) -> tuple[torch.Tensor, torch.Tensor]:
        given = self.x, self.weight, self.ids, self.draws, self.rules
        return head_draw_triton(*given, form)

    def gaps(self, form: HeadForm) -> dict[str, float]:
        """Tokens that differ, and the largest difference of log-probabilities of the others."""
        (tokens, logprobs), (want_tokens, want) = self.joined(form), self.library()
        same = tokens == want_tokens
        return {
            "tokens that differ": int((~same).sum()),
            "of": len(same),
            "log-probability, largest difference": (logprobs - want)[same].abs().max().item(),
        }


def timed(call: Callable[[], Any]) -> float:
    with torch.no_grad():
        return microseconds(captured(call)[0], 20)


def measure(width: int, rows: int) -> dict[str, Any]:
    case = Case(width, rows)
    logits = head_logits(case.x, case.weight)
    out: dict[str, Any] = {
        "library us": timed(case.library),
        "head us": timed(lambda: head_logits(case.x, case.weight)),
        "draw us": timed(lambda: draw_tokens(logits, case.ids, case.draws, case.rules)),
    }
    print(f"width {width}, {rows} rows: {out}", flush=True)
    for form in FORMS:
        gaps = case.gaps(form)
        assert gaps["tokens that differ"] <= max(1, rows // 100), gaps
        assert gaps["log-probability, largest difference"] < 1e-3, gaps
        out[str(form)] = gaps | {"us": timed(lambda form=form: case.joined(form))}
        print(f"   {out[str(form)]}, {form}", flush=True)
    for plain in PLAIN:
        each = timed(lambda plain=plain: split_product(case.x, case.weight, plain))
        out[f"product alone, {plain}"] = each
        print(f"   product alone {each:.1f} us, {plain}", flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--widths", nargs="*", type=int, default=[896, 1536, 3584])
    parser.add_argument("--rows", nargs="*", type=int, default=[256, 128])
    parser.add_argument("--compile", nargs=2, type=int, metavar=("PART", "PARTS"))
    parser.add_argument("--processes", type=int, default=5, help="that compile; 0: it was done")
    arguments = parser.parse_args()
    if arguments.compile:
        part, parts = arguments.compile
        case = Case(128, 128)
        for form in FORMS[part::parts]:
            case.joined(form)
        torch.cuda.synchronize()
        return
    command = [sys.executable, "-m", "benchmarks.head_draw", "-", "--compile"]
    parts = arguments.processes
    compilers = [subprocess.Popen([*command, str(i), str(parts)]) for i in range(parts)]
    assert not any(process.wait() for process in compilers), "a form does not compile"
    result: dict[str, Any] = {"environment": environment(), "vocabulary": VOCABULARY}
    for width in arguments.widths:
        for rows in arguments.rows:
            result[f"width {width}, {rows} rows"] = measure(width, rows)
            arguments.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
