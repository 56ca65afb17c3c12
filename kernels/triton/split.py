"""Attention to packed keys stored before rotary embedding, split by rotary axis: no key is rebuilt.

    scores[m, t] = sum over axes a and ranks r of  C_k[t, r] tables[axes[a, t], m, r]        see `tables.py`
    partial[split] = softmax(scores) C_v           `[splits, B, Hq * Tq, BLOCK_V]`, see `combine.py`

One program takes a range of tokens for `BLOCK_M` query rows of a sample. Rows of the tables come from L2, `BLOCK_K`
ranks of a tile of tokens at a time.
"""

import triton
import triton.language as tl

from attnpack_fx.kernels.triton.launch import VARYING
from attnpack_fx.kernels.triton.softmax import masked, step, store_partial, store_scores


@triton.jit(do_not_specialize=VARYING)
def split_kernel(
    tables,  # [S, B, P, Hq * Tq, BLOCK_R]
    axes,  # [B or 1, AXES, N of all segments] int64
    key0,  # coefficients [B, N, R]
    key1,
    value0,
    value1,
    partial,
    log_sums,  # [splits, B, Hq * Tq] fp32
    scores_out,  # [B, Hq, all_slots] fp32
    index,  # [B, slots] int64
    mask,
    tokens0,
    tokens1,
    key_rank0,
    key_rank1,
    value_rank0,
    value_rank1,
    splits0,
    tokens_per_split,
    positions,  # P
    axes_sample,
    packed,
    all_rows,  # Hq * Tq
    queries,
    slots,
    all_slots,
    mask_sample,
    mask_head,
    mask_query,
    mask_token,
    SEGMENTS: tl.constexpr,
    AXES: tl.constexpr,
    MASK: tl.constexpr,
    CAP: tl.constexpr,
    RAGGED: tl.constexpr,
    SCORES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    split, sample, samples = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    rows = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = rows < all_rows
    rows = tl.minimum(rows, all_rows - 1)  # none whose mask is not there
    second = (split >= splits0) & (SEGMENTS == 2)
    key, value = tl.where(second, key1, key0), tl.where(second, value1, value0)
    tokens = tl.where(second, tokens1, tokens0)
    key_rank, value_rank = tl.where(second, key_rank1, key_rank0), tl.where(second, value_rank1, value_rank0)
    first_slot, inner = tl.where(second, tokens0, 0), tl.where(second, split - splits0, split)
    segment = tl.where(second, 1, 0)
    key += sample * tokens * key_rank
    value += sample * tokens * value_rank
    index += sample * slots + first_slot
    mask += sample * mask_sample
    scores_out += sample * (all_rows // queries) * all_slots
    axes += sample * axes_sample + first_slot
    tables += (segment * samples + sample) * positions * all_rows * BLOCK_R
    ranks, value_ranks = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.full([BLOCK_M], 0.0, tl.float32)
    out = tl.full([BLOCK_M, BLOCK_V], 0.0, tl.float32)
    begin = inner * tokens_per_split
    end = tl.minimum(begin + tokens_per_split, tokens)
    for start in range(begin, end, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        there = token < end
        scores = tl.full([BLOCK_M, BLOCK_N], 0.0, tl.float32)
        for number in range(BLOCK_R // BLOCK_K):
            rank = number * BLOCK_K + ranks
            c = tl.load(
                key + token[:, None] * key_rank + rank[None, :],
                mask=there[:, None] & (rank < key_rank)[None, :],
                other=0,
            ).to(tl.float32)
            for axis in tl.static_range(AXES):
                position = tl.load(axes + axis * packed + token, mask=there, other=0).to(tl.int32)
                row = position[None, :] * all_rows + rows[:, None]
                latent = tl.load(
                    tables + row[:, :, None] * BLOCK_R + rank[None, None, :],
                    mask=(valid[:, None] & there[None, :])[:, :, None],
                    other=0,
                )
                scores += tl.sum(latent.to(tl.float32) * c[None, :, :], 2)
        column = token.to(tl.int64)
        if RAGGED or MASK != 0:
            column = tl.load(index + token, mask=there, other=0)
        scores = masked(
            scores, rows, there, column, queries, mask, mask_head, mask_query, mask_token, MASK, CAP, RAGGED
        )
        if SCORES:
            store_scores(scores_out, scores, rows, valid, queries, first_slot + token, there, all_slots)
        weights, top, total, shrink = step(scores, top, total)
        c = tl.load(
            value + token[:, None] * value_rank + value_ranks[None, :],
            mask=there[:, None] & (value_ranks < value_rank)[None, :],
            other=0,
        )
        out = out * shrink[:, None] + tl.dot(weights.to(c.dtype), c, input_precision="ieee")
    place = (split * samples + sample) * all_rows + rows
    store_partial(partial, log_sums, out, top, total, place, valid, BLOCK_V, BLOCK_V)
