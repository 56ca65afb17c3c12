"""Queries absorbed into the bases of packed keys, and attention to the dense tail: all that needs no coefficients.

    latent[s, b, m] = scale * q[b, m] @ B_k[s, b, h]^T          `[S, B, Hq * Tq, BLOCK_R]`, zero from the rank on
    tail:  attention of q to tail rows of its KV head           partial results, see `combine.py`

One program takes the query rows of one KV head (a GQA group shares the basis tile) and either `BLOCK_BASIS` rows of one
basis or a range of tail rows.
"""

import triton
import triton.language as tl

from attnpack_fx.kernels.triton.launch import VARYING
from attnpack_fx.kernels.triton.softmax import attend_rows, load_query, store_partial


@triton.jit(do_not_specialize=VARYING)
def absorb_kernel(
    query,
    basis0,  # [B, H, R, D]
    basis1,
    latent,  # [S, B, Hq * Tq, BLOCK_R]
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
    MASK: tl.constexpr,
    CAP: tl.constexpr,
    RAGGED: tl.constexpr,
    SCORES: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_BASIS: tl.constexpr,
    BLOCK_R: tl.constexpr,
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
    q = load_query(query, rows, valid, queries, query_head, query_token, dim, BLOCK_D)
    parts: tl.constexpr = BLOCK_R // BLOCK_BASIS
    if tl.program_id(2) < SEGMENTS * parts:
        segment = tl.program_id(2) // parts
        basis, rank = tl.where(segment == 1, basis1, basis0), tl.where(segment == 1, rank1, rank0)
        number = (tl.program_id(2) % parts) * BLOCK_BASIS + tl.arange(0, BLOCK_BASIS)
        columns = tl.arange(0, BLOCK_D)
        basis += (sample * heads + head) * rank * dim
        tile = tl.load(
            basis + number[:, None] * dim + columns[None, :],
            mask=(number < rank)[:, None] & (columns < dim)[None, :],
            other=0,
        )
        absorbed = tl.dot(q, tl.trans(tile), input_precision="ieee") * scale
        place = (segment * samples + sample) * all_rows + rows
        cells = latent + place[:, None] * BLOCK_R + number[None, :]
        tl.store(cells, absorbed.to(latent.dtype.element_ty), mask=valid[:, None])
    else:
        split = tl.program_id(2) - SEGMENTS * parts
        first = split * rows_per_split
        top = tl.full([BLOCK_G], float("-inf"), tl.float32)
        total = tl.full([BLOCK_G], 0.0, tl.float32)
        out = tl.full([BLOCK_G, BLOCK_DV], 0.0, tl.float32)
        top, total, out = attend_rows(
            q,
            rows,
            valid,
            top,
            total,
            out,
            key_tail + (sample * heads + head) * dim,
            value_tail + (sample * heads + head) * value_dim,
            samples * heads * dim,
            samples * heads * value_dim,
            dim,
            value_dim,
            first,
            tl.minimum(first + rows_per_split, length),
            length,
            scale,
            index + sample * slots,
            packed,
            slots,
            mask + sample * mask_sample,
            mask_head,
            mask_query,
            mask_token,
            mask_tokens,
            queries,
            scores_out + sample * heads * group * (packed + length),
            MASK,
            CAP,
            RAGGED,
            SCORES,
            BLOCK_N,
            BLOCK_D,
            BLOCK_DV,
        )
        place = (split * samples + sample) * all_rows + rows
        store_partial(partial, log_sums, out, top, total, place, valid, value_dim, BLOCK_DV)
