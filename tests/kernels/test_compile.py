"""Every Triton kernel compiled for the cards that users own, from the launch tables that ship.

No GPU is needed: Triton brings ptxas and cuobjdump. Checked are shared memory, spills and matrix
instructions. Each kernel is compiled for sm_90 in the ordinary tests, for all others in slow ones.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from tempfile import NamedTemporaryFile

import pytest

from sparring.kernels import (
    Capability,
    attention,
    chain,
    cut,
    decode_state,
    embedding,
    few_rows,
    few_rows_attention,
    few_rows_hopper,
    few_rows_strips,
    few_rows_tiles,
    head,
    int8,
    lora,
    lora_rows,
    lora_swiglu,
    matmul,
    nf4,
    nf4_hopper,
    nf4_hopper_wide,
    nf4_matmul,
    norm,
    rope,
    sampling,
    step_start,
    swiglu,
)
from sparring.kernels.attention_plan import tile_of

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
ARCHS = [pytest.param(a, marks=[] if a == 90 else pytest.mark.slow) for a in SHARED_LIMIT]
T4 = 75
SHARED_LIMIT[T4] = 65536
OPTIONS = {"num_warps", "num_stages", "enable_fp_fusion", "maxnreg"}


def build(kernel, pointers: dict[str, str], constants: dict[str, object], arch: int):
    """(shared memory, bytes of stack, matrix instructions, PTX) of one kernel."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

    options = {name: value for name, value in constants.items() if name in OPTIONS}
    constants = {name: value for name, value in constants.items() if name not in OPTIONS}
    for parameter in kernel.params:  # what a launch leaves out is a constant too
        if parameter.is_constexpr and parameter.has_default:
            constants.setdefault(parameter.name, parameter.default)
    signature = {}
    for name in kernel.arg_names:
        plain = "fp32" if name in ("eps", "scale", "factor", "inverse_temperature") else "i32"
        signature[name] = "constexpr" if name in constants else pointers.get(name, plain)
    attributes = {}
    for i, (name, kind) in enumerate(signature.items()):
        if kind.startswith("*") or (kind != "constexpr" and name.startswith("stride")):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source_of = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    source = source_of(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    built = triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"enable_fp_fusion": True, **options}
    )
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        use = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    stack = int(re.search(r"STACK:(\d+)", use.stdout + use.stderr).group(1))
    products = set(re.findall(r"mma\.sync|wgmma\.mma|tcgen05\.mma", built.asm["ptx"]))
    return built.metadata.shared, stack, products, built.asm["ptx"]


def check(kernel, pointers, constants, arch, *, products=False, stack_limit=16):
    shared, stack, found, ptx = build(kernel, pointers, constants, arch)
    assert shared <= SHARED_LIMIT[arch], f"{shared} bytes of shared memory"
    assert stack <= stack_limit, f"{stack} bytes of stack: registers spill"
    assert bool(found) == products, found
    return found, ptx


HALF = """x_ptr residual_ptr weight_ptr y_ptr sum_ptr dy_ptr ds_ptr dx_ptr h_ptr dh_ptr dz_ptr q_ptr
k_ptr v_ptr out_ptr dout_ptr dq_ptr dk_ptr dv_ptr"""
SINGLE = """partial_ptr cos_ptr sin_ptr z_ptr grad_ptr logprobs_ptr entropy_ptr lse_ptr delta_ptr
parts_ptr absmax2_ptr offset_ptr map_ptr"""
POINTERS = {
    **dict.fromkeys(HALF.split(), "*bf16"),
    **dict.fromkeys(SINGLE.split(), "*fp32"),
    **dict.fromkeys(("tiles_ptr", "units_ptr", "sums_ptr"), "*i32"),
    "labels_ptr": "*i64",
    **dict.fromkeys(("words_ptr", "count_ptr"), "*i32"),
    **dict.fromkeys(("bias_ptr", "xa_ptr", "b_ptr"), "*bf16"),
    "work_ptr": "*fp32",
    "absmax_ptr": "*u8",
}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    "width", [3584, *(pytest.param(w, marks=pytest.mark.slow) for w in (128, 8192))]
)
def test_norm(width, arch):
    constants = {"D": width, "HAS_RESIDUAL": True, **norm.tile_of(width)}
    for early in (False, True)[: 1 + (arch >= few_rows.PDL_ARCH)]:
        check(norm._forward_kernel, POINTERS, constants | {"EARLY": early}, arch)
    check(norm._backward_kernel, POINTERS, constants | norm.backward_tile_of(width), arch)
    limit = 16 if width < 8192 else 512
    check(norm._backward_weight_kernel, POINTERS, constants, arch, stack_limit=limit)
    check(norm._sum_parts_kernel, POINTERS, {"D": width, **norm.PART_TILE}, arch)


