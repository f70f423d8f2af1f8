"""Between the qkv projection and attention over blocks, in one launch: norm, rotate, write.

Shapes: qkv [T, (H + 2K) E] -> q [T, H, E]; keys and values go to a pool [L, N, 2, K, B, E]. Query
and key heads are normed where there are weights (Qwen3) and rotated; values are copied. The
rounding points are those of kernels/norm.py and kernels/rope.py, one after the other, so the result
is theirs to the bit. The pool is found through its address in device memory: a captured CUDA graph
stays valid when the pool moves. Bytes per token: (H + 2K) E 16-bit values read and written. No
gradient. arXiv 2104.09864.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparring.kernels import jit, rounded, tl, triton, uses_triton
from sparring.kernels.norm import rms_norm_reference
from sparring.kernels.norm import tile_of as norm_tile_of
from sparring.kernels.rope import rope_reference
from sparring.layout import KVPool

__all__ = ["rotate_write", "rotate_write_reference", "rotate_write_triton"]

LEAST_VALUES = 1024
"""Values a tile of heads has at least where they are normed: eight a thread, as in the norm's own
tile, since what a thread holds decides the order of a sum.
"""


def num_heads_of(qkv_TC: Tensor, kv_pool: KVPool) -> int:
    """Query heads H, from the widths of the projection and of the pool's heads."""
    num_kv_heads, size = kv_pool.data.shape[3], kv_pool.data.shape[5]
    num_heads = qkv_TC.shape[1] // size - 2 * num_kv_heads
    assert (num_heads + 2 * num_kv_heads) * size == qkv_TC.shape[1], "the pool fits the projection"
    return num_heads


def rotate_write_reference(
    qkv_TC: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    slots_T: Tensor,
    kv_pool: KVPool,
    layer: int,
) -> Tensor:
    """Rotated queries [T, H, E]; keys and values are written to their slots of the pool.

    qkv_TC [T, (H + 2K) E]; cos, sin [T, E / 2]; q_norm, k_norm [E] or both None; slots_T [T] int64:
    block * block_size + offset in it.
    """
    num_heads = num_heads_of(qkv_TC, kv_pool)
    num_kv_heads, size = kv_pool.data.shape[3], kv_pool.data.shape[5]
    heads = qkv_TC.view(len(qkv_TC), -1, size)
    q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    if q_norm is not None and k_norm is not None:
        q, k = rms_norm_reference(q, q_norm, eps), rms_norm_reference(k, k_norm, eps)
    q, k = rope_reference(q, cos, sin), rope_reference(k, cos, sin)
    write_slots(torch.stack((k, v), 1), slots_T, kv_pool, layer)
    return q


def write_slots(new_T2KE: Tensor, slots_T: Tensor, kv_pool: KVPool, layer: int) -> None:
    """Writes keys and values [T, 2, K, E] to their slots, in 8 bits where the pool is."""
    data, scales = kv_pool.data[layer], kv_pool.scales
    blocks, places = slots_T // kv_pool.block_size, slots_T % kv_pool.block_size
    if scales is not None:
        limit = 127.0 if data.dtype == torch.int8 else 448.0
        most = new_T2KE.float().abs().amax(-1)
        scales[layer][blocks, :, :, places] = most / limit
        new_T2KE = new_T2KE.float() * torch.where(most == 0, 0.0, limit / most).unsqueeze(-1)
        if data.dtype == torch.int8:
            new_T2KE = (new_T2KE + 0.5).floor()
    data[blocks, :, :, places] = new_T2KE.to(data.dtype)


@jit
def to_eight_bits(x, factor, DTYPE: tl.constexpr):
    """x factor as int8 (to nearest, halves up) or as an 8-bit float; |x factor| fits."""
    if tl.int8 == DTYPE:
        return tl.floor(x * factor + 0.5).to(tl.int8)
    else:  # noqa: RET505 - Triton wants one type a branch
        return (x * factor).to(DTYPE)


