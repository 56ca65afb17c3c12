"""Queries turned and absorbed for every position of the rotary axes, and attention to the dense tail.

    turned[p, m] = q[m] rotated back by row p of the tables:   a' = a cos + b sin,  b' = b cos - a sin
    tables[s, b, p, m] = scale * turned[p, m] B_k[s, b, h]^T      `[S, B, P, Hq * Tq, BLOCK_R]`, zero from the rank on
    tail:  attention of q to tail rows of its KV head             partial results, see `combine.py`

Keys stored before rotary embedding, under multimodal rotary embedding (`rotary_axes.py`): a token's latent query is the
sum of one row per axis, so `split` never rebuilds a key. One program takes the query rows of one KV head and either
`BLOCK_P` positions with `BLOCK_BASIS` rows of one basis, or a range of tail rows.
"""

import triton
import triton.language as tl

from attnpack_fx.kernels.triton.launch import VARYING
from attnpack_fx.kernels.triton.softmax import attend_rows, load_query, store_partial


@triton.jit(do_not_specialize=VARYING)
def tables_kernel(
    query,
    basis0,  # [B, H, R, D]
    basis1,
    cos,  # [B or 1, P, D / 2]
    sin,
    tables,  # [S, B, P, Hq * Tq, BLOCK_R]
    key_tail,  # [rows, B, H, D]
    value_tail,
    partial,  # [splits, B, Hq * Tq, Dv] fp32
    log_sums,  # [splits, B, Hq * Tq] fp32
    scores_out,  # [B, Hq, packed + length] fp32
    index,  # [B, slots] int64
    mask,
    heads,
    group,  # query heads of a KV head
    queries,
    dim,
    value_dim,
    rank0,
    rank1,
    positions,  # P
    angle_sample,
    query_sample,
    query_head,
    query_token,
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
    BLOCK_P: tl.constexpr,
    BLOCK_BASIS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,  # dims of half the head
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    sample, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    samples = tl.num_programs(0) // heads
    all_rows = heads * group * queries
    query += sample * query_sample
    parts: tl.constexpr = BLOCK_R // BLOCK_BASIS
    blocks = tl.cdiv(positions, BLOCK_P)
    if tl.program_id(2) < SEGMENTS * parts * blocks:
        segment, part = tl.program_id(2) // (parts * blocks), tl.program_id(2) % parts
        position = (tl.program_id(2) // parts % blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
        there = position < positions
        basis, rank = tl.where(segment == 1, basis1, basis0), tl.where(segment == 1, rank1, rank0)
        basis += (sample * heads + head) * rank * dim
        half, number = tl.arange(0, BLOCK_E), part * BLOCK_BASIS + tl.arange(0, BLOCK_BASIS)
        turning = half < dim // 2
        if INTERLEAVED:
            dims_a, dims_b = 2 * half, 2 * half + 1
        else:
            dims_a, dims_b = half, half + dim // 2
        within = (number < rank)[:, None] & turning[None, :]
        b_a = tl.load(basis + number[:, None] * dim + dims_a[None, :], mask=within, other=0)
        b_b = tl.load(basis + number[:, None] * dim + dims_b[None, :], mask=within, other=0)
        angle, cells = position[:, None] * (dim // 2) + half[None, :], there[:, None] & turning[None, :]
        cos += sample * angle_sample
        sin += sample * angle_sample
        place = (segment * samples + sample) * positions + position
        first = head * group * queries + tl.program_id(1) * BLOCK_G
        for row in range(first, tl.minimum(first + BLOCK_G, (head + 1) * group * queries)):
            q = query + (row // queries).to(tl.int64) * query_head + (row % queries).to(tl.int64) * query_token
            q_a = tl.load(q + dims_a, mask=turning, other=0).to(tl.float32)[None, :]
            q_b = tl.load(q + dims_b, mask=turning, other=0).to(tl.float32)[None, :]
            c = tl.load(cos + angle, mask=cells, other=0).to(tl.float32)
            s = tl.load(sin + angle, mask=cells, other=0).to(tl.float32)
            turned = (q_a * c + q_b * s).to(b_a.dtype)
            absorbed = tl.dot(turned, tl.trans(b_a), input_precision="ieee")
            turned = (q_b * c - q_a * s).to(b_b.dtype)
            absorbed += tl.dot(turned, tl.trans(b_b), input_precision="ieee")
            out = tables + (place[:, None] * all_rows + row) * BLOCK_R + number[None, :]
            tl.store(out, (absorbed * scale).to(tables.dtype.element_ty), mask=there[:, None])
    else:
        member = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
        valid = member < group * queries
        rows = head * group * queries + tl.minimum(member, group * queries - 1)  # none whose mask is not there
        q = load_query(query, rows, valid, queries, query_head, query_token, dim, BLOCK_D)
        split = tl.program_id(2) - SEGMENTS * parts * blocks
        first_row = split * rows_per_split
        top = tl.full([BLOCK_G], float("-inf"), tl.float32)
        total = tl.full([BLOCK_G], 0.0, tl.float32)
        acc = tl.full([BLOCK_G, BLOCK_DV], 0.0, tl.float32)
        top, total, acc = attend_rows(
            q, rows, valid, top, total, acc,
            key_tail + (sample * heads + head) * dim, value_tail + (sample * heads + head) * value_dim,
            samples * heads * dim, samples * heads * value_dim, dim, value_dim,
            first_row, tl.minimum(first_row + rows_per_split, length), length, scale, index + sample * slots, packed,
            slots, mask + sample * mask_sample, mask_head, mask_query, mask_token, mask_tokens, queries,
            scores_out + sample * heads * group * (packed + length),
            MASK, CAP, RAGGED, SCORES, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
        place = (split * samples + sample) * all_rows + rows
        store_partial(partial, log_sums, acc, top, total, place, valid, value_dim, BLOCK_DV)
