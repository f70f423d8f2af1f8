"""Kernels of attention over blocks compiled for the cards that users own; see test_compile.py."""

from __future__ import annotations

import re

import pytest

from sparring.kernels import (
    Capability,
    norm,
    paged_attention,
    paged_prefill,
    rotate_write,
    shared_decode,
    split_attention,
)
from sparring.kernels.attention_plan import tile_of
from sparring.kernels.paged_plan import SHARING, sharing_pays, span_of, split_of, swaps_splits
from sparring.kernels.shared_decode import chunk_of
from sparring.kernels.splits import OPTIONS as SPLIT_OPTIONS
from tests.kernels.test_compile import ARCHS, OPTIONS, POINTERS, check, triton

POINTERS = {
    **POINTERS,
    **dict.fromkeys(("q_norm_ptr", "k_norm_ptr", "qkv_ptr"), "*bf16"),
    **dict.fromkeys(("partial_ptr", "states_ptr"), "*fp32"),
    **dict.fromkeys(("tables_ptr", "lengths_ptr", "shared_ptr", "tickets_ptr"), "*i32"),
    **dict.fromkeys(("slots_ptr", "address_ptr"), "*i64"),
}
SIZES = [128, *(pytest.param(n, marks=pytest.mark.slow) for n in (64, 80, 256))]


def paged_constants(size: int, block_size: int) -> dict[str, object]:
    block = triton.next_power_of_2(size)
    sizes = {"K": 4, "GROUP": 7, "E": size, "B": block_size, "BLOCK_E": block}
    return {**sizes, "HAS_WINDOW": False, "KV_DTYPE": triton.language.bfloat16, "LIMIT": 0.0}