@jit(do_not_specialize=["layer", "num_blocks"])
def _rotate_write_kernel(
    qkv_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, slots_ptr, address_ptr, q_ptr,
    stride_t, layer, num_blocks, eps,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, B: tl.constexpr, HALF: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr, HAS_NORM: tl.constexpr,
    KV_DTYPE: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    is_query = (heads < H)[:, None]
    is_value = (heads >= H + K)[:, None]
    columns = tl.arange(0, BLOCK_E)
    inside = (heads < H + 2 * K)[:, None] & (columns < HALF)[None, :]
    row_ptr = qkv_ptr + token * stride_t
    at = row_ptr + heads[:, None] * E + columns[None, :]
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    dtype = q_ptr.dtype.element_ty
    a, b = first, second
    if HAS_NORM:
        wide = tl.arange(0, BLOCK_D)
        whole = (heads < H + 2 * K)[:, None] & (wide < E)[None, :]
        x = tl.load(row_ptr + heads[:, None] * E + wide[None, :], mask=whole, other=0.0)
        x = x.to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / E + eps)
        half = columns < HALF
        q_low = tl.load(q_norm_ptr + columns, mask=half, other=0.0).to(tl.float32)
        q_high = tl.load(q_norm_ptr + HALF + columns, mask=half, other=0.0).to(tl.float32)
        k_low = tl.load(k_norm_ptr + columns, mask=half, other=0.0).to(tl.float32)
        k_high = tl.load(k_norm_ptr + HALF + columns, mask=half, other=0.0).to(tl.float32)
        low = tl.where(is_query, q_low[None, :], k_low[None, :])
        high = tl.where(is_query, q_high[None, :], k_high[None, :])
        a = rounded(a * scale[:, None], dtype).to(tl.float32)
        b = rounded(b * scale[:, None], dtype).to(tl.float32)
        a = rounded(a * low, dtype).to(tl.float32)
        b = rounded(b * high, dtype).to(tl.float32)
    cos = tl.load(cos_ptr + token * HALF + columns, mask=columns < HALF, other=0.0)[None, :]
    sin = tl.load(sin_ptr + token * HALF + columns, mask=columns < HALF, other=0.0)[None, :]
    new_first = rounded(tl.where(is_value, first, tl.fma(a, cos, -(b * sin))), dtype)
    new_second = rounded(tl.where(is_value, second, tl.fma(b, cos, a * sin)), dtype)
    to_q = q_ptr + (token * H + heads[:, None]) * E + columns[None, :]
    tl.store(to_q, new_first, mask=inside & is_query)
    tl.store(to_q + HALF, new_second, mask=inside & is_query)
    pool_ptr = tl.multiple_of(tl.load(address_ptr).to(tl.pointer_type(KV_DTYPE)), 16)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    block = layer.to(tl.int64) * num_blocks + slot // B
    to_kv = pool_ptr + (block * (2 * K) + heads[:, None] - H) * (B * E) + (slot % B) * E
    to_kv += columns[None, :]
    written = inside & (heads >= H)[:, None]
    low, high = new_first.to(tl.float32), new_second.to(tl.float32)
    if LIMIT == 0:
        tl.store(to_kv, rounded(low, KV_DTYPE), mask=written)
        tl.store(to_kv + HALF, rounded(high, KV_DTYPE), mask=written)
    else:
        most = tl.maximum(tl.max(tl.abs(low), axis=1), tl.max(tl.abs(high), axis=1))
        factor = tl.where(most == 0.0, 0.0, LIMIT / tl.where(most == 0.0, 1.0, most))[:, None]
        tl.store(to_kv, to_eight_bits(low, factor, KV_DTYPE), mask=written)
        tl.store(to_kv + HALF, to_eight_bits(high, factor, KV_DTYPE), mask=written)
        scales_ptr = tl.load(address_ptr + 1).to(tl.pointer_type(tl.float32))
        to_scale = scales_ptr + (block * (2 * K) + heads - H) * B + slot % B
        tl.store(to_scale, most / LIMIT, mask=(heads >= H) & (heads < H + 2 * K))


