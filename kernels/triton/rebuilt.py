"""Attention to keys kept before rotary embedding: key tiles are rebuilt, rotated, scored and thrown away on chip.

    K = C_k B_k,h                  tensor cores, `[tokens, E / 2]` per half of the rotated dims
    K' = rotated by cos, sin       of each token: a' = a cos - b sin,  b' = b cos + a sin
    partial[split] = softmax(scale q K'^T) C_v           latent, see `combine.py`

The pairs `(a, b)` are dims `(i, i + E / 2)`, or `(2 i, 2 i + 1)` when interleaved; dims from E on are not rotated. One
program takes the query rows of one KV head and a range of tokens, or a range of tail rows.
"""

import triton
import triton.language as tl

from attnpack_fx.kernels.triton.launch import VARYING
from attnpack_fx.kernels.triton.softmax import attend_rows, load_query, masked, step, store_partial, store_scores


@triton.jit(do_not_specialize=VARYING)
def rebuilt_kernel(
    query,
    key0,  # coefficients [B, N, R]
    key1,
    basis0,  # [B, H, R, D]
    basis1,
    value0,
    value1,
    cos,  # [B or 1, N of all segments, E / 2]
    sin,
    key_tail,  # [rows, B, H, D]
    value_tail,
    latent,  # [splits0 + splits1, B, Hq * Tq, BLOCK_V] fp32
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
    rotated,  # E
    tokens0,
    tokens1,
    key_rank0,
    key_rank1,
    value_rank0,
    value_rank1,
    splits0,
    splits,  # of all segments
    tokens_per_split,
    query_sample,
    query_head,
    query_token,
    angle_sample,
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
    SEGMENTS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    MASK: tl.constexpr,
    CAP: tl.constexpr,
    RAGGED: tl.constexpr,
    SCORES: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_BASIS: tl.constexpr,  # ranks of one step of the rebuilding product
    STEPS: tl.constexpr,  # such steps for the largest rank
    BLOCK_V: tl.constexpr,
    BLOCK_E: tl.constexpr,  # dims of half the rotated ones
    BLOCK_REST: tl.constexpr,  # the dims that are not rotated; 0: none
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
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
    top = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.full([BLOCK_G], 0.0, tl.float32)
    if split < splits:
        second = (split >= splits0) & (SEGMENTS == 2)
        key, value, basis = (
            tl.where(second, key1, key0),
            tl.where(second, value1, value0),
            tl.where(second, basis1, basis0),
        )
        tokens, first_slot = tl.where(second, tokens1, tokens0), tl.where(second, tokens0, 0)
        key_rank, value_rank = tl.where(second, key_rank1, key_rank0), tl.where(second, value_rank1, value_rank0)
        begin = tl.where(second, split - splits0, split) * tokens_per_split
        end = tl.minimum(begin + tokens_per_split, tokens)
        key += sample * tokens * key_rank
        value += sample * tokens * value_rank
        basis += (sample * heads + head) * key_rank * dim
        cos += sample * angle_sample
        sin += sample * angle_sample
        half, ranks, value_ranks = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_BASIS), tl.arange(0, BLOCK_V)
        turning = half < rotated // 2
        if INTERLEAVED:
            dims_a, dims_b = 2 * half, 2 * half + 1
        else:
            dims_a, dims_b = half, half + rotated // 2
        q_rows = (
            query + ((rows // queries).to(tl.int64) * query_head + (rows % queries).to(tl.int64) * query_token)[:, None]
        )
        q_a = tl.load(q_rows + dims_a[None, :], mask=valid[:, None] & turning[None, :], other=0)
        q_b = tl.load(q_rows + dims_b[None, :], mask=valid[:, None] & turning[None, :], other=0)
        if BLOCK_REST > 0:
            dims_rest = rotated + tl.arange(0, BLOCK_REST)
            q_rest = tl.load(q_rows + dims_rest[None, :], mask=valid[:, None] & (dims_rest < dim)[None, :], other=0)
        out = tl.full([BLOCK_G, BLOCK_V], 0.0, tl.float32)
        for start in range(begin, end, BLOCK_N):
            token = start + tl.arange(0, BLOCK_N)
            there = token < end
            k_a = tl.full([BLOCK_N, BLOCK_E], 0.0, tl.float32)
            k_b = tl.full([BLOCK_N, BLOCK_E], 0.0, tl.float32)
            if BLOCK_REST > 0:
                k_rest = tl.full([BLOCK_N, BLOCK_REST], 0.0, tl.float32)
            for number in tl.static_range(STEPS):
                rank = number * BLOCK_BASIS + ranks
                c = tl.load(
                    key + token[:, None] * key_rank + rank[None, :],
                    mask=there[:, None] & (rank < key_rank)[None, :],
                    other=0,
                )
                within = (rank < key_rank)[:, None] & turning[None, :]
                b_a = tl.load(basis + rank[:, None] * dim + dims_a[None, :], mask=within, other=0)
                b_b = tl.load(basis + rank[:, None] * dim + dims_b[None, :], mask=within, other=0)
                k_a += tl.dot(c, b_a, input_precision=PRECISION)
                k_b += tl.dot(c, b_b, input_precision=PRECISION)
                if BLOCK_REST > 0:
                    within = (rank < key_rank)[:, None] & (dims_rest < dim)[None, :]
                    b_rest = tl.load(basis + rank[:, None] * dim + dims_rest[None, :], mask=within, other=0)
                    k_rest += tl.dot(c, b_rest, input_precision=PRECISION)
            angle = (first_slot + token)[:, None] * (rotated // 2) + half[None, :]
            cells = there[:, None] & turning[None, :]
            c = tl.load(cos + angle, mask=cells, other=0).to(tl.float32)
            s = tl.load(sin + angle, mask=cells, other=0).to(tl.float32)
            turned_a, turned_b = k_a * c - k_b * s, k_b * c + k_a * s
            scores = tl.dot(q_a, tl.trans(turned_a.to(q_a.dtype)), input_precision=PRECISION)
            scores += tl.dot(q_b, tl.trans(turned_b.to(q_b.dtype)), input_precision=PRECISION)
            if BLOCK_REST > 0:
                scores += tl.dot(q_rest, tl.trans(k_rest.to(q_rest.dtype)), input_precision=PRECISION)
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
            c = tl.load(
                value + token[:, None] * value_rank + value_ranks[None, :],
                mask=there[:, None] & (value_ranks < value_rank)[None, :],
                other=0,
            )
            out = out * shrink[:, None] + tl.dot(weights.to(c.dtype), c, input_precision=PRECISION)
        place = (split * samples + sample) * all_rows + rows
        store_partial(latent, latent_sums, out, top, total, place, valid, BLOCK_V, BLOCK_V)
    else:
        q = load_query(query, rows, valid, queries, query_head, query_token, dim, BLOCK_D)
        first = (split - splits) * rows_per_split
        acc = tl.full([BLOCK_G, BLOCK_DV], 0.0, tl.float32)
        top, total, acc = attend_rows(
            q, rows, valid, top, total, acc,
            key_tail + (sample * heads + head) * dim, value_tail + (sample * heads + head) * value_dim,
            samples * heads * dim, samples * heads * value_dim, dim, value_dim,
            first, tl.minimum(first + rows_per_split, length), length, scale, index, packed, slots,
            mask, mask_head, mask_query, mask_token, mask_tokens, queries, scores_out,
            MASK, CAP, RAGGED, SCORES, BLOCK_ROWS, BLOCK_D, BLOCK_DV, PRECISION,
        )  # fmt: skip
        place = ((split - splits) * samples + sample) * all_rows + rows
        store_partial(partial, partial_sums, acc, top, total, place, valid, value_dim, BLOCK_DV)