@pytest.mark.parametrize("arch", ARCHS)
def test_rope(arch):
    check(
        rope._rotate_kernel, POINTERS, {"HALF": 64, "BACKWARD": True, **rope.tile_of(32, 64)}, arch
    )


@pytest.mark.parametrize("arch", ARCHS)
def test_swiglu(arch):
    constants = {"F": 18944, "BLOCK_F": swiglu.BLOCK_F, "num_warps": swiglu.NUM_WARPS}
    for early in (False, True)[: 1 + (arch >= few_rows.PDL_ARCH)]:
        check(
            swiglu._forward_kernel, POINTERS, constants | {"IN_ORDER": True, "EARLY": early}, arch
        )
    for keeps_h in (True, False):
        check(swiglu._backward_kernel, POINTERS, {**constants, "KEEPS_H": keeps_h}, arch)


@pytest.mark.parametrize("arch", ARCHS)
def test_head(arch):
    constants = {"V": 152064, "BLOCK_V": head.BLOCK_V, "num_warps": head.NUM_WARPS}
    constants |= {"NEEDS_GRADIENT": True, "HAS_GRAD": True}
    check(head._rows_kernel, POINTERS, constants, arch)


@pytest.mark.parametrize("arch", ARCHS)
def test_tables(arch):
    constants = {"K": 3584, "BLOCK_K": int8.BLOCK_K, "num_warps": int8.NUM_WARPS}
    pointers = {**POINTERS, "values_ptr": "*i8", "scale_ptr": "*fp32"}
    constants["enable_fp_fusion"] = False
    check(int8._dequantize_kernel, pointers, constants, arch)
    constants = {"D": 3584, "BLOCK_D": embedding.BLOCK_D, "num_warps": embedding.NUM_WARPS}
    pointers = {**POINTERS, "table_ptr": "*bf16", "ids_ptr": "*i64"}
    check(embedding._gather_kernel, pointers, constants, arch)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", ["*bf16", "*fp16"])
def test_nf4_decodes_by_byte_permutations(dtype, arch):
    constants = {"DOUBLE": True, "FAST": True, "SKIPS": True, "enable_fp_fusion": False}
    constants |= nf4.DEQUANTIZE_TILE
    _, ptx = check(nf4._dequantize_kernel, {**POINTERS, "out_ptr": dtype}, constants, arch)
    assert "prmt.b32" in ptx
    assert "fma.rn" not in ptx


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    "size", [128, *(pytest.param(n, marks=pytest.mark.slow) for n in (64, 80, 256))]
)
@pytest.mark.parametrize("which", ["forward", "dq", "dkv"])
def test_attention(which, size, arch):
    kernel = {
        "forward": attention._forward_kernel,
        "dq": attention._dq_kernel,
        "dkv": attention._dkv_kernel,
    }[which]
    block = triton.next_power_of_2(size)
    constants = {"GROUP": 7, "E": size, "BLOCK_E": block, "HAS_WINDOW": False}
    constants |= tile_of(Capability(arch=arch, tensor_dots=True), size, which)
    # a few spilled registers were faster on the card than smaller tiles
    found, _ = check(kernel, POINTERS, constants, arch, products=True, stack_limit=256)
    if which == "forward":
        assert found == {90: {"wgmma.mma"}, 100: {"tcgen05.mma"}}.get(arch, {"mma.sync"})