@jit
def rotated_heads(
    row_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, heads, there, is_query, is_value, eps,
    E: tl.constexpr, BLOCK_E: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """Heads [M], [M, BLOCK_E]: what the kernel above makes of them, for a kernel that goes on with
    them; with a norm M BLOCK_E must be at least LEAST_VALUES. Every column finds its partner in the
    other half of the head. row_ptr, cos_ptr, sin_ptr: of one token, or [M, 1] of as many tokens.
    """
    HALF: tl.constexpr = E // 2
    columns = tl.arange(0, BLOCK_E)
    is_first = columns < HALF
    partners = tl.where(is_first, columns + HALF, columns - HALF)
    inside = there[:, None] & (columns < E)[None, :]
    at = row_ptr + heads[:, None] * E
    x = tl.load(at + columns[None, :], mask=inside, other=0.0)
    dtype = x.dtype
    x = x.to(tl.float32)
    a = x
    b = tl.load(at + partners[None, :], mask=inside, other=0.0).to(tl.float32)
    if HAS_NORM:
        scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / E + eps)
        within = columns < E
        q_own = tl.load(q_norm_ptr + columns, mask=within, other=0.0).to(tl.float32)
        q_theirs = tl.load(q_norm_ptr + partners, mask=within, other=0.0).to(tl.float32)
        k_own = tl.load(k_norm_ptr + columns, mask=within, other=0.0).to(tl.float32)
        k_theirs = tl.load(k_norm_ptr + partners, mask=within, other=0.0).to(tl.float32)
        own = tl.where(is_query[:, None], q_own[None, :], k_own[None, :])
        theirs = tl.where(is_query[:, None], q_theirs[None, :], k_theirs[None, :])
        a = rounded(a * scale[:, None], dtype).to(tl.float32)
        b = rounded(b * scale[:, None], dtype).to(tl.float32)
        a = rounded(a * own, dtype).to(tl.float32)
        b = rounded(b * theirs, dtype).to(tl.float32)
    # a head's angles for every head: laid out as the heads are, nothing is moved between threads
    angles = (heads * 0)[:, None] + tl.where(is_first, columns, columns - HALF)[None, :]
    cos = tl.load(cos_ptr + angles, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + angles, mask=inside, other=0.0)
    sin = tl.where(is_first[None, :], -sin, sin)
    turned = tl.fma(a, cos, b * sin)
    return rounded(tl.where(is_value[:, None], x, turned), dtype)


def tile_of(size: int) -> dict[str, int]:
    """Launch table: the norm's tile of heads, so that a head's sum has the norm's order."""
    norm = norm_tile_of(size)
    return {
        "BLOCK_D": norm["BLOCK_D"],
        "BLOCK_E": max(16, triton.next_power_of_2(size // 2)),
        "BLOCK_H": norm["ROWS"],
        "num_warps": norm["num_warps"],
    }


def kv_dtype_of(data: Tensor) -> dict[str, object]:
    """Compile-time facts of a pool's dtype: Triton's name, and the largest number of 8-bit ones (0:
    16 bits); raises ValueError for any but 16-bit floats, int8 and float8_e4m3fn.
    """
    names = {
        torch.bfloat16: (tl.bfloat16, 0.0),
        torch.float16: (tl.float16, 0.0),
        torch.int8: (tl.int8, 127.0),
        torch.float8_e4m3fn: (tl.float8e4nv, 448.0),
    }
    if data.dtype not in names:
        raise ValueError(
            f"the pool is {data.dtype}; kernels read bfloat16, float16, int8 and float8_e4m3fn"
        )
    name, limit = names[data.dtype]
    return {"KV_DTYPE": name, "LIMIT": limit}


def rotate_write_triton(
    qkv_TC: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    slots_T: Tensor,
    kv_pool: KVPool,
    layer: int,
) -> Tensor:
    """`rotate_write_reference` in one launch; the rows of qkv_TC may have a stride."""
    assert kv_pool.address is not None, "kernels find the pool through its address"
    num_heads = num_heads_of(qkv_TC, kv_pool)
    num_kv_heads, block_size, size = kv_pool.data.shape[3:]
    q_THE = torch.empty((len(qkv_TC), num_heads, size), dtype=qkv_TC.dtype, device=qkv_TC.device)
    tile = tile_of(size)
    has_norm = q_norm is not None and k_norm is not None
    if len(qkv_TC):
        grid = (len(qkv_TC), triton.cdiv(num_heads + 2 * num_kv_heads, tile["BLOCK_H"]))
        _rotate_write_kernel[grid](
            qkv_TC, cos.contiguous(), sin.contiguous(), q_norm if has_norm else cos,
            k_norm if has_norm else cos, slots_T, kv_pool.address, q_THE, qkv_TC.stride(0), layer,
            kv_pool.num_blocks, eps,
            H=num_heads, K=num_kv_heads, E=size, B=block_size, HALF=size // 2, HAS_NORM=has_norm,
            **kv_dtype_of(kv_pool.data), enable_fp_fusion=True, **tile,
        )  # fmt: skip
    return q_THE


def rotate_write(
    qkv_TC: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    slots_T: Tensor,
    kv_pool: KVPool,
    layer: int,
) -> Tensor:
    """Rotated queries [T, H, E]; keys and values are written to their slots of the pool.

    qkv_TC [T, (H + 2K) E]; cos, sin [T, E / 2]; q_norm, k_norm [E] or both None; slots_T [T] int64:
    block * block_size + offset in it.
    """
    function = rotate_write_triton if uses_triton(qkv_TC) else rotate_write_reference
    return function(qkv_TC, cos, sin, q_norm, k_norm, eps, slots_T, kv_pool, layer)
