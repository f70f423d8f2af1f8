"""Instructions that a weight costs in the compiled NF4 products: what bounds them beside bytes.

    python -m benchmarks.nf4_instructions OUTPUT.json          no GPU needed

Each shipped tile of kernels/nf4_hopper.py is compiled for sm_90 and disassembled. Counted is the
loop that holds the matrix instructions: one of them (m64, k16) takes 64 x 16 weights, so the loop's
instructions of all threads over these weights are instructions a weight. Integer ones go to the
integer lanes, 64 a clock and multiprocessor; all of them need an issue slot, 128 lanes a clock.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from sparring.environment import describe_environment
from sparring.kernels import nf4_hopper

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INTEGER = ("PRMT", "LOP3", "SHF", "IADD3", "VIADD", "LEA", "ISETP", "SEL", "VIMNMX", "IABS", "BFI")
WEIGHTS_A_PRODUCT = 64 * 16
THREADS = 128
"""That a matrix instruction belongs to: a warp group has its own rows of the weight."""
TURNS = 7
"""Of a segment of a 7B's gate and up; it does not change the loop."""


def assembly(tile: nf4_hopper.Tile) -> list[str]:
    """Machine code of the product with double quantisation, several segments and a bias."""
    from triton.experimental.gluon._runtime import GluonASTSource

    constants = {
        **nf4_hopper.constants_of(tile, TURNS), "DOUBLE": True, "SPLIT": True, "HAS_BIAS": True,
        "OVERLAPS": True, "NUM_PARTS": 0, "RANK": 1, "BLOCK_R": 16, "BESIDE_SHRINK": False,
    }  # fmt: skip
    kernel = nf4_hopper._kernel
    kinds = {
        **dict.fromkeys(("x_ptr", "bias_ptr", "xa_ptr", "b_ptr", "out_ptr"), "*bf16"),
        **dict.fromkeys(("words_ptr", "count_ptr", "parts_ptr"), "*i32"),
        **dict.fromkeys(("absmax2_ptr", "offset_ptr", "map_ptr", "work_ptr"), "*fp32"),
        "absmax_ptr": "*u8",
        "scale": "fp32",
    }
    signature = {
        name: "constexpr" if name in constants else kinds.get(name, "i32")
        for name in kernel.arg_names
    }
    missing = [n for n in kernel.arg_names if n.endswith("_ptr") and n not in kinds]
    assert not missing, f"what do {missing} point to?"
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name.endswith("_ptr") or name.startswith("stride")
    }
    source = GluonASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": tile.num_warps, "enable_fp_fusion": False}
    if tile.max_registers:
        options["maxnreg"] = tile.max_registers
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        command = [str(TOOLS / "nvdisasm"), "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split(
            "\n"
        )


def loop_of(lines: list[str]) -> list[str]:
    """Opcodes of the innermost loop with the most matrix instructions."""
    places = {}
    opcodes: list[tuple[str, str]] = []
    loops = []
    for line in lines:
        if label := re.match(r"\s*(\.L_\w+):", line):
            places[label[1]] = len(opcodes)
        elif found := re.search(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line):
            opcodes.append((found[1], found[2]))
            target = re.search(r"\(?`?\(?(\.L_\w+)", found[2])
            if found[1].startswith("BRA") and target and target[1] in places:
                loops.append((places[target[1]], len(opcodes)))
    bodies = [[name for name, _ in opcodes[start:stop]] for start, stop in loops]
    with_products = [body for body in bodies if products(body)]
    assert with_products, "no loop with matrix instructions"
    return max(with_products, key=lambda body: (products(body), -len(body)))


def products(body: list[str]) -> int:
    return sum(name.startswith("HGMMA") for name in body)


def counted(tile: nf4_hopper.Tile) -> dict[str, float]:
    body = loop_of(assembly(tile))
    weights = products(body) * WEIGHTS_A_PRODUCT
    integer = sum(name.split(".")[0] in INTEGER for name in body)
    return {
        "rows": tile.block_t,
        "instructions of the loop": len(body),
        "matrix instructions": products(body),
        "integer a weight": integer * THREADS / weights,
        "all a weight": len(body) * THREADS / weights,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    result: dict[str, Any] = {"environment": describe_environment(), "tiles": []}
    for tile in nf4_hopper.TILES:
        result["tiles"].append(counted(tile))
        print(result["tiles"][-1], flush=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
