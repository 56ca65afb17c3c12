"""Attention to keys kept before rotary embedding: key tiles are rebuilt, rotated, scored and thrown away on chip.

    K = C_k B_k,h                  tensor cores, `[tokens, E / 2]` per half of the rotated dims
    K' = rotated by cos, sin       of each token: a' = a cos - b sin,  b' = b cos + a sin
    partial[split] = softmax(scale q K'^T) C_v           latent, see `combine.py`

The pairs `(a, b)` are dims `(i, i + E / 2)`, or `(2 i, 2 i + 1)` when interleaved; dims from E on are not rotated. One
program takes the query rows of `shared` KV heads and a range of tokens: it reads their coefficients and angles once,
and rebuilds keys head by head. Or it takes those of one KV head and a range of tail rows.

Scores are computed as columns of tokens: the rotated keys, which lie in registers as a product left them, are then the
first factor of the next product as they are, and on compute capability 9.0 both are of whole warpgroups.
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
    cos,  # [B or 1, P, E / 2]
    sin,
    axes,  # [B or 1, A, N of all segments] int64, with AXES; without, P is N
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
    shared,  # KV heads of a program; more than one only with one query position
    group,
    queries,
    dim,
    value_dim,
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
    SEGMENTS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROTATED: tl.constexpr,  # E
    AXES: tl.constexpr,  # rotary axes; 0: angles of every slot
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
    BLOCK_E: tl.constexpr,  # pairs of one step
    CHUNKS: tl.constexpr,  # such steps for all pairs
    BLOCK_REST: tl.constexpr,  # the dims that are not rotated; 0: none
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    programs = heads // shared  # of a sample
    sample, first_head = (tl.program_id(0) // programs).to(tl.int64), tl.program_id(0) % programs * shared
    samples = tl.num_programs(0) // programs
    members = group * queries
    all_rows = heads * members
    query += sample * query_sample
    index += sample * slots
    mask += sample * mask_sample
    scores_out += sample * heads * group * (packed + length)
    split = tl.program_id(2)
    member = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    top = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.full([BLOCK_G], 0.0, tl.float32)
    if split < splits:
        valid = member < shared * members
        rows = first_head * members + tl.minimum(member, shared * members - 1)  # none whose mask is not there
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
        basis += (sample * heads + first_head) * key_rank * dim
        angles = (cos + sample * angle_sample, sin + sample * angle_sample, axes + sample * axes_sample)
        HALF: tl.constexpr = ROTATED // 2
        ranks, value_ranks = tl.arange(0, BLOCK_BASIS), tl.arange(0, BLOCK_V)
        q_rows = (
            query + ((rows // queries).to(tl.int64) * query_head + (rows % queries).to(tl.int64) * query_token)[:, None]
        )
        out = tl.full([BLOCK_G, BLOCK_V], 0.0, tl.float32)
        for start in range(begin, end, BLOCK_N):
            token = start + tl.arange(0, BLOCK_N)
            there = token < end
            scores = tl.full([BLOCK_N, BLOCK_G], 0.0, tl.float32)
            for chunk in tl.static_range(CHUNKS):
                pair = chunk * BLOCK_E + tl.arange(0, BLOCK_E)
                turning = pair < HALF
                if INTERLEAVED:
                    dims_a, dims_b = 2 * pair, 2 * pair + 1
                else:
                    dims_a, dims_b = pair, pair + HALF
                c, s = turns(angles, first_slot + token, there, pair, packed, HALF, AXES)
                q_a = tl.load(q_rows + dims_a[None, :], mask=valid[:, None] & turning[None, :], other=0)
                q_b = tl.load(q_rows + dims_b[None, :], mask=valid[:, None] & turning[None, :], other=0)
                for number in range(shared):
                    tile = basis + number * key_rank * dim
                    k_a = tl.full([BLOCK_N, BLOCK_E], 0.0, tl.float32)
                    k_b = tl.full([BLOCK_N, BLOCK_E], 0.0, tl.float32)
                    for part in tl.static_range(STEPS):
                        rank = part * BLOCK_BASIS + ranks
                        factor = tl.load(
                            key + token[:, None] * key_rank + rank[None, :],
                            mask=there[:, None] & (rank < key_rank)[None, :],
                            other=0,
                        )
                        within = (rank < key_rank)[:, None] & turning[None, :]
                        b_a = tl.load(tile + rank[:, None] * dim + dims_a[None, :], mask=within, other=0)
                        b_b = tl.load(tile + rank[:, None] * dim + dims_b[None, :], mask=within, other=0)
                        k_a += tl.dot(factor, b_a, input_precision="ieee")
                        k_b += tl.dot(factor, b_b, input_precision="ieee")
                    # Rows of other heads add nothing to the scores of this one's keys.
                    mine = member // members == number
                    turned = (k_a * c - k_b * s).to(q_a.dtype)
                    scores += tl.dot(turned, tl.trans(tl.where(mine[:, None], q_a, 0)), input_precision="ieee")
                    turned = (k_b * c + k_a * s).to(q_b.dtype)
                    scores += tl.dot(turned, tl.trans(tl.where(mine[:, None], q_b, 0)), input_precision="ieee")
            if BLOCK_REST > 0:
                dims = ROTATED + tl.arange(0, BLOCK_REST)
                q = tl.load(q_rows + dims[None, :], mask=valid[:, None] & (dims < dim)[None, :], other=0)
                for number in range(shared):
                    tile = basis + number * key_rank * dim
                    k = tl.full([BLOCK_N, BLOCK_REST], 0.0, tl.float32)
                    for part in tl.static_range(STEPS):
                        rank = part * BLOCK_BASIS + ranks
                        factor = tl.load(
                            key + token[:, None] * key_rank + rank[None, :],
                            mask=there[:, None] & (rank < key_rank)[None, :],
                            other=0,
                        )
                        within = (rank < key_rank)[:, None] & (dims < dim)[None, :]
                        b = tl.load(tile + rank[:, None] * dim + dims[None, :], mask=within, other=0)
                        k += tl.dot(factor, b, input_precision="ieee")
                    mine = member // members == number
                    still = tl.where(mine[:, None], q, 0)
                    scores += tl.dot(k.to(q.dtype), tl.trans(still), input_precision="ieee")
            scores = tl.trans(scores) * scale
            column = token.to(tl.int64)
            if RAGGED or MASK != 0:
                column = tl.load(index + first_slot + token, mask=there, other=0)
            scores = masked(
                scores, rows, there, column, queries, mask, mask_head, mask_query, mask_token, MASK, CAP, RAGGED
            )
            if SCORES:
                store_scores(scores_out, scores, rows, valid, queries, first_slot + token, there, packed + length)
            weights, top, total, shrink = step(scores, top, total)
            mixed = tl.load(
                value + token[:, None] * value_rank + value_ranks[None, :],
                mask=there[:, None] & (value_ranks < value_rank)[None, :],
                other=0,
            )
            out = out * shrink[:, None] + tl.dot(weights.to(mixed.dtype), mixed, input_precision="ieee")
        place = (split * samples + sample) * all_rows + rows
        store_partial(latent, latent_sums, out, top, total, place, valid, BLOCK_V, BLOCK_V)
    else:
        split = (split - splits) // shared
        head = first_head + (tl.program_id(2) - splits) % shared
        valid = member < members
        rows = head * members + tl.minimum(member, members - 1)
        q = load_query(query, rows, valid, queries, query_head, query_token, dim, BLOCK_D)
        first = split * rows_per_split
        acc = tl.full([BLOCK_G, BLOCK_DV], 0.0, tl.float32)
        top, total, acc = attend_rows(
            q, rows, valid, top, total, acc,
            key_tail + (sample * heads + head) * dim, value_tail + (sample * heads + head) * value_dim,
            samples * heads * dim, samples * heads * value_dim, dim, value_dim,
            first, tl.minimum(first + rows_per_split, length), length, scale, index, packed, slots,
            mask, mask_head, mask_query, mask_token, mask_tokens, queries, scores_out,
            MASK, CAP, RAGGED, SCORES, BLOCK_ROWS, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
        place = (split * samples + sample) * all_rows + rows
        store_partial(partial, partial_sums, acc, top, total, place, valid, value_dim, BLOCK_DV)


@triton.jit
def turns(angles, slot, there, pair, packed, HALF: tl.constexpr, AXES: tl.constexpr):
    """cos and sin `[N, pairs]` of pairs of rotated dims: of every slot, or summed over its rows of every axis."""
    cos, sin, axes = angles
    inside = there[:, None] & (pair < HALF)[None, :]
    if AXES == 0:
        cells = slot[:, None] * HALF + pair[None, :]
        c = tl.load(cos + cells, mask=inside, other=0).to(tl.float32)
        s = tl.load(sin + cells, mask=inside, other=0).to(tl.float32)
    else:
        c, s = tl.zeros_like(inside).to(tl.float32), tl.zeros_like(inside).to(tl.float32)
        for axis in tl.static_range(AXES):
            row = tl.load(axes + axis * packed + slot, mask=there, other=0)
            cells = row[:, None] * HALF + pair[None, :]
            c += tl.load(cos + cells, mask=inside, other=0).to(tl.float32)
            s += tl.load(sin + cells, mask=inside, other=0).to(tl.float32)
    return c, s
