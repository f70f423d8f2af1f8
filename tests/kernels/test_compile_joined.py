"""Products joined with what follows them, compiled from forms of every kind; no GPU needed."""

from __future__ import annotations

import pytest

from sparring.kernels import head_draw, norm, split_product
from tests.kernels.test_compile import ARCHS, POINTERS, check

OTHERS = ((64, 128, 8, 6), (64, 128, 4, 4), (128, 128, 8, 3), (64, 64, 4, 6))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("block_n", "block_t", "num_warps", "num_stages"),
    [(128, 128, 8, 5), *(pytest.param(*form, marks=pytest.mark.slow) for form in OTHERS)],
)
def test_products_joined_with_what_follows(block_n, block_t, num_warps, num_stages, gated):
    """Bulk copies and asynchronous products: sm_90 alone has a table of them."""
    size = block_n // 2 if gated else block_n
    types = {
        "x_desc": f"tensordesc<bf16[{block_t},64]>",
        "w_desc": f"tensordesc<bf16[{size},64]>",
        "parts_desc": f"tensordesc<fp32[1,{block_t},{size}]>",
        "out_desc": f"tensordesc<bf16[{block_t},{size}]>",
    }
    constants = {
        "BLOCK_N": size, "BLOCK_T": block_t, "BLOCK_K": split_product.BLOCK_K,
        "STAGES": num_stages, "OVERLAPS": True, "num_warps": num_warps,
    }  # fmt: skip
    kernel = split_product._split_kernel
    if gated:
        kernel, constants = split_product._gated_kernel, constants | {"HAS_BIAS": True}
    found, ptx = check(kernel, POINTERS | types, constants, 90, products=True)
    assert found == {"wgmma.mma"}
    assert "cp.async.bulk.tensor" in ptx
    waits, reads = ptx.index("griddepcontrol.wait"), ptx.index("cp.async.bulk.tensor")
    assert waits < reads, "nothing is read before the launch before has ended"
    products_in_flight = 2 if gated else 1
    assert f"wgmma.wait_group.sync.aligned {products_in_flight}" in ptx, "one is left running"


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("width", [3584, pytest.param(896, marks=pytest.mark.slow)])
def test_a_norm_of_parts(width, arch):
    constants = {"D": width, "HAS_BIAS": True, "OVERLAPS": arch >= 90, **norm.tile_of(width)}
    check(split_product._norm_kernel, POINTERS, constants, arch)


@pytest.mark.parametrize(
    "form",
    [head_draw.HeadForm(128, 128, 8, 3, 128), head_draw.HeadForm(64, 128, 4, 3, 168)],
    ids=["128", "64"],
)
def test_head_and_draw(form):
    """What spills are a few words a thread in the part that draws, not in the product's loop."""
    pointers = {
        "x_desc": f"tensordesc<bf16[{form.block_t},64]>",
        "w_desc": f"tensordesc<bf16[{form.block_v},64]>",
        **dict.fromkeys(("parts_ptr", "inverse_ptr"), "*fp32"),
        **dict.fromkeys(("seed_ptr", "ids_ptr", "draws_ptr", "held_ptr", "min_draws_ptr"), "*i64"),
        "best_ptr": "*i32",
    }
    constants = {
        "V": 151936, "TILES": -(-151936 // form.block_v), "BLOCK_V": form.block_v,
        "BLOCK_T": form.block_t, "BLOCK_K": head_draw.BLOCK_K, "STAGES": form.num_stages,
        "HELD": 1, "PIECES": form.pieces, "num_warps": form.num_warps,
        "maxnreg": form.max_registers,
    }  # fmt: skip
    found, ptx = check(
        head_draw._tiles_kernel, pointers, constants, 90, products=True, stack_limit=256
    )
    assert found == {"wgmma.mma"}
    assert "wgmma.wait_group.sync.aligned 1" in ptx, "one is left running"


@pytest.mark.parametrize("arch", ARCHS)
def test_the_combination_of_tiles(arch):
    pointers = {
        **dict.fromkeys(("parts_ptr", "inverse_ptr", "logprobs_ptr"), "*fp32"),
        "best_ptr": "*i32",
        "tokens_ptr": "*i64",
    }
    constants = {
        "TILES": 1187, "BLOCK_R": head_draw.COMBINED_ROWS, "BLOCK_S": head_draw.COMBINED_TILES,
        "num_warps": 4,
    }  # fmt: skip
    check(head_draw._combine_kernel, pointers, constants, arch)