def check_decode(constants, arch, **form):
    """Compiles one form of decoding: (matrix instructions found, PTX)."""
    capability = Capability(arch=arch, tensor_dots=True)
    constants |= SPLIT_OPTIONS | split_of(capability, constants["E"]) | form
    constants |= {"HAS_NORM": True, "OVERLAPS": arch >= 90}
    constants["SWAPS"] = swaps_splits(form["SPAN"], constants["E"])
    constants["ASKS"] = arch >= 90 and paged_attention._asks(form, constants, 0)
    return check(paged_attention._decode_kernel, POINTERS, constants, arch, products=True)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("block_size", [64, pytest.param(16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("span", [1, 4])
def test_paged_decode(span, block_size, size, arch):
    # as `span_of` has it at most, whatever the number of rows
    span = min(span, span_of(Capability(arch=arch, tensor_dots=True), 4096, size))
    constants = paged_constants(size, block_size) | {"BLOCK_M": 16, "ROTATES": block_size == 64}
    found, ptx = check_decode(constants, arch, SPAN=span, SHARED=1, BLOCK_W=16)
    assert found == {90: {"wgmma.mma"}, 100: {"tcgen05.mma"}}.get(arch, {"mma.sync"})
    assert "cp.async.cg.shared.global" in ptx, "keys are under way while others are used"


@pytest.mark.parametrize("span", [1, 4, 8])
def test_decode_that_shares_prompts(span):
    """The heads and the architecture that do: see `SHARING`."""
    group = SHARING[90][1]
    constants = paged_constants(128, 64) | {"GROUP": group, "BLOCK_M": 16, "ROTATES": True}
    chunk = chunk_of(group)
    found, _ = check_decode(constants, 90, SPAN=span, SHARED=chunk, BLOCK_W=chunk * group)
    assert found == {"wgmma.mma"}


@pytest.mark.parametrize("span", [1, 4])
@pytest.mark.parametrize("both", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_decode_in_the_order_of_a_product(both, span):
    constants = paged_constants(128, 64) | {"BLOCK_M": 16, "ROTATES": True, "IN_ORDER": True}
    check_decode(constants | {"BOTH": both}, 90, SPAN=span, SHARED=1, BLOCK_W=16)


def test_shared_splits():
    constants = {"ROWS": 8, "B": 64, "SPLIT": 256, "BLOCK_S": 16, "num_warps": 1}
    check(shared_decode._shared_splits_kernel, POINTERS, constants, 90)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("size", SIZES)
def test_paged_prefill(size, arch):
    constants = paged_constants(size, 64)
    constants |= tile_of(Capability(arch=arch, tensor_dots=True), size, "forward")
    found, ptx = check(
        paged_prefill._prefill_kernel, POINTERS, constants, arch, products=True, stack_limit=256
    )
    assert found == {90: {"wgmma.mma"}, 100: {"tcgen05.mma"}}.get(arch, {"mma.sync"})
    assert "cp.async.cg.shared.global" in ptx


@pytest.mark.parametrize("arch", ARCHS)
def test_rotate_write(arch):
    constants = {"H": 28, "K": 4, "E": 128, "B": 64, "HALF": 64, "HAS_NORM": True}
    constants |= {"KV_DTYPE": triton.language.bfloat16, "LIMIT": 0.0, **rotate_write.tile_of(128)}
    check(rotate_write._rotate_write_kernel, POINTERS, constants, arch)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("source", ["paged", "packed"])
def test_split_attention(source, size, arch):
    """The same matrix instruction as decoding's, whatever the number of queries."""
    constants = paged_constants(size, 64) | SPLIT_OPTIONS
    constants |= split_attention.tile_of(Capability(arch=arch, tensor_dots=True), size)
    kernel = split_attention._paged_kernel
    if source == "packed":
        kernel = split_attention._packed_kernel
        constants = {name: constants[name] for name in kernel.arg_names if name in constants} | {
            name: constants[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")
        }
    found, ptx = check(kernel, POINTERS, constants, arch, products=True, stack_limit=256)
    assert found == {90: {"wgmma.mma"}, 100: {"tcgen05.mma"}}.get(arch, {"mma.sync"})
    assert "cp.async.cg.shared.global" in ptx


EIGHT_BITS = [
    (dtype, arch, limit)
    for dtype, limit, archs in (
        ("int8", 127.0, (80, 86, 89, 90, 100, 120)),
        ("float8e4nv", 448.0, (89, 90, 100, 120)),
    )
    for arch in archs
]


@pytest.mark.parametrize(
    ("dtype", "arch", "limit"),
    [pytest.param(*case, marks=[] if case[1] == 90 else pytest.mark.slow) for case in EIGHT_BITS],
)
def test_paged_attention_in_eight_bits(dtype, arch, limit):
    constants = paged_constants(128, 64) | {"BLOCK_M": 16, "SHARED": 1} | SPLIT_OPTIONS
    constants |= {"KV_DTYPE": getattr(triton.language, dtype), "LIMIT": limit}
    constants |= split_of(Capability(arch=arch, tensor_dots=True), 128)
    constants |= {"ROTATES": True, "HAS_NORM": False, "OVERLAPS": False, "SPAN": 4, "ASKS": False}
    constants |= {"BLOCK_W": 16}
    check(paged_attention._decode_kernel, POINTERS, constants, arch, products=True, stack_limit=64)
    constants = paged_constants(128, 64)
    constants |= {"KV_DTYPE": getattr(triton.language, dtype), "LIMIT": limit}
    constants |= tile_of(Capability(arch=arch, tensor_dots=True), 128, "forward")
    check(paged_prefill._prefill_kernel, POINTERS, constants, arch, products=True, stack_limit=1024)


def test_how_much_work_a_program_takes():
    """More where there is more of it, on the architectures that were measured; powers of two."""
    h200, ada = (Capability(arch=arch, tensor_dots=True) for arch in (90, 89))
    pairs = [8 << i for i in range(10)]
    for size in (64, 128):
        spans = [span_of(h200, n, size) for n in pairs]
        assert spans == sorted(spans)
        assert set(spans) == {1, 4, 8}
    assert span_of(h200, 128, 64) < span_of(h200, 128, 128)
    assert {span_of(ada, n, 128) for n in pairs} == {1}
    assert {span_of(h200, n, 256) for n in pairs} == {1}
    assert sharing_pays(h200, 1024, 2)
    assert not sharing_pays(h200, 512, 2)
    assert not sharing_pays(h200, 1024, 7)
    assert not sharing_pays(ada, 4096, 2)


def lanes_of_sums(kernel, constants, pointers) -> list[tuple[str, str]]:
    """(shape, values a thread and threads a row) of every sum over the rows of a matrix."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: constants.pop(name) for name in OPTIONS & constants.keys()}
    plain = {"eps": "fp32", "scale": "fp32"}
    signature = {
        name: "constexpr" if name in constants else pointers.get(name, plain.get(name, "i32"))
        for name in kernel.arg_names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name.startswith("stride")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    text = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = #ttg.blocked<([^>]*)>", text, re.M))
    first = r'"tt.reduce"\([^)]*\) <{axis = 1 : i32}>'
    sums = re.findall(first + r".*?\(tensor<([\dx]+)xf32, (#\w+)>\)", text, re.S)
    lanes = r"sizePerThread = \[\d+, (\d+)\], threadsPerWarp = \[\d+, (\d+)\]"
    known = [(shape, re.search(lanes, layouts.get(name, ""))) for shape, name in sums]
    return [(shape, "x".join(found.groups())) for shape, found in known if found]


@pytest.mark.parametrize(
    "size", [32, *(pytest.param(n, marks=pytest.mark.slow) for n in (16, 128))]
)
def test_heads_are_normed_by_as_many_threads_as_in_the_norm(size):
    """What a thread holds decides the order of a sum, and so the last bit of a normed head."""
    norms = {"D": size, "HAS_RESIDUAL": False, "enable_fp_fusion": True, **norm.tile_of(size)}
    flags = {name: False for name in norm._forward_kernel.arg_names if name.isupper()}
    [(_, alone)] = lanes_of_sums(norm._forward_kernel, flags | norms, POINTERS)
    columns = paged_attention.rotated_columns(2, size, has_norm=True)
    constants = paged_constants(size, 64) | SPLIT_OPTIONS | {"GROUP": 2, "BLOCK_M": columns}
    constants |= {"ROTATES": True, "HAS_NORM": True, "SHARED": 1, "BLOCK_W": columns, "SPAN": 1}
    constants |= split_of(Capability(arch=90, tensor_dots=True), size)
    kernel = paged_attention._decode_kernel
    flags = {n: False for n in kernel.arg_names if n.isupper() and n not in constants}
    fused = dict(lanes_of_sums(kernel, flags | constants, POINTERS))
    assert fused[f"{columns}x{size}"] == alone
