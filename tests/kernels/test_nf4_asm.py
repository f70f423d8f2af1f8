"""The PTX that decodes NF4 on a GPU, run by a small emulator: the interpreter cannot run it."""

from __future__ import annotations

import random
import re
import struct

import pytest
import torch

from sparring.kernels.nf4 import CODE, lookup_asm

HALVES = {"bf16": torch.bfloat16, "f16": torch.float16}


def bits(value, dtype):
    kind = torch.int32 if dtype == torch.float32 else torch.int16
    number = torch.tensor(value, dtype=torch.float32).to(dtype).view(kind).item()
    return number & (0xFFFFFFFF if dtype == torch.float32 else 0xFFFF)


def single(word):
    return struct.unpack("f", struct.pack("I", word))[0]


def permute(a, b, selector):
    source, out = a | b << 32, 0
    for i in range(4):
        pick = selector >> 4 * i & 15
        byte = source >> 8 * (pick & 7) & 255
        out |= (255 * (byte >> 7) if pick & 8 else byte) << 8 * i
    return out


def choose(a, b, c, table):
    out = 0
    for i in range(32):
        index = (a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1
        out |= (table >> index & 1) << i
    return out


def emulate(asm, registers, dtype):
    operations = {
        "mul.rn.f32": lambda a, b: bits(
            (torch.tensor(single(a)) * torch.tensor(single(b))).item(), torch.float32
        ),
        "cvt.rn": lambda a, b: bits(single(a), dtype) << 16 | bits(single(b), dtype),
        "prmt.b32": permute,
        "lop3.b32": choose,
        "and.b32": lambda a, b: a & b,
        "shr.u32": lambda a, b: a >> b,
        "shl.b32": lambda a, b: a << b & 0xFFFFFFFF,
    }

    def value(word):
        if word.startswith(("0f", "0x")):
            return int(word[2:], 16)
        return int(word) if word.isdigit() else registers[word]

    for line in asm.strip("{}").split(";"):
        if line.strip() and not line.strip().startswith(".reg"):
            name, arguments = line.split(maxsplit=1)
            target, *words = arguments.split(",")
            name = re.sub(r"^cvt\.rn\..*", "cvt.rn", name)
            registers[target] = operations[name](*map(value, words))
    return registers


@pytest.mark.parametrize("half", HALVES)
def test_a_word_of_eight_weights(half):
    dtype, asm, chance = HALVES[half], lookup_asm(half), random.Random(0)
    words = [0x01234567, 0x89ABCDEF, *(chance.getrandbits(32) for _ in range(60))]
    for word in words:
        scale = torch.tensor(chance.gauss(0, 0.02), dtype=torch.float32)
        out = emulate(asm, {"$4": word, "$5": bits(scale.item(), torch.float32)}, dtype)
        got = [
            half_word for i in range(4) for half_word in (out[f"${i}"] & 0xFFFF, out[f"${i}"] >> 16)
        ]
        codes = [n for byte in word.to_bytes(4, "little") for n in (byte >> 4, byte & 15)]
        want = [bits((torch.tensor(CODE[n]) * scale).item(), dtype) for n in codes]
        assert got == want, hex(word)