def test_attention_sums_and_deltas():
    sizes = {"E": 128, "BLOCK_E": 128, "num_warps": 4}
    check(attention._delta_kernel, POINTERS, {**sizes, "BLOCK_M": 64}, 90)
    check(
        attention._sum_kernel,
        POINTERS,
        {**sizes, "BLOCK_N": 128, "num_warps": 8},
        90,
        stack_limit=64,
    )


DRAWING = {
    **dict.fromkeys(
        ("logits_ptr", "parts_ptr", "listed_ptr", "inverse_ptr", "logprobs_ptr"), "*fp32"
    ),
    **dict.fromkeys(("seed_ptr", "ids_ptr", "draws_ptr", "held_ptr", "min_draws_ptr"), "*i64"),
    "tokens_ptr": "*i64",
    **dict.fromkeys(("best_ptr", "keys_ptr", "last_ptr"), "*i32"),
    "top_k_ptr": "*i64",
    "top_p_ptr": "*fp64",
    "min_p_ptr": "*fp32",
}


@pytest.mark.parametrize("arch", ARCHS)
def test_sampling(arch):
    tiles = triton.cdiv(151936, sampling.BLOCK_V)
    constants = {"V": 151936, "TILES": tiles, "BLOCK_V": sampling.BLOCK_V, "HELD": 2}
    for is_cut in (False, True):
        tile = {"IS_CUT": is_cut, "AHEAD": 1, "num_warps": sampling.NUM_WARPS}
        check(sampling._tiles_kernel, DRAWING, constants | tile, arch)
    rows = {"V": 151936, "BLOCK_V": cut.BLOCK_V, "HELD": 2, "CAPACITY": cut.CAPACITY}
    warps = {"num_warps": cut.NUM_WARPS}
    check(cut._cut_kernel, DRAWING, rows | warps, arch, stack_limit=64)  # a few registers
    constants = {"TILES": tiles, "BLOCK_T": triton.next_power_of_2(tiles), "num_warps": 1}
    constants["HAS_TOKEN"] = False
    check(sampling._combine_kernel, DRAWING, constants, arch)


LONG = """drawn_ptr tokens_ptr positions_ptr draws_ptr limits_ptr step_ptr stop_ptr out_tokens_ptr
slots_ptr"""
STEP = {
    **dict.fromkeys(LONG.split(), "*i64"),
    **dict.fromkeys(("logprobs_ptr", "out_logprobs_ptr"), "*fp32"),
    **dict.fromkeys(("tables_ptr", "lengths_ptr"), "*i32"),
    "is_done_ptr": "*i8",
}


@pytest.mark.parametrize("arch", ARCHS)
def test_decode_state(arch):
    constants = {"STOPS": 4, "BLOCK_R": 256, "num_warps": 8}
    check(decode_state._advance_kernel, STEP, constants, arch)
    constants = {"COLUMNS": 64, "BLOCK_SIZE": 64, "BLOCK_R": 128, "num_warps": 4}
    check(decode_state._place_kernel, STEP, constants, arch)


