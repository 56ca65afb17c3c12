"""Attention to keys kept before rotary embedding in several blocks or few bits, as `rebuilt.py`.

    K = sum over blocks ((u s_c + z_c) s_b) w + sum_r (u s_c + z_c) z_b     tiles of tokens, by halves of rotated dims
    partial[split] = softmax(scale q K'^T) u_v                              K' rotated by the angles of its token

Basis levels `w` are exact in half precision, so that what is multiplied is rounded once more only: the coefficients,
with the scales of their components. One program takes the query rows of one KV head and a range of tokens, or of tail
rows; results are those of `tokens_coded.py`.
"""

import triton
import triton.language as tl

from attnpack_fx.kernels.triton.codes import load_levels, load_scale
from attnpack_fx.kernels.triton.forms import pick
from attnpack_fx.kernels.triton.launch import VARYING
from attnpack_fx.kernels.triton.rebuilt import turns
from attnpack_fx.kernels.triton.softmax import attend_rows, load_query, masked, step, store_partial, store_scores
from attnpack_fx.kernels.triton.tokens_coded import add_values, no_values, store_values


@triton.jit(do_not_specialize=VARYING)
def rebuilt_coded_kernel(
    query,
    key0,  # [B, n, w] of each block
    key1,
    key2,
    key3,
    basis0,  # [B or 1, H, r, w]
    basis1,
    basis2,
    basis3,
    scale0,  # [B, 2 or 4, r] fp32
    scale1,
    scale2,
    scale3,
    value0,
    value1,
    value2,
    value3,
    cos,  # [B or 1, P, E / 2]
    sin,
    axes,  # [B or 1, A, N] int64, with AXES
    key_tail,  # [rows, B, H, D]
    value_tail,
    latent,  # [splits, B, Hq * Tq, VALUE_WIDTH] fp32
    shares,  # [splits, blocks of values, B, Hq * Tq] fp32
    latent_sums,
    partial,  # [tail splits, B, Hq * Tq, Dv] fp32
    partial_sums,
    scores_out,  # [B, Hq, packed + length] fp32
    index,  # [B, slots] int64
    mask,
    heads,
    group,
    queries,
    dim,
    value_dim,
    key_count0,  # tokens that each block covers
    key_count1,
    key_count2,
    key_count3,
    value_count0,
    value_count1,
    value_count2,
    value_count3,
    first_slot0,  # of each segment
    first_slot1,
    tokens0,
    tokens1,
    splits0,
    splits,  # of all segments
    tokens_per_split,
    query_sample,
    query_head,
    query_token,
    angle_sample,
    axes_sample,
    length,
    rows_per_split,
    packed,
    slots,
    mask_sample,
    mask_head,
    mask_query,
    mask_token,
    mask_tokens,
    scale: tl.constexpr,  # a Python float, which Inductor would pass as fp64
    KEYS: tl.constexpr,  # forms of the blocks of every segment (`blocks.py`)
    VALUES: tl.constexpr,
    DIM: tl.constexpr,
    ROTATED: tl.constexpr,  # E
    AXES: tl.constexpr,  # rotary axes; 0: angles of every slot
    VALUE_WIDTH: tl.constexpr,
    VALUE_BLOCKS: tl.constexpr,
    MASK: tl.constexpr,
    CAP: tl.constexpr,
    RAGGED: tl.constexpr,
    SCORES: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,  # dims of half the rotated ones
    BLOCK_REST: tl.constexpr,  # the dims that are not rotated; 0: none
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    sample, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    samples = tl.num_programs(0) // heads
    member = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    valid = member < group * queries
    rows = head * group * queries + tl.minimum(member, group * queries - 1)  # none whose mask is not there
    all_rows = heads * group * queries
    query += sample * query_sample
    index += sample * slots
    mask += sample * mask_sample
    scores_out += sample * heads * group * (packed + length)
    split = tl.program_id(2)
    if split < splits:
        keys, key_counts = (key0, key1, key2, key3), (key_count0, key_count1, key_count2, key_count3)
        bases, scales = (basis0, basis1, basis2, basis3), (scale0, scale1, scale2, scale3)
        values, value_counts = (
            (value0, value1, value2, value3),
            (value_count0, value_count1, value_count2, value_count3),
        )
        angles = (cos + sample * angle_sample, sin + sample * angle_sample, axes + sample * axes_sample)
        starts = query + (rows // queries).to(tl.int64) * query_head + (rows % queries).to(tl.int64) * query_token
        if len(KEYS) == 1 or split < splits0:
            attend_rebuilt(
                starts, valid, keys, key_counts, bases, scales, values, value_counts, angles, latent, shares,
                latent_sums, scores_out, index, mask, first_slot0, tokens0, split, split, tokens_per_split,
                sample, samples, head, heads, rows, all_rows, queries, packed, length,
                mask_head, mask_query, mask_token, scale, pick(KEYS, 0), pick(VALUES, 0), DIM, ROTATED, AXES,
                VALUE_WIDTH, VALUE_BLOCKS, MASK, CAP, RAGGED, SCORES, BLOCK_G, BLOCK_N, BLOCK_E, BLOCK_REST,
            )  # fmt: skip
        elif len(KEYS) == 2:
            attend_rebuilt(
                starts, valid, keys, key_counts, bases, scales, values, value_counts, angles, latent, shares,
                latent_sums, scores_out, index, mask, first_slot1, tokens1, split, split - splits0, tokens_per_split,
                sample, samples, head, heads, rows, all_rows, queries, packed, length,
                mask_head, mask_query, mask_token, scale, pick(KEYS, 1), pick(VALUES, 1), DIM, ROTATED, AXES,
                VALUE_WIDTH, VALUE_BLOCKS, MASK, CAP, RAGGED, SCORES, BLOCK_G, BLOCK_N, BLOCK_E, BLOCK_REST,
            )  # fmt: skip
    else:
        q = load_query(query, rows, valid, queries, query_head, query_token, dim, BLOCK_D)
        first = (split - splits) * rows_per_split
        top = tl.full([BLOCK_G], float("-inf"), tl.float32)
        total = tl.full([BLOCK_G], 0.0, tl.float32)
        out = tl.full([BLOCK_G, BLOCK_DV], 0.0, tl.float32)
        top, total, out = attend_rows(
            q, rows, valid, top, total, out,
            key_tail + (sample * heads + head) * dim, value_tail + (sample * heads + head) * value_dim,
            samples * heads * dim, samples * heads * value_dim, dim, value_dim,
            first, tl.minimum(first + rows_per_split, length), length, scale, index, packed, slots,
            mask, mask_head, mask_query, mask_token, mask_tokens, queries, scores_out,
            MASK, CAP, RAGGED, SCORES, BLOCK_ROWS, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
        place = ((split - splits) * samples + sample) * all_rows + rows
        store_partial(partial, partial_sums, out, top, total, place, valid, value_dim, BLOCK_DV)


@triton.jit
def attend_rebuilt(
    starts, valid, keys, key_counts, bases, scales, values, value_counts, angles, latent, shares, latent_sums,
    scores_out, index, mask, first_slot, tokens, split, inner, tokens_per_split, sample, samples, head, heads, rows,
    all_rows, queries, packed, length, mask_head, mask_query, mask_token, scale,
    KEYS: tl.constexpr, VALUES: tl.constexpr, DIM: tl.constexpr, ROTATED: tl.constexpr, AXES: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, VALUE_BLOCKS: tl.constexpr, MASK: tl.constexpr, CAP: tl.constexpr, RAGGED: tl.constexpr,
    SCORES: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Attention to one range of one segment's tokens: writes its partial result."""
    HALF: tl.constexpr = ROTATED // 2
    dims = tl.arange(0, BLOCK_E)
    turning = (dims < HALF)[None, :]
    q_a = tl.load(starts[:, None] + dims[None, :], mask=valid[:, None] & turning, other=0)
    q_b = tl.load(starts[:, None] + HALF + dims[None, :], mask=valid[:, None] & turning, other=0)
    if BLOCK_REST > 0:
        others = ROTATED + tl.arange(0, BLOCK_REST)
        q_rest = tl.load(starts[:, None] + others[None, :], mask=valid[:, None] & (others < DIM)[None, :], other=0)
    top = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.full([BLOCK_G], 0.0, tl.float32)
    out, held = no_values(VALUES, BLOCK_G)
    begin = inner * tokens_per_split
    for start in range(begin, tl.minimum(begin + tokens_per_split, tokens), BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        there = token < tokens
        k_a, shift = rebuilt(
            keys, key_counts, bases, scales, token, sample, head, heads, q_a.dtype, KEYS, 0, HALF, BLOCK_N, BLOCK_E,
        )  # fmt: skip
        k_b, _ = rebuilt(
            keys, key_counts, bases, scales, token, sample, head, heads, q_a.dtype, KEYS, HALF, ROTATED, BLOCK_N,
            BLOCK_E,
        )  # fmt: skip
        k_a, k_b = k_a + shift[:, None], k_b + shift[:, None]
        cos, sin = turns(angles, first_slot + token, there, dims, packed, HALF, AXES)
        turned_a, turned_b = k_a * cos - k_b * sin, k_b * cos + k_a * sin
        scores = tl.dot(q_a, tl.trans(turned_a.to(q_a.dtype)), input_precision="ieee")
        scores += tl.dot(q_b, tl.trans(turned_b.to(q_b.dtype)), input_precision="ieee")
        if BLOCK_REST > 0:
            k_rest, _ = rebuilt(
                keys, key_counts, bases, scales, token, sample, head, heads, q_a.dtype, KEYS, ROTATED, DIM, BLOCK_N,
                BLOCK_REST,
            )  # fmt: skip
            k_rest += shift[:, None]
            scores += tl.dot(q_rest, tl.trans(k_rest.to(q_rest.dtype)), input_precision="ieee")
        scores *= scale
        column = token.to(tl.int64)
        if RAGGED or MASK != 0:
            column = tl.load(index + first_slot + token, mask=there, other=0)
        scores = masked(
            scores, rows, there, column, queries, mask, mask_head, mask_query, mask_token, MASK, CAP, RAGGED
        )
        if SCORES:
            store_scores(scores_out, scores, rows, valid, queries, first_slot + token, there, packed + length)
        weights, top, total, shrink = step(scores, top, total)
        out, held = add_values(out, held, values, value_counts, weights, shrink, token, sample, q_a.dtype, VALUES)
    store_values(
        latent, shares, latent_sums, out, held, top, total, split, sample, samples, rows, valid, all_rows,
        VALUES, VALUE_WIDTH, VALUE_BLOCKS,
    )  # fmt: skip


@triton.jit
def rebuilt(
    keys, counts, bases, scales, token, sample, head, heads, dtype: tl.constexpr, KEYS: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Dims FIRST .. LAST - 1 of keys `[N, BLOCK]` fp32, and what zero points of the basis add to every dim `[N]`."""
    k = tl.full([BLOCK_N, BLOCK], 0.0, tl.float32)
    shift = tl.full([BLOCK_N], 0.0, tl.float32)
    for block in tl.static_range(len(KEYS)):
        for part in tl.static_range(pick(KEYS, block, 8)):
            k, shift = add_part(
                k, shift, keys, counts, bases, scales, token, sample, head, heads, dtype, pick(KEYS, block), part,
                FIRST, LAST, BLOCK,
            )  # fmt: skip
    return k, shift


@triton.jit
def add_part(
    k, shift, keys, counts, bases, scales, token, sample, head, heads, dtype: tl.constexpr, FORM: tl.constexpr,
    part: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """k and shift with some ranks of one block added."""
    NUMBER: tl.constexpr = FORM[0]
    BITS: tl.constexpr = FORM[1]
    BASIS_BITS: tl.constexpr = FORM[2]
    ASYMMETRIC: tl.constexpr = FORM[3]
    RANK: tl.constexpr = FORM[4]
    RANKS: tl.constexpr = FORM[5] // FORM[8]
    STEP: tl.constexpr = FORM[9]
    BASIS_STEP: tl.constexpr = FORM[11]
    rank = part * RANKS + tl.arange(0, RANKS)
    reached = token < counts[NUMBER]
    coded = keys[NUMBER] + sample * counts[NUMBER] * STEP
    c = load_levels(coded, token, reached, part * RANKS, RANK, RANKS, STEP, BITS, not ASYMMETRIC)
    if BITS != 0 or BASIS_BITS != 0:
        LINES: tl.constexpr = 4 if ASYMMETRIC else 2
        lines = scales[NUMBER] + sample * LINES * RANK
        c = c.to(tl.float32) * load_scale(lines, 0, rank, RANK, BITS)[None, :]
        if ASYMMETRIC:
            c += load_scale(lines, 2, rank, RANK, 0)[None, :]
        c = tl.where(reached[:, None], c, 0.0)
        if ASYMMETRIC:
            shift += tl.sum(c * load_scale(lines, 3, rank, RANK, 0)[None, :], 1)
        c *= load_scale(lines, 1, rank, RANK, BASIS_BITS)[None, :]
    owner = head if FORM[10] else sample * heads + head
    tile = load_levels(
        bases[NUMBER] + owner * RANK * BASIS_STEP, rank, rank < RANK, FIRST, LAST, BLOCK, BASIS_STEP, BASIS_BITS,
        not ASYMMETRIC,
    )  # fmt: skip
    return k + tl.dot(c.to(dtype), tile.to(dtype), input_precision="ieee"), shift
