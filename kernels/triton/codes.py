"""Codes as numbers, in registers: what a byte of a packed factor or row stands for (`kernels/parts.py`).

Levels of fields are exact in fp16 and bf16. So are those of 8-bit floats over `FLOAT_UNIT`: the fields of E4M3, put
where fp16 has its own, mean that anyway, and E5M2 is the upper half of fp16. No instruction for such floats is needed,
which came with compute capability 8.9.
"""

import triton
import triton.language as tl

from attnpack_fx.kernels import parts

E4M3 = tl.constexpr(parts.E4M3)
#: What levels of 8-bit floats are divided by.
FLOAT_UNIT = tl.constexpr(256.0)


@triton.jit
def load_codes(
    codes,  # of row 0
    row,  # [N]
    there,  # [N] rows that exist
    first,  # column to begin with, a multiple of 16
    SIZE: tl.constexpr,  # numbers in a row
    BLOCK: tl.constexpr,  # numbers to load
    STEP: tl.constexpr,  # elements from one row to the next
    BITS: tl.constexpr,
):
    """Bytes of codes `[N, w]`, or with 0 bits numbers `[N, BLOCK]`; zero beyond SIZE and in other rows."""
    TOGETHER: tl.constexpr = 1 if BITS == 0 or BITS >= 8 else 8 // BITS
    column = first // TOGETHER + tl.arange(0, BLOCK // TOGETHER)
    inside = there[:, None] & (column < (SIZE + TOGETHER - 1) // TOGETHER)[None, :]
    return tl.load(codes + row[:, None] * STEP + column[None, :], mask=inside, other=0)


@triton.jit
def load_levels(
    codes, row, there, first, SIZE: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, BITS: tl.constexpr,
    SIGNED: tl.constexpr,
):  # fmt: skip
    """Levels `[N, BLOCK]` in fp32, or with 0 bits the numbers as they are. Beyond SIZE and in other rows: finite."""
    found = load_codes(codes, row, there, first, SIZE, BLOCK, STEP, BITS)
    if BITS != 0:
        found = levels(found, BITS, SIGNED)
    return found


@triton.jit
def levels(codes, BITS: tl.constexpr, SIGNED: tl.constexpr):
    """Bytes `[N, w]` as levels fp32 `[N, w * 8 / BITS]`."""
    if BITS > 8:
        if BITS == E4M3:
            placed = ((codes & 0x80).to(tl.uint16) << 8) | ((codes & 0x7F).to(tl.uint16) << 7)
            found = placed.to(tl.float16, bitcast=True).to(tl.float32)
        else:
            found = (codes.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32) / FLOAT_UNIT
    elif SIGNED:
        HALF: tl.constexpr = 1 << (BITS - 1)
        # Two's complement, and half a level more where there are four.
        found = (fields(codes, BITS) ^ HALF).to(tl.float32) - (HALF - 0.5 if BITS == 2 else HALF)
    else:
        found = fields(codes, BITS).to(tl.float32)
    return found


@triton.jit
def fields(codes, BITS: tl.constexpr):
    """Bytes `[N, w]` as unsigned fields uint8 `[N, w * 8 / BITS]`, the first in the low bits."""
    if BITS == 4:
        found = tl.interleave(codes & 15, codes >> 4)
    elif BITS == 2:
        even, odd = tl.interleave(codes & 3, (codes >> 4) & 3), tl.interleave((codes >> 2) & 3, codes >> 6)
        found = tl.interleave(even, odd)
    else:
        found = codes
    return found


@triton.jit
def load_scale(scale, line, number, RANK: tl.constexpr, BITS: tl.constexpr):
    """What levels of components are multiplied by: one line of `[2 or 4, r]`, zero from the rank on."""
    found = tl.load(scale + line * RANK + number, mask=number < RANK, other=0)
    if BITS > 8:
        found *= FLOAT_UNIT
    return found