PRODUCTS = [
    pytest.param(kind, index, marks=[] if (kind, index) == ("nf4", 1) else pytest.mark.slow)
    for kind, index in (*(("nf4", i) for i in range(4)), *(("16-bit", i) for i in range(4)))
]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("kind", "index"), PRODUCTS)
def test_products_of_few_rows(kind, index, arch):
    room = nf4_matmul if kind == "nf4" else matmul
    tiles = room.TILES.get(arch, room.TILES[0])
    tile = tiles[min(index, len(tiles) - 1)]
    constants = {
        "BLOCK_N": tile.block_n, "BLOCK_T": tile.block_t, "BLOCK_K": tile.block_k,
        "STAGES": tile.num_stages, "SPLIT": True, "EVEN_K": True, "HAS_BIAS": True,
        "NUM_PARTS": 3, "ALIGNED": True, "RANK": 16, "BLOCK_R": 16, "num_warps": tile.num_warps,
        "enable_fp_fusion": False,
    }  # fmt: skip
    if kind == "nf4":
        constants |= {
            "BLOCK_K": nf4_matmul.BLOCK_K,
            "WARPS": tile.num_warps,
            "DOUBLE": True,
            "FAST": True,
            "IN_ORDER": index % 2 == 1,
        }
        constants |= {"BESIDE_SHRINK": arch in lora.OVERLAPPING}
        constants |= {"maxnreg": tile.max_registers} if tile.max_registers else {}
        kernel = nf4_matmul._nf4_matmul_kernel
    else:
        constants |= {"SPLIT": index < 3, "CHAINED": index == 3}
        overlaps = arch in lora.OVERLAPPING
        constants |= {"LETS_NEXT_START": overlaps, "IS_EARLY": overlaps}
        constants |= {"GROUP": 8 if index == 3 else 1}
        kernel = matmul._matmul_kernel
    pointers = {**POINTERS, "w_ptr": "*bf16", "parts_ptr": "*i32"}
    found, ptx = check(kernel, pointers, constants, arch, products=True, stack_limit=136)
    assert found == {90: {"wgmma.mma"}, 100: {"tcgen05.mma"}}.get(arch, {"mma.sync"})
    assert ("0xd9c8" in ptx) == (kind == "nf4")


FOLDED = {
    "qkv": {"HAS_NORM": True, "HAS_BIAS": True},
    "o": {"HAS_RESIDUAL": True, "SPLIT": True, "AHEAD": 256},
    "gate_up": {"HAS_NORM": True, "GATED": True},
}


def check_few_rows(tile, which, arch):
    overlaps = few_rows.overlaps(Capability(arch=arch, tensor_dots=True))
    constants = {
        "BLOCK_N": tile.block_n, "BLOCK_T": tile.block_t, "BLOCK_K": tile.block_k,
        "STAGES": tile.num_stages, "BLOCK_S": 64, "EVEN_K": True, "num_warps": tile.num_warps,
        "PDL": overlaps,
    }  # fmt: skip
    flags = ["SPLIT", "HAS_BIAS", "HAS_NORM", "HAS_RESIDUAL", "GATED", "AHEAD"]
    constants |= dict.fromkeys(flags, False) | {"AHEAD": 0} | FOLDED[which]
    halves = dict.fromkeys(("w_ptr", "norm_ptr", "ahead_ptr"), "*bf16")
    pointers = {**POINTERS, **halves, "squares_ptr": "*fp32"}
    _, ptx = check(
        few_rows._few_rows_kernel, pointers, constants, arch, products=True, stack_limit=64
    )
    assert "cp.async.cg.shared.global" in ptx, "weights are under way while others are used"
    assert ("griddepcontrol.wait" in ptx) == overlaps
    if overlaps:  # nothing but hints before the wait
        before = ptx[: ptx.index("griddepcontrol.wait")]
        assert "prefetch.global.L2" in before
        assert not re.search(r"(ld|st|atom|red|cp\.async)\S*\.global|ld\.volatile", before)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    "rows", [8, *(pytest.param(n, marks=pytest.mark.slow) for n in (32, 64, 128))]
)
@pytest.mark.parametrize("which", FOLDED)
def test_few_rows(which, rows, arch):
    capability = Capability(arch=arch, tensor_dots=True)
    check_few_rows(few_rows.general_form(capability, rows, 1536, 8960).tile, which, arch)


@pytest.mark.parametrize("which", FOLDED)
def test_forms_that_are_in_use(which):
    tiles = {form.tile for form in few_rows.FORMS[90].values()}
    assert tiles
    for tile in tiles:
        check_few_rows(tile, which, 90)


