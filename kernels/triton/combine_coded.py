"""Partial results merged, and those on coded values expanded by their coded bases, as `combine.py`.

    m = sum_i w_i latent_i             levels of coefficients, weighted        P = sum_i w_i share_i
    c = m s_c + P z_c                  coefficients, weighted (scales and zero points of a component)
    out += (c s_b) w + sum_r c z_b     basis w s_b + z_b

One program takes the query rows of one KV head and `BLOCK_D` dims of the result.
"""

import triton
import triton.language as tl

from attnpack_fx.kernels.triton.codes import load_levels, load_scale
from attnpack_fx.kernels.triton.combine import highest, weighted_sum
from attnpack_fx.kernels.triton.forms import pick
from attnpack_fx.kernels.triton.launch import VARYING
from attnpack_fx.kernels.triton.softmax import load_sinks


@triton.jit(do_not_specialize=VARYING)
def combine_coded_kernel(
    latent,  # [splits0 + splits1, B, Hq * Tq, VALUE_WIDTH] fp32
    shares,  # [splits0 + splits1, blocks of values, B, Hq * Tq] fp32
    latent_sums,  # [splits0 + splits1, B, Hq * Tq] fp32
    partial,  # [dense_splits, B, Hq * Tq, Dv] fp32
    partial_sums,
    basis0,  # [B or 1, H, r, w] of each block
    basis1,
    basis2,
    basis3,
    scale0,  # [B, 2 or 4, r] fp32
    scale1,
    scale2,
    scale3,
    out,  # [B, Hq, Tq, Dv]
    log_sums,  # [B, Hq * Tq] fp32, of all tokens
    heads,
    members,  # query rows of a KV head
    queries,
    splits0,
    splits1,
    dense_splits,
    sinks,  # [B or 1, Hq]
    sink_sample,
    VALUES: tl.constexpr,  # forms of the blocks of every segment (`blocks.py`)
    DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    VALUE_BLOCKS: tl.constexpr,
    SUMS: tl.constexpr,  # whether log_sums is written
    SINKS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    sample, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    samples = tl.num_programs(0) // heads
    member = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    valid = member < members
    rows = sample * heads * members + head * members + member
    all_rows = samples.to(tl.int64) * heads * members
    first = tl.program_id(2) * BLOCK_D
    columns = first + tl.arange(0, BLOCK_D)
    bases, scales = (basis0, basis1, basis2, basis3), (scale0, scale1, scale2, scale3)
    top = tl.full([BLOCK_G], float("-inf"), tl.float32)
    if len(VALUES) > 0:
        top = highest(latent_sums, splits0 + splits1, rows, valid, all_rows, top, BLOCK_S)
    top = highest(partial_sums, dense_splits, rows, valid, all_rows, top, BLOCK_S)
    total = tl.full([BLOCK_G], 0.0, tl.float32)
    if SINKS:
        sink = load_sinks(sinks + sample * sink_sample, head * members + member, valid, queries)
        top = tl.maximum(top, sink)
        total = tl.exp(sink - top)
    top = tl.where(top == float("-inf"), 0.0, top)
    acc = tl.full([BLOCK_G, BLOCK_D], 0.0, tl.float32)
    total, acc = weighted_sum(
        partial, partial_sums, 0, dense_splits, rows, valid, all_rows, columns, DIM, top, total, acc, BLOCK_S
    )
    for segment in tl.static_range(len(VALUES)):
        begin, end = (0, splits0) if segment == 0 else (splits0, splits0 + splits1)
        for block in tl.static_range(len(pick(VALUES, segment))):
            weight, acc = expanded(
                latent, shares, latent_sums, begin, end, rows, valid, all_rows, top, acc, out, bases, scales, sample,
                head, heads, first, block, pick(VALUES, segment, block), DIM, VALUE_WIDTH, VALUE_BLOCKS,
                BLOCK_G, BLOCK_S, BLOCK_D,
            )  # fmt: skip
            if block == 0:
                total += weight
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    cells = out + rows[:, None] * DIM + columns[None, :]
    tl.store(cells, acc.to(out.dtype.element_ty), mask=valid[:, None] & (columns < DIM)[None, :])
    if SUMS:
        merged = tl.where(total > 0, top + tl.log(tl.where(total > 0, total, 1.0)), float("-inf"))
        if tl.program_id(2) == 0:
            tl.store(log_sums + rows, merged, mask=valid)


@triton.jit
def expanded(
    latent, shares, sums, begin, end, rows, valid, all_rows, top, acc, like, bases, scales, sample, head, heads,
    first, block: tl.constexpr, FORM: tl.constexpr, DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    VALUE_BLOCKS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The weight of splits begin .. end - 1, and acc with one block of their values added."""
    NUMBER: tl.constexpr = FORM[0]
    BITS: tl.constexpr = FORM[1]
    BASIS_BITS: tl.constexpr = FORM[2]
    ASYMMETRIC: tl.constexpr = FORM[3]
    RANK: tl.constexpr = FORM[4]
    BLOCK: tl.constexpr = FORM[5]
    START: tl.constexpr = FORM[6]
    STEP: tl.constexpr = FORM[11]
    number = tl.arange(0, BLOCK)
    total = tl.full([BLOCK_G], 0.0, tl.float32)
    mixed = tl.full([BLOCK_G, BLOCK], 0.0, tl.float32)
    total, mixed = weighted_sum(
        latent + START, sums, begin, end, rows, valid, all_rows, number, VALUE_WIDTH, top, total, mixed, BLOCK_S
    )
    if BITS != 0 or BASIS_BITS != 0:
        LINES: tl.constexpr = 4 if ASYMMETRIC else 2
        lines = scales[NUMBER] + sample * LINES * RANK
        mixed *= load_scale(lines, 0, number, RANK, BITS)[None, :]
        if ASYMMETRIC:
            share = covered(shares, sums, begin, end, rows, valid, all_rows, top, block, VALUE_BLOCKS, BLOCK_G, BLOCK_S)
            mixed += share[:, None] * load_scale(lines, 2, number, RANK, 0)[None, :]
            acc += tl.sum(mixed * load_scale(lines, 3, number, RANK, 0)[None, :], 1)[:, None]
        mixed *= load_scale(lines, 1, number, RANK, BASIS_BITS)[None, :]
    owner = head if FORM[10] else sample * heads + head
    tile = load_levels(
        bases[NUMBER] + owner * RANK * STEP, number, number < RANK, first, DIM, BLOCK_D, STEP, BASIS_BITS,
        not ASYMMETRIC,
    )  # fmt: skip
    if BLOCK_G < 16:  # too few rows for tensor cores
        acc += tl.sum(mixed[:, :, None] * tile.to(tl.float32)[None, :, :], 1)
    else:
        dtype: tl.constexpr = like.dtype.element_ty
        acc += tl.dot(mixed.to(dtype), tile.to(dtype), input_precision="ieee")
    return total, acc


@triton.jit
def covered(
    shares, sums, begin, end, rows, valid, all_rows, top,
    block: tl.constexpr, VALUE_BLOCKS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """How much of the weight of splits begin .. end - 1 is on tokens that a block of values covers, `[G]`."""
    share = tl.full([BLOCK_G], 0.0, tl.float32)
    for first in range(begin, end, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        there = (split < end)[:, None] & valid[None, :]
        weight = tl.load(sums + split[:, None] * all_rows + rows[None, :], mask=there, other=float("-inf"))
        line = split * VALUE_BLOCKS + block
        held = tl.load(shares + line[:, None] * all_rows + rows[None, :], mask=there, other=0)
        share += tl.sum(tl.exp(weight - top[None, :]) * held, 0)
    return share
