"""NF4: four-bit weights in bitsandbytes' format, quantised and decoded bit for bit as it does.

Format (QLoRA, arXiv 2305.14314). A matrix [N, K] is flattened row by row into quant blocks of 64
weights. Each weight is the index of one of 16 code values; two indices share a byte, the first in
the high nibble. A block's scale is its largest magnitude (absmax). With double quantisation the
scales are stored in 8 bits: scale - offset, divided by the largest magnitude of its group of 256
scales, as an index into a 256-entry dynamic map.

Decode rule, the only one in this project:

    absmax = map8[index8] * absmax2[group] + offset          float32, multiply, round, then add
    weight = round_to_dtype(CODE[nibble] * absmax)           one rounding from float32

Bytes a weight: 0.5 + 1/64 + 8/(64 * 256) = 0.516 with double quantisation (offset and absmax2 are
kept per group of 256 scales, so that fused matrices may have one offset a part), 0.5625 without.
Decoding reads that and writes 2 (16-bit) or 4 (float32).

On a GPU four packed bytes are decoded at a time: the 16 rounded products of the code and a block's
scale are made in registers (they are the only values its weights can have), their low and high
bytes form two tables of 16 entries, and byte permutations look eight weights up in them, three
instructions a weight. This is the rule above to the bit. Elsewhere the same products are chosen by
arithmetic.

Not here: matrix products on packed weights, and file formats (models/checkpoint.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparring.kernels import (
    Capability,
    capability_of,
    jit,
    rounded,
    tl,
    triton,
)
from sparring.kernels.kept import kept

BLOCK = 64
GROUP = 256
QUANTIZE_WEIGHTS = 1 << 22
"""Weights that are quantised at a time: 11 to 13 bytes of scratch each."""

CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

THRESHOLDS = (
    -0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544,
    -0.23460740596055984, -0.13791173323988914, -0.045525018125772476, 0.03979014977812767,
    0.1202552504837513, 0.2035212516784668, 0.2920137718319893, 0.3893125355243683,
    0.5016634166240692, 0.6427869200706482, 0.8614784178118011,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NF4Matrix:
    """A packed matrix [N, K].

    packed uint8 [N * K / 2]. Double quantisation: absmax uint8 [N * K / 64], absmax2 and offset
    float32 [ceil(N * K / 64 / 256)]; without: absmax float32 and the other two None. dtype: what
    the weight was before, and what it decodes to.
    """

    packed: Tensor
    absmax: Tensor
    absmax2: Tensor | None
    offset: Tensor | None
    shape: tuple[int, int]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes that this matrix holds."""
        parts = (self.packed, self.absmax, self.absmax2, self.offset)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)


def dynamic_map(device: torch.device | None = None) -> Tensor:
    """The 256 sorted float32 values that 8-bit scales index; 0 is entry 127 and 1 the last."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1.0, 2**i + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)
        values += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@kept
def dynamic_map_on(device: torch.device) -> Tensor:
    """The map as a constant of a device."""
    return dynamic_map(device)


@dataclass(frozen=True, slots=True)
class QuantizeScratch:
    """Where quantising works, QUANTIZE_WEIGHTS weights at a time.

    One for all matrices of a model: memory that comes and goes between what stays would leave holes
    in the allocator's.
    """

    moved: Tensor
    wide: Tensor
    codes: Tensor
    small: Tensor

    @staticmethod
    def build(device: torch.device, dtype: torch.dtype) -> QuantizeScratch:
        """For matrices that are to be quantised on `device` as numbers of `dtype`."""
        kinds = (dtype, torch.float32, torch.int32, torch.uint8)
        return QuantizeScratch(
            *(torch.empty(QUANTIZE_WEIGHTS, dtype=kind, device=device) for kind in kinds)
        )

    def suits(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether it lies on that device and is for that dtype."""
        there = self.moved.device
        return (
            self.moved.dtype == dtype
            and there.type == device.type
            and device.index in (None, there.index)
        )


