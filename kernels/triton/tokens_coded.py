"""Attention to coded coefficients by latent queries, as `tokens.py` for segments of several blocks in any format.

    scores = sum over blocks (latent u_k^T + shift)      partial[split] = softmax(scores) u_v, of each block of values

A block that covers only a segment's first tokens adds nothing to the scores of the others, and gets no weight from
them. What levels `u` have to be multiplied by is in the latent queries already, and done to `partial` by
`combine_coded.py`; `shares[split]` is the weight of the tokens that a block of values covers, which its zero points
are multiplied by.
"""

import triton
import triton.language as tl

from attnpack_fx.kernels.triton.codes import load_levels
from attnpack_fx.kernels.triton.forms import pick
from attnpack_fx.kernels.triton.launch import VARYING
from attnpack_fx.kernels.triton.softmax import log_sum, masked, step, store_scores


@triton.jit(do_not_specialize=VARYING)
def tokens_coded_kernel(
    latent,  # [B, Hq * Tq, KEY_WIDTH]
    shift,  # [parts, B, Hq * Tq] fp32
    key0,  # [B, n, w] of each block
    key1,
    key2,
    key3,
    value0,
    value1,
    value2,
    value3,
    partial,  # [splits, B, Hq * Tq, VALUE_WIDTH] fp32
    shares,  # [splits, blocks of values, B, Hq * Tq] fp32
    log_sums,  # [splits, B, Hq * Tq] fp32
    scores_out,  # [B, Hq, all_slots] fp32
    index,  # [B, slots] int64
    mask,
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
    tokens_per_split,
    all_rows,  # Hq * Tq
    queries,
    slots,
    all_slots,
    mask_sample,
    mask_head,
    mask_query,
    mask_token,
    KEYS: tl.constexpr,  # forms of the blocks of every segment (`blocks.py`)
    VALUES: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    VALUE_BLOCKS: tl.constexpr,
    MASK: tl.constexpr,
    CAP: tl.constexpr,
    RAGGED: tl.constexpr,
    SCORES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    split, sample, samples = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    rows = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    keys, values = (key0, key1, key2, key3), (value0, value1, value2, value3)
    key_counts = (key_count0, key_count1, key_count2, key_count3)
    value_counts = (value_count0, value_count1, value_count2, value_count3)
    index += sample * slots
    mask += sample * mask_sample
    scores_out += sample * (all_rows // queries) * all_slots
    if len(KEYS) == 1 or split < splits0:
        attend_blocks(
            latent, shift, keys, values, partial, shares, log_sums, scores_out, index, mask, key_counts, value_counts,
            first_slot0, tokens0, split, split, tokens_per_split, sample, samples, rows, all_rows, queries, all_slots,
            mask_head, mask_query, mask_token, pick(KEYS, 0), pick(VALUES, 0), KEY_WIDTH, VALUE_WIDTH, VALUE_BLOCKS,
            MASK, CAP, RAGGED, SCORES, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    elif len(KEYS) == 2:
        attend_blocks(
            latent, shift, keys, values, partial, shares, log_sums, scores_out, index, mask, key_counts, value_counts,
            first_slot1, tokens1, split, split - splits0, tokens_per_split, sample, samples, rows, all_rows, queries,
            all_slots, mask_head, mask_query, mask_token, pick(KEYS, 1), pick(VALUES, 1), KEY_WIDTH, VALUE_WIDTH,
            VALUE_BLOCKS, MASK, CAP, RAGGED, SCORES, BLOCK_M, BLOCK_N,
        )  # fmt: skip


@triton.jit
def attend_blocks(
    latent, shift, keys, values, partial, shares, log_sums, scores_out, index, mask, key_counts, value_counts,
    first_slot, tokens, split, inner, tokens_per_split, sample, samples, rows, all_rows, queries, all_slots,
    mask_head, mask_query, mask_token, KEYS: tl.constexpr, VALUES: tl.constexpr, KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, VALUE_BLOCKS: tl.constexpr, MASK: tl.constexpr, CAP: tl.constexpr, RAGGED: tl.constexpr,
    SCORES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Attention to one range of one segment's tokens: writes its partial result."""
    valid = rows < all_rows
    rows = tl.minimum(rows, all_rows - 1)  # none whose mask is not there
    q, moved = load_latent(latent, shift, rows, valid, sample, samples, all_rows, KEYS, KEY_WIDTH, BLOCK_M)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.full([BLOCK_M], 0.0, tl.float32)
    out, held = no_values(VALUES, BLOCK_M)
    begin = inner * tokens_per_split
    for start in range(begin, tl.minimum(begin + tokens_per_split, tokens), BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        there = token < tokens
        scores = block_scores(q[0], moved[0], keys, token, key_counts, sample, pick(KEYS, 0))
        for block in tl.static_range(1, len(KEYS)):
            scores += block_scores(q[block], moved[block], keys, token, key_counts, sample, pick(KEYS, block))
        column = token.to(tl.int64)
        if RAGGED or MASK != 0:
            column = tl.load(index + first_slot + token, mask=there, other=0)
        scores = masked(
            scores, rows, there, column, queries, mask, mask_head, mask_query, mask_token, MASK, CAP, RAGGED
        )
        if SCORES:
            store_scores(scores_out, scores, rows, valid, queries, first_slot + token, there, all_slots)
        weights, top, total, shrink = step(scores, top, total)
        out, held = add_values(out, held, values, value_counts, weights, shrink, token, sample, q[0].dtype, VALUES)
    store_values(
        partial, shares, log_sums, out, held, top, total, split, sample, samples, rows, valid, all_rows,
        VALUES, VALUE_WIDTH, VALUE_BLOCKS,
    )  # fmt: skip


@triton.jit
def no_values(VALUES: tl.constexpr, BLOCK_M: tl.constexpr):
    """Of each block of values, sums of its levels `[M, rank]` and of the weights of its tokens `[M]`: none yet."""
    out, held = (), ()
    for block in tl.static_range(len(VALUES)):
        out += (tl.full([BLOCK_M, pick(VALUES, block, 5)], 0.0, tl.float32),)  # type: ignore[assignment]
        held += (tl.full([BLOCK_M], 0.0, tl.float32),)  # type: ignore[assignment]
    return out, held


@triton.jit
def add_values(
    out, held, values, counts, weights, shrink, token, sample, dtype: tl.constexpr,
    VALUES: tl.constexpr,
):  # fmt: skip
    """The sums with one step's tokens added; what was summed before shrinks."""
    sums, covered = (), ()
    for block in tl.static_range(len(VALUES)):
        tile, reached = load_block(values, token, counts, sample, dtype, pick(VALUES, block))
        given = weights if block == 0 else tl.where(reached[None, :], weights, 0.0)
        product = tl.dot(given.to(dtype), tile, input_precision="ieee")
        sums += (out[block] * shrink[:, None] + product,)  # type: ignore[assignment]
        covered += (held[block] * shrink + tl.sum(given, 1) if pick(VALUES, block, 3) else held[block],)  # type: ignore[assignment]
    return sums, covered


@triton.jit
def store_values(
    partial, shares, log_sums, out, held, top, total, split, sample, samples, rows, valid, all_rows,
    VALUES: tl.constexpr, VALUE_WIDTH: tl.constexpr, VALUE_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Write the partial result of a split."""
    place = (split.to(tl.int64) * samples + sample) * all_rows + rows
    over = tl.where(total > 0, total, 1.0)
    for block in tl.static_range(len(VALUES)):
        column = pick(VALUES, block, 6) + tl.arange(0, pick(VALUES, block, 5))
        tl.store(partial + place[:, None] * VALUE_WIDTH + column[None, :], out[block] / over[:, None], valid[:, None])
        if pick(VALUES, block, 3):
            line = split.to(tl.int64) * VALUE_BLOCKS + block
            tl.store(shares + (line * samples + sample) * all_rows + rows, held[block] / over, mask=valid)
    tl.store(log_sums + place, log_sum(top, total), mask=valid)


@triton.jit
def load_latent(
    latent, shift, rows, valid, sample, samples, all_rows,
    KEYS: tl.constexpr, KEY_WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Latent queries `[M, rank]` of each block of a segment, and what is added to their scores `[M]`."""
    q, moved = (), ()
    for block in tl.static_range(len(KEYS)):
        cells = latent + (sample * all_rows + rows)[:, None] * KEY_WIDTH
        column = pick(KEYS, block, 6) + tl.arange(0, pick(KEYS, block, 5))
        q += (tl.load(cells + column[None, :], mask=valid[:, None], other=0),)  # type: ignore[assignment]
        shifted = tl.full([BLOCK_M], 0.0, tl.float32)
        if pick(KEYS, block, 3):
            for part in tl.static_range(pick(KEYS, block, 8)):
                line = (pick(KEYS, block, 7) + part) * samples + sample
                shifted += tl.load(shift + line * all_rows + rows, mask=valid, other=0)
        moved += (shifted,)  # type: ignore[assignment]
    return q, moved


@triton.jit
def block_scores(q, moved, keys, token, counts, sample, FORM: tl.constexpr):
    """Scores `[M, N]` of tokens by one block, zero where it does not cover them."""
    tile, reached = load_block(keys, token, counts, sample, q.dtype, FORM)
    scores = tl.dot(q, tl.trans(tile), input_precision="ieee") + moved[:, None]
    return tl.where(reached[None, :], scores, 0.0)


@triton.jit
def load_block(codes, token, counts, sample, dtype: tl.constexpr, FORM: tl.constexpr):
    """Levels of coefficients `[N, rank]`, and which tokens the block covers."""
    BITS: tl.constexpr = FORM[1]
    STEP: tl.constexpr = FORM[9]
    count = counts[FORM[0]]
    reached = token < count
    first = codes[FORM[0]] + sample * count * STEP
    tile = load_levels(first, token, reached, 0, FORM[4], FORM[5], STEP, BITS, not FORM[3])
    return tile.to(dtype), reached