@pytest.mark.parametrize("arch", ARCHS)
def test_small_launches_of_a_chain(arch):
    """Only from sm_90 on do they overlap; then a norm reads its weight before the wait, first of
    all, and nothing else is read there.
    """
    overlaps = few_rows.overlaps(Capability(arch=arch, tensor_dots=True))
    sizes = {"D": 3584, "HAS_RESIDUAL": True, "OVERLAPS": overlaps, **norm.tile_of(3584)}
    found = [check(chain._norm_early_kernel, POINTERS, sizes, arch)[1]]
    sizes = {"F": 18944, "BLOCK_F": swiglu.BLOCK_F, "num_warps": swiglu.NUM_WARPS}
    sizes["OVERLAPS"] = overlaps
    found.append(check(chain._swiglu_early_kernel, POINTERS, sizes, arch)[1])
    sizes = {"D": 3584, "PIECES": 9, "OVERLAPS": overlaps, **norm.tile_of(3584)}
    pointers = {**POINTERS, "pieces_ptr": "*fp32"}
    found.append(check(chain._pieces_norm_kernel, pointers, sizes, arch)[1])
    for ptx, reads in zip(found, (2, 0, 2), strict=True):
        assert ("griddepcontrol.wait" in ptx) == overlaps
        before = ptx.partition("griddepcontrol.wait")[0] if overlaps else ""
        assert before.count("ld.global") == reads * overlaps
        assert not re.search(r"(st|atom|red|cp\.async)\S*\.global|ld\.volatile", before)


@pytest.mark.parametrize("arch", ARCHS)
def test_start_of_a_step(arch):
    pointers = {**POINTERS, **dict.fromkeys(("ids_ptr", "positions_ptr"), "*i64")}
    pointers |= {"table_ptr": "*bf16", "frequencies_ptr": "*fp32"}
    constants = {"D": 3584, "HALF": 64, **step_start.tile_of(3584, 64)}
    # large angles are reduced in a table on the stack
    check(step_start._start_kernel, pointers, constants, arch, stack_limit=64)


@pytest.mark.parametrize("arch", ARCHS)
def test_squares(arch):
    constants = {"D": 3584, "BLOCK_D": 4096, "num_warps": 8}
    check(few_rows._squares_kernel, POINTERS, constants, arch)


@pytest.mark.parametrize(
    ("index", "turns", "parts"),
    [
        (0, 7, 0),
        *(pytest.param(i, 2, 3, marks=[] if i == 2 else pytest.mark.slow) for i in range(4)),
        *(pytest.param(i, 8, 0, marks=pytest.mark.slow) for i in range(4)),
    ],
)
@pytest.mark.parametrize("dtype", ["*bf16", pytest.param("*fp16", marks=pytest.mark.slow)])
def test_products_with_layouts_written_out(index, turns, parts, dtype):
    tile = nf4_hopper.TILES[index]
    constants = {
        **nf4_hopper.constants_of(tile, turns), "DOUBLE": True, "SPLIT": True, "HAS_BIAS": True,
        "OVERLAPS": True, "NUM_PARTS": parts, "RANK": 16, "BLOCK_R": 16,
        "BESIDE_SHRINK": False, "num_warps": tile.num_warps, "maxnreg": tile.max_registers,
        "enable_fp_fusion": False,
    }  # fmt: skip
    halves = dict.fromkeys(("x_ptr", "bias_ptr", "out_ptr", "xa_ptr", "b_ptr"), dtype)
    pointers = {**POINTERS, **halves, "parts_ptr": "*i32"}
    found, ptx = check(nf4_hopper._kernel, pointers, constants, 90, products=True, stack_limit=0)
    assert found == {"wgmma.mma"}
    loop = ptx[: ptx.index("wgmma.mma")]
    assert "0xd9c8" in loop, "decoded in registers"
    before, after = loop.split("griddepcontrol.wait")
    assert "griddepcontrol.launch_dependents" in before, "the next launch begins with this one"
    for part, what in ((before, "weights"), (after, "x")):
        assert "cp.async.cg.shared.global" in part, f"{what}, 16 bytes at a time"
        assert "cp.async.ca" not in part, f"{what}, some less than 16 bytes at a time"