def quantize_nf4(
    weight: Tensor,
    *,
    double: bool = True,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    scratch: QuantizeScratch | None = None,
) -> NF4Matrix:
    """Quantise a matrix [N, K] of float32, float16 or bfloat16, as bitsandbytes does.

    device, dtype: where to and as what (the weight's own by default); a weight that lies elsewhere
    is moved and rounded QUANTIZE_WEIGHTS at a time, so no whole copy of it exists. scratch: for
    that device and dtype, used again from matrix to matrix. 8-bit scales are rounded to the nearest
    entry; bitsandbytes' CPU code may differ there by one entry at midpoints. Raises ValueError
    where N * K is not a multiple of 64.
    """
    rows, columns = weight.shape
    if weight.numel() % BLOCK:
        raise ValueError(
            f"NF4 needs a number of weights that is a multiple of {BLOCK}; got {rows} x {columns}"
        )
    device, dtype = device or weight.device, dtype or weight.dtype
    flat, size = weight.reshape(-1), weight.numel()
    packed = torch.empty(size // 2, dtype=torch.uint8, device=device)
    absmax = torch.empty(size // BLOCK, dtype=torch.float32, device=device)
    thresholds = torch.tensor(THRESHOLDS, dtype=torch.float32, device=device)
    scratch = scratch or QuantizeScratch.build(device, dtype)
    step = len(scratch.moved)
    for start in range(0, size, step):
        count = min(step, size - start)
        wide = scratch.wide[:count].copy_(scratch.moved[:count].copy_(flat[start : start + count]))
        blocks, here = wide.view(-1, BLOCK), slice(start // BLOCK, (start + count) // BLOCK)
        scale = torch.linalg.vector_norm(blocks, ord=torch.inf, dim=1, out=absmax[here])
        blocks.mul_(torch.where(scale > 0, 1.0 / scale, torch.zeros_like(scale))[:, None])
        codes = torch.bucketize(wide, thresholds, out_int32=True, out=scratch.codes[:count])
        pairs = scratch.small[:count].copy_(codes).view(-1, 2)
        out = packed[start // 2 : (start + count) // 2]
        torch.bitwise_left_shift(pairs[:, 0], 4, out=out).bitwise_or_(pairs[:, 1])
    if not double:
        return NF4Matrix(
            packed=packed, absmax=absmax, absmax2=None, offset=None,
            shape=(rows, columns), dtype=dtype,
        )  # fmt: skip
    index8, absmax2, offset = _quantize_scales(absmax)
    return NF4Matrix(
        packed=packed, absmax=index8, absmax2=absmax2, offset=offset.expand(len(absmax2)).clone(),
        shape=(rows, columns), dtype=dtype,
    )  # fmt: skip


def _quantize_scales(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    offset = absmax.mean()
    centred = absmax - offset
    padded = torch.nn.functional.pad(centred, (0, -len(centred) % GROUP)).reshape(-1, GROUP)
    absmax2 = padded.abs().amax(dim=1)
    scaled = padded * torch.where(absmax2 > 0, 1.0 / absmax2, torch.zeros_like(absmax2))[:, None]
    values = dynamic_map(absmax.device)
    midpoints = (values[:-1] + values[1:]) / 2
    index8 = torch.bucketize(scaled, midpoints).to(torch.uint8).reshape(-1)[: len(absmax)]
    return index8, absmax2, offset


def scales_of(matrix: NF4Matrix) -> Tensor:
    """The scale of every quant block, float32 [N * K / 64]."""
    if matrix.absmax2 is None or matrix.offset is None:
        return matrix.absmax
    group = torch.arange(matrix.absmax.numel(), device=matrix.absmax.device) // GROUP
    values = dynamic_map(matrix.absmax.device)[matrix.absmax.long()]
    return values * matrix.absmax2[group] + matrix.offset[group]


def dequantize_nf4_reference(
    matrix: NF4Matrix, *, rows: slice = slice(None), dtype: torch.dtype | None = None
) -> Tensor:
    """Decode rows (all by default) of a matrix [N, K] to `dtype` (default: the one it was quantised
    from).
    """
    code = torch.tensor(CODE, dtype=torch.float32, device=matrix.packed.device)
    num_rows, columns = matrix.shape
    first, last, _ = rows.indices(num_rows)
    if columns % BLOCK == 0:
        packed = matrix.packed.view(num_rows, columns // 2)[first:last].reshape(-1)
        scales = scales_of(matrix).view(num_rows, columns // BLOCK)[first:last].reshape(-1)
        nibbles = torch.stack([packed >> 4, packed & 15], dim=1).view(-1, BLOCK)
        decoded = code[nibbles.int()].mul_(scales[:, None])
        return decoded.view(last - first, columns).to(dtype or matrix.dtype)
    nibbles = torch.stack([matrix.packed >> 4, matrix.packed & 15], dim=1).reshape(-1, BLOCK)
    decoded = code[nibbles.int()].mul_(scales_of(matrix)[:, None])
    return decoded.view(matrix.shape)[first:last].to(dtype or matrix.dtype)


def fuse_nf4(parts: list[NF4Matrix]) -> NF4Matrix:
    """Stack matrices [N_i, K] along N without touching a code.

    Parts whose scales do not fill whole groups of 256 have them expanded to float32 first, which
    changes no decoded value. Raises ValueError where K, dtype or device differ.
    """
    first = parts[0]
    if any(p.shape[1] != first.shape[1] or p.dtype != first.dtype for p in parts):
        raise ValueError(f"cannot fuse matrices {[(p.shape, p.dtype) for p in parts]}: K and dtype")
    shape = (sum(p.shape[0] for p in parts), first.shape[1])
    packed = torch.cat([p.packed for p in parts])
    if all(p.absmax2 is not None and p.absmax.numel() % GROUP == 0 for p in parts):
        return NF4Matrix(
            packed=packed, absmax=torch.cat([p.absmax for p in parts]),
            absmax2=torch.cat([p.absmax2 for p in parts if p.absmax2 is not None]),
            offset=torch.cat([p.offset for p in parts if p.offset is not None]),
            shape=shape, dtype=first.dtype,
        )  # fmt: skip
    return NF4Matrix(
        packed=packed, absmax=torch.cat([scales_of(p) for p in parts]), absmax2=None, offset=None,
        shape=shape, dtype=first.dtype,
    )  # fmt: skip


def lookup_asm(half_type: str) -> str:
    """PTX: a word of four packed bytes $4 and its scale $5 to four registers of two weights each.

    The word's nibbles without their top bits are, four at a time, a permutation's selector over
    eight bytes; the top bits, spread over bytes, are a mask that chooses between the two halves of
    the table. A word lists its weights as 1, 0, 3, 2 ..., which the last permutation puts in order.
    """
    lines = [".reg .b32 s,m,n,a,b,c,d,t<8>,l<4>,h<4>;", ".reg .f32 x<16>;"]
    for i, value in enumerate(CODE):
        bits = torch.tensor(value, dtype=torch.float32).view(torch.int32).item() & 0xFFFFFFFF
        lines.append(f"mul.rn.f32 x{i},$5,0f{bits:08X};")
    for i in range(8):
        lines.append(f"cvt.rn.{half_type}x2.f32 t{i},x{2 * i + 1},x{2 * i};")
    for i in range(4):
        lines.append(f"prmt.b32 l{i},t{2 * i},t{2 * i + 1},0x6420;")
        lines.append(f"prmt.b32 h{i},t{2 * i},t{2 * i + 1},0x7531;")
    lines += ["and.b32 s,$4,0x77777777;", "shl.b32 m,$4,4;"]
    for first, second, tops in (("$0", "$1", "0xd9c8"), ("$2", "$3", "0xfbea")):
        if first == "$2":
            lines.append("shr.u32 s,s,16;")
        lines += [
            f"prmt.b32 n,m,$4,{tops};", "prmt.b32 a,h0,h1,s;", "prmt.b32 b,h2,h3,s;",
            "prmt.b32 c,l0,l1,s;", "prmt.b32 d,l2,l3,s;", "lop3.b32 a,b,a,n,0xe4;",
            "lop3.b32 c,d,c,n,0xe4;", f"prmt.b32 {first},c,a,0x4051;",
            f"prmt.b32 {second},c,a,0x6273;",
        ]  # fmt: skip
    return "{" + " ".join(lines) + "}"


if triton is not None:
    ASM_BF16 = tl.constexpr(lookup_asm("bf16"))
    ASM_FP16 = tl.constexpr(lookup_asm("f16"))


@jit
def _code(index):
    """The code value of a nibble, chosen by its four bits."""
    b0 = (index & 1) == 1
    b1 = (index & 2) == 2
    b2 = (index & 4) == 4
    low0 = tl.where(b0, -0.6961928009986877, -1.0)
    low1 = tl.where(b0, -0.39491748809814453, -0.5250730514526367)
    low2 = tl.where(b0, -0.18477343022823334, -0.28444138169288635)
    low3 = tl.where(b0, 0.0, -0.09105003625154495)
    high0 = tl.where(b0, 0.16093020141124725, 0.07958029955625534)
    high1 = tl.where(b0, 0.33791524171829224, 0.24611230194568634)
    high2 = tl.where(b0, 0.5626170039176941, 0.44070982933044434)
    high3 = tl.where(b0, 1.0, 0.7229568362236023)
    low = tl.where(b2, tl.where(b1, low3, low2), tl.where(b1, low1, low0))
    high = tl.where(b2, tl.where(b1, high3, high2), tl.where(b1, high1, high0))
    return tl.where(index >= 8, high, low)


@jit
def _pairs(words, scale, dtype: tl.constexpr, BYTE: tl.constexpr):
    """The two weights of one byte of each word, in the order of the row."""
    first = rounded(_code((words >> (8 * BYTE + 4)) & 15) * scale, dtype)
    second = rounded(_code((words >> (8 * BYTE)) & 15) * scale, dtype)
    return tl.interleave(first, second)


@jit
def decode_nf4(words, scale, dtype: tl.constexpr, FAST: tl.constexpr):
    """int32 words of four packed bytes [N, K / 8] and their scales, broadcast to the same shape ->
    weights [N, K].
    """
    if FAST:
        kind: tl.constexpr = (tl.uint32, tl.uint32, tl.uint32, tl.uint32)
        if dtype == tl.bfloat16:
            a, b, c, d = tl.inline_asm_elementwise(
                ASM_BF16, "=&r,=&r,=&r,=&r,r,r", [words, scale],
                dtype=kind, is_pure=True, pack=1,
            )  # fmt: skip
        else:
            a, b, c, d = tl.inline_asm_elementwise(
                ASM_FP16, "=&r,=&r,=&r,=&r,r,r", [words, scale],
                dtype=kind, is_pure=True, pack=1,
            )  # fmt: skip
        pairs = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
        first = pairs.to(tl.uint16).to(dtype, bitcast=True)
        second = (pairs >> 16).to(tl.uint16).to(dtype, bitcast=True)
        return tl.interleave(first, second)
    else:  # noqa: RET505 - Triton wants one type a branch
        N: tl.constexpr = words.shape[0]
        K: tl.constexpr = words.shape[1] * 8
        a = _pairs(words, scale, dtype, 0).reshape(N, K // 8, 2)
        b = _pairs(words, scale, dtype, 1).reshape(N, K // 8, 2)
        c = _pairs(words, scale, dtype, 2).reshape(N, K // 8, 2)
        d = _pairs(words, scale, dtype, 3).reshape(N, K // 8, 2)
        all4 = tl.join(tl.join(a, c), tl.join(b, d))  # [N, K / 8, 2 weights, upper pair, odd byte]
        return tl.permute(all4, (0, 1, 3, 4, 2)).reshape(N, K)


@jit
def block_scales(index, block, inside, absmax2_ptr, offset_ptr, map_ptr, DOUBLE: tl.constexpr):
    """Scales of quant blocks from what absmax holds for them (`index`); 0 outside."""
    if DOUBLE:
        group = block // 256
        scale = tl.load(map_ptr + index.to(tl.int32))
        scale = scale * tl.load(absmax2_ptr + group, mask=inside, other=0.0)
        return scale + tl.load(offset_ptr + group, mask=inside, other=0.0)
    else:  # noqa: RET505
        return index


@jit
def _dequantize_kernel(
    words_ptr, absmax_ptr, absmax2_ptr, offset_ptr, map_ptr, out_ptr, first_block, num_blocks,
    row_blocks, skipped_blocks,
    BLOCKS: tl.constexpr, DOUBLE: tl.constexpr, FAST: tl.constexpr, SKIPS: tl.constexpr,
):  # fmt: skip
    """SKIPS: only row_blocks blocks of a row are decoded, skipped_blocks lie between two rows."""
    blocks = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = blocks < num_blocks
    source = blocks + first_block
    if SKIPS:
        source += blocks // row_blocks * skipped_blocks
    index = tl.load(absmax_ptr + source, mask=inside, other=0)
    scale = block_scales(index, source, inside, absmax2_ptr, offset_ptr, map_ptr, DOUBLE)
    at = words_ptr + source[:, None] * 8 + tl.arange(0, 8)[None, :]
    words = tl.load(at, mask=inside[:, None], other=0)
    scale = tl.broadcast_to(scale[:, None], (BLOCKS, 8))
    weights = decode_nf4(words, scale, out_ptr.dtype.element_ty, FAST)
    to = out_ptr + blocks[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(to, weights, mask=inside[:, None])


def words_of(matrix: NF4Matrix) -> Tensor:
    """The packed bytes as int32 words, a view: what kernels read."""
    return matrix.packed.view(torch.int32)


DEQUANTIZE_TILE = {"BLOCKS": 128, "num_warps": 4}


def dequantize_nf4_triton(
    matrix: NF4Matrix,
    *,
    rows: slice = slice(None),
    columns: slice = slice(None),
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    capability: Capability | None = None,
) -> Tensor:
    """`dequantize_nf4_reference` in one launch, into `out` where given."""
    first, last, _ = rows.indices(matrix.shape[0])
    left, right, _ = columns.indices(matrix.shape[1])
    if matrix.shape[1] % BLOCK or left % BLOCK or right % BLOCK:
        raise ValueError(
            f"the kernel takes whole blocks of {BLOCK}; got columns {left} to {right} of"
            f" {matrix.shape[1]}"
        )
    columns = right - left
    if out is None:
        out = torch.empty(
            last - first, columns, dtype=dtype or matrix.dtype, device=matrix.packed.device
        )
    capability = capability or capability_of(out.device)
    row_blocks, all_blocks = columns // BLOCK, matrix.shape[1] // BLOCK
    num_blocks = (last - first) * row_blocks
    double = matrix.absmax2 is not None
    tile = DEQUANTIZE_TILE
    if num_blocks:
        _dequantize_kernel[(triton.cdiv(num_blocks, tile["BLOCKS"]),)](
            words_of(matrix), matrix.absmax, matrix.absmax2 if double else matrix.absmax,
            matrix.offset if double else matrix.absmax, dynamic_map_on(out.device), out,
            first * all_blocks + left // BLOCK, num_blocks, row_blocks, all_blocks - row_blocks,
            DOUBLE=double, SKIPS=row_blocks != all_blocks,
            FAST=capability.tensor_dots and out.dtype != torch.float32,
            enable_fp_fusion=False, **tile,
        )  # fmt: skip
    return out


def dequantize_nf4(
    matrix: NF4Matrix,
    *,
    rows: slice = slice(None),
    columns: slice = slice(None),
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    capability: Capability | None = None,
) -> Tensor:
    """Decode rows and columns (all by default) of a matrix [N, K] to `dtype` (default: the one it
    was quantised from), into `out` where given; `out`'s dtype then counts.

    columns: whole blocks of 64. capability: the model's; left out, what the card can do.
    """
    if matrix.packed.is_cuda and triton is not None and matrix.shape[1] % BLOCK == 0:
        return dequantize_nf4_triton(
            matrix, rows=rows, columns=columns, dtype=dtype, out=out, capability=capability
        )
    dtype = dtype if out is None else out.dtype
    decoded = dequantize_nf4_reference(matrix, rows=rows, dtype=dtype)[:, columns]
    return decoded if out is None else out.copy_(decoded)