@pytest.mark.parametrize(
    ("rows", "which", "ring"),
    [
        (8, "norm", few_rows_hopper.Ring(128, 128, 3)),
        (8, "gated", few_rows_hopper.Ring(132, 64, 6, 2)),
        (32, "residual", few_rows_hopper.Ring(132, 64, 5, 2)),
        pytest.param(8, "residual", few_rows_hopper.Ring(132, 128, 5), marks=pytest.mark.slow),
        pytest.param(64, "gated", few_rows_hopper.Ring(132, 64, 4, 2), marks=pytest.mark.slow),
    ],
)
def test_products_through_a_ring(rows, which, ring):
    from triton.experimental.gluon.language import NVMMASharedLayout

    norm = which != "residual" and rows == 8
    constants = {
        "T": rows, "BLOCK_K": ring.block_k, "STAGES": ring.stages, "BOXES": ring.boxes,
        "CHUNKS": 1536 // ring.block_k if norm else ring.stages, "PIECES": 4, "HAS_NORM": norm,
        "HAS_BIAS": which == "norm", "HAS_RESIDUAL": which == "residual", "GATED": which == "gated",
        "OVERLAPS": True, "num_warps": 4,
    }  # fmt: skip
    layout = NVMMASharedLayout(128, 16, 2)
    described = {
        f"{name}_desc": f"tensordesc<bf16[{height},{ring.block_k}],{layout!r}>"
        for name, height in (("w", 64), ("x", rows))
    }
    pointers = {**POINTERS, **described, "gain_ptr": "*bf16"}
    found, ptx = check(few_rows_hopper._ring_kernel, pointers, constants, 90, products=True)
    assert found == {"wgmma.mma"}
    before, after = ptx.split("griddepcontrol.wait", 1)
    asked = before.count("cp.async.bulk.tensor")
    others = 0 if norm else 1
    assert asked == ring.stages * ring.boxes + others, "a ring of weights, and x's description"
    assert "griddepcontrol.launch_dependents" in before
    assert "wgmma.mma" in after, "and what reads the rows"


@pytest.mark.parametrize(
    ("which", "tiles"),
    [
        ("bias", few_rows_tiles.Tiles(32, 9)),
        ("bias", few_rows_tiles.Tiles(64, 7)),
        ("residual", few_rows_tiles.Tiles(32, 7)),
        ("residual", few_rows_tiles.Tiles(32, 9)),
        ("residual", few_rows_tiles.Tiles(64, 6)),
        ("pieces", few_rows_tiles.Tiles(64, 7, 2)),
        ("pieces", few_rows_tiles.Tiles(128, 4, 5)),
    ],
)
def test_products_in_tiles(which, tiles):
    from triton.experimental.gluon.language import NVMMASharedLayout

    constants = {
        "T": tiles.block_t, "STAGES": tiles.stages, "HAS_BIAS": which == "bias",
        "HAS_RESIDUAL": which == "residual", "PIECES": tiles.pieces, "OVERLAPS": True,
        "num_warps": 4,
    }  # fmt: skip
    layout = NVMMASharedLayout(128, 16, 2)
    described = {
        f"{name}_desc": f"tensordesc<bf16[{height},128],{layout!r}>"
        for name, height in (("w", 64), ("x", tiles.block_t))
    }
    pointers = {**POINTERS, **described}
    pointers["out_ptr"] = "*fp32" if which == "pieces" else "*bf16"
    found, ptx = check(few_rows_tiles._tiles_kernel, pointers, constants, 90, products=True)
    assert found == {"wgmma.mma"}
    before, after = ptx.split("griddepcontrol.wait", 1)
    asked = before.count("cp.async.bulk.tensor")
    assert asked == tiles.stages + 1, "a ring of weights, and x's description"
    assert "griddepcontrol.launch_dependents" in before
    assert "wgmma.mma" in after, "and what reads the rows"
    with NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
        command = [tool, "-arch=sm_90a", "--verbose", file.name, "-o", os.devnull]
        told = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "serialized" not in told.stdout + told.stderr, "products wait for each other: 2 us more"


@pytest.mark.parametrize(
    ("which", "stages"), [("norm", 6), ("residual", 6), ("residual", 4), ("gated", 8)]
)
def test_products_in_strips(which, stages):
    from triton.experimental.gluon.language import NVMMASharedLayout

    is_gated, has_norm, is_whole = which == "gated", which != "residual", stages == 6
    constants = {
        "T": 8, "STAGES": stages, "CHUNKS": 6 if has_norm else stages, "WHOLE": is_whole,
        "AHEAD": 1, "HAS_NORM": has_norm, "HAS_BIAS": which == "norm",
        "HAS_RESIDUAL": which == "residual", "GATED": is_gated, "OVERLAPS": True, "num_warps": 4,
    }  # fmt: skip
    w, x = NVMMASharedLayout(128, 16, 4), NVMMASharedLayout(128, 16, 3)
    box = "2,8,64" if is_gated else "1,16,64"
    described = {
        "w_desc": f"tensordesc<bf16[4,{box}],{w!r}>",
        "x_desc": f"tensordesc<bf16[4,8,64],{x!r}>",
    }
    pointers = {**POINTERS, **described, "gain_ptr": "*bf16", "w_ptr": "*bf16"}
    found, ptx = check(few_rows_strips._strips_kernel, pointers, constants, 90, products=True)
    assert found == {"mma.sync"}
    before, after = ptx.split("griddepcontrol.wait", 1)
    asked = before.count("cp.async.bulk.tensor")
    assert asked == stages + (not has_norm), "a ring of weights, and x's description"
    assert before.count("cp.async.bulk.prefetch") == 1
    assert "griddepcontrol.launch_dependents" in before
    assert after.count("ldmatrix") == (36 if is_whole else 6), "as the instruction has them"
    assert after.count("mma.sync") == (24 if is_whole else 4)
    assert after.count("ld.global.cg.v4") == (12 if has_norm else 0), "rows that are normed"


@pytest.mark.parametrize(
    ("group", "parts"), [(6, 3), (7, 16), pytest.param(8, 1, marks=pytest.mark.slow)]
)
def test_attention_of_few_rows(group, parts):
    span = few_rows_attention.SPAN
    constants = {
        "K": 2, "GROUP": group, "NH": 8 if group <= 6 else 16, "B": 64, "SPAN": span,
        "PARTS": parts, "OVERLAPS": True, "num_warps": 4,
    }  # fmt: skip
    pointers = {
        **POINTERS, "qkv_ptr": "*bf16", "address_ptr": "*i64", "tables_ptr": "*i32",
        "lengths_ptr": "*i32", "slots_ptr": "*i64",
    }  # fmt: skip
    found, ptx = check(few_rows_attention._attention_kernel, pointers, constants, 90, products=True)
    assert found == {"wgmma.mma"}
    before, _ = ptx.split("griddepcontrol.wait", 1)
    copies = before.count("cp.async.cg.shared.global")
    assert copies == 2 * span * 128 * 2 // (16 * 128), "keys and values before the turn"


@pytest.mark.slow
@pytest.mark.parametrize("parts", [0, 3])
def test_products_of_many_rows_with_layouts_written_out(parts):
    tile = nf4_hopper.WIDE
    constants = {
        **nf4_hopper_wide.constants(), "DOUBLE": True, "SPLIT": True, "HAS_BIAS": True,
        "OVERLAPS": True, "NUM_PARTS": parts, "RANK": 16, "BLOCK_R": 16, "BESIDE_SHRINK": parts > 0,
        "num_warps": tile.num_warps, "maxnreg": tile.max_registers, "enable_fp_fusion": False,
    }  # fmt: skip
    pointers = {**POINTERS, "parts_ptr": "*i32"}
    check(nf4_hopper_wide._kernel, pointers, constants, 90, products=True, stack_limit=144)


@pytest.mark.parametrize("arch", ARCHS)
def test_lora_expand(arch):
    constants = {"BLOCK_T": 64, "NUM_PARTS": 3, "RANK": 16, "BLOCK_R": 16, **lora.EXPAND_TILE}
    pointers = {**POINTERS, "parts_ptr": "*i32"}
    check(lora._expand_kernel, pointers, constants, arch, products=True)


RANKS = [16, *(pytest.param(rank, marks=pytest.mark.slow) for rank in (64, 128))]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("rank", RANKS)
def test_lora_rows(rank, arch):
    pointers = {**POINTERS, **dict.fromkeys(("m_ptr", "u_ptr"), "*bf16"), "parts_ptr": "*i32"}
    narrow, even = {"RANK": rank, "BLOCK_R": rank}, {"IS_EVEN": True}
    tile = narrow | even | {"BLOCK_T": 64, **lora_rows.shrink_tile(rank)}
    _, ptx = check(lora_rows._shrink_kernel, pointers, tile, arch, products=True)
    assert "cp.async.cg.shared.global" in ptx, "rows are under way while others are used"
    tile = narrow | {"NUM_PARTS": 2, **lora_rows.outer_tile(rank)}
    wide = {**pointers, "out_ptr": "*fp32"}
    _, ptx = check(lora_rows._outer_kernel, wide, tile, arch, products=True, stack_limit=64)
    assert "cp.async.cg.shared.global" in ptx, "rows are under way while others are used"
    tile = narrow | even | {"NUM_PARTS": 2, "num_columns": 37888, **lora_rows.ADD_TILE}
    _, ptx = check(lora_rows._add_kernel, pointers, tile, arch, products=True)
    assert re.search(r"st\.global\.v4\.b32", ptx), "whole sixteen bytes are written"


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("rank", RANKS)
def test_lora_swiglu(rank, arch):
    pointers = {**POINTERS, **dict.fromkeys(("a_ptr", "u_ptr"), "*bf16")}
    constants = {"F": 18944, "RANK": rank, "BLOCK_R": rank, **lora_swiglu.TILE}
    inner = {"RANK_A": rank, "BLOCK_A": rank}
    for kernel, more in ((lora_swiglu._forward_kernel, {}), (lora_swiglu._backward_kernel, inner)):
        _, ptx = check(kernel, pointers, constants | more, arch, products=True, stack_limit=64)
        assert re.search(r"st\.global\.v4\.b32", ptx), "whole sixteen bytes are written"


@pytest.mark.slow
def test_what_a_t4_runs():
    """Everything without dots, in float16; NF4 decoded by arithmetic."""
    half = {name: "*fp16" if kind == "*bf16" else kind for name, kind in POINTERS.items()}
    constants = {"D": 3584, "HAS_RESIDUAL": True, **norm.tile_of(3584)}
    check(norm._forward_kernel, half, constants | {"IN_ORDER": False}, T4)
    check(norm._backward_kernel, half, constants, T4)
    check(norm._backward_weight_kernel, half, constants, T4)
    check(norm._sum_parts_kernel, half, {"D": 3584, **norm.PART_TILE}, T4)
    tile = rope.tile_of(32, 64)
    check(rope._rotate_kernel, half, {"HALF": 64, "BACKWARD": True, **tile}, T4)
    constants = {"F": 18944, "BLOCK_F": swiglu.BLOCK_F, "num_warps": swiglu.NUM_WARPS}
    check(swiglu._forward_kernel, half, constants | {"IN_ORDER": False}, T4)
    check(swiglu._backward_kernel, half, {**constants, "KEEPS_H": True}, T4)
    constants = {"V": 152064, "BLOCK_V": head.BLOCK_V, "num_warps": head.NUM_WARPS}
    constants |= {"NEEDS_GRADIENT": True, "HAS_GRAD": True}
    check(head._rows_kernel, half, constants, T4)
    constants = {"DOUBLE": True, "FAST": False, "SKIPS": True, "enable_fp_fusion": False}
    constants |= nf4.DEQUANTIZE_TILE
    check(nf4._dequantize_kernel, half, constants, T4)
    constants = {"K": 3584, "BLOCK_K": int8.BLOCK_K, "num_warps": int8.NUM_WARPS}
    pointers = {**half, "values_ptr": "*i8", "scale_ptr": "*fp32"}
    check(int8._dequantize_kernel, pointers, {**constants, "enable_fp_fusion": False}, T4)
    tiles = triton.cdiv(151936, sampling.BLOCK_V)
    constants = {"V": 151936, "TILES": tiles, "BLOCK_V": sampling.BLOCK_V, "HELD": 2}
    constants |= {"IS_CUT": True, "AHEAD": 1, "num_warps": sampling.NUM_WARPS}
    check(sampling._tiles_kernel, DRAWING, constants, T4)
