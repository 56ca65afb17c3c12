"""Attention to a short packed cache in one launch: a program does all of it for the query rows of one KV head.

It absorbs its queries, attends to every segment and to the tail in one online softmax, expands by the value bases and
writes the result. Coefficients are read once per KV head instead of once, but from L2, and nothing waits for another
kernel: the way while a launch costs more than that. It is also the way for many queries, which want no partial results.
"""

import triton
import triton.language as tl

from attnpack_fx.kernels.triton.launch import VARYING
from attnpack_fx.kernels.triton.softmax import attend_rows, attend_tokens, load_query, load_sinks


@triton.jit(do_not_specialize=VARYING)
def fused_kernel(
    query,
    key0,  # coefficients [B, N, R]
    key1,
    key_basis0,  # [B, H, R, D]
    key_basis1,
    value0,
    value1,
    value_basis0,
    value_basis1,
    key_tail,  # [rows, B, H, D]
    value_tail,
    out,  # [B, Hq, Tq, Dv]
    index,  # [B, slots] int64
    mask,
    heads,
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
    query_sample,
    query_head,
    query_token,
    length,
    packed,
    slots,
    mask_sample,
    mask_head,
    mask_query,
    mask_token,
    mask_tokens,
    scale: tl.constexpr,  # a Python float, which Inductor would pass as fp64
    sinks,  # [B or 1, Hq]
    sink_sample,
    SEGMENTS: tl.constexpr,
    MASK: tl.constexpr,
    CAP: tl.constexpr,
    RAGGED: tl.constexpr,
    SINKS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    sample, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    samples = tl.num_programs(0) // heads
    member = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    valid = member < group * queries
    rows = head * group * queries + tl.minimum(member, group * queries - 1)  # none whose mask is not there
    index += sample * slots
    mask += sample * mask_sample
    q = load_query(query + sample * query_sample, rows, valid, queries, query_head, query_token, dim, BLOCK_D)
    top = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.full([BLOCK_G], 0.0, tl.float32)
    acc = tl.full([BLOCK_G, BLOCK_DV], 0.0, tl.float32)
    if SEGMENTS > 0:
        top, total, acc = attend_segment(
            q, rows, top, total, acc,
            key0 + sample * tokens0 * key_rank0, key_basis0 + (sample * heads + head) * key_rank0 * dim,
            value0 + sample * tokens0 * value_rank0, value_basis0 + (sample * heads + head) * value_rank0 * value_dim,
            tokens0, key_rank0, value_rank0, dim, value_dim, scale,
            index, mask, mask_head, mask_query, mask_token, queries,
            MASK, CAP, RAGGED, BLOCK_G, BLOCK_N, BLOCK_R, BLOCK_V, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    if SEGMENTS > 1:
        top, total, acc = attend_segment(
            q, rows, top, total, acc,
            key1 + sample * tokens1 * key_rank1, key_basis1 + (sample * heads + head) * key_rank1 * dim,
            value1 + sample * tokens1 * value_rank1, value_basis1 + (sample * heads + head) * value_rank1 * value_dim,
            tokens1, key_rank1, value_rank1, dim, value_dim, scale,
            index + tokens0, mask, mask_head, mask_query, mask_token, queries,
            MASK, CAP, RAGGED, BLOCK_G, BLOCK_N, BLOCK_R, BLOCK_V, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    top, total, acc = attend_rows(
        q, rows, valid, top, total, acc,
        key_tail + (sample * heads + head) * dim, value_tail + (sample * heads + head) * value_dim,
        samples * heads * dim, samples * heads * value_dim, dim, value_dim,
        0, length, length, scale, index, packed, slots,
        mask, mask_head, mask_query, mask_token, mask_tokens, queries, out,
        MASK, CAP, RAGGED, False, BLOCK_ROWS, BLOCK_D, BLOCK_DV,
    )  # fmt: skip
    if SINKS:
        sink = load_sinks(sinks + sample * sink_sample, rows, valid, queries)
        new = tl.maximum(top, sink)
        acc *= tl.exp(top - new)[:, None]
        total = total * tl.exp(top - new) + tl.exp(sink - new)
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    columns = tl.arange(0, BLOCK_DV)
    cells = out + (sample * heads * group * queries + rows)[:, None] * value_dim + columns[None, :]
    tl.store(cells, acc.to(out.dtype.element_ty), mask=valid[:, None] & (columns < value_dim)[None, :])


@triton.jit
def attend_segment(
    q, rows, top, total, acc, key, key_basis, value, value_basis, tokens, key_rank, value_rank, dim, value_dim, scale,
    index, mask, mask_head, mask_query, mask_token, queries,
    MASK: tl.constexpr, CAP: tl.constexpr, RAGGED: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Attention to one segment, added to a running softmax: returns `top, total, acc`."""
    ranks, value_ranks = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_V)
    columns, value_columns = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    basis = tl.load(
        key_basis + ranks[:, None] * dim + columns[None, :],
        mask=(ranks < key_rank)[:, None] & (columns < dim)[None, :],
        other=0,
    )
    absorbed = (tl.dot(q, tl.trans(basis), input_precision="ieee") * scale).to(basis.dtype)
    mixed = tl.full([BLOCK_G, BLOCK_V], 0.0, tl.float32)
    before = top
    top, total, mixed = attend_tokens(
        absorbed, rows, rows >= 0, top, total, mixed, key, value, key_rank, value_rank, 0, tokens, index, 0,
        mask, mask_head, mask_query, mask_token, queries, acc, 0,
        MASK, CAP, RAGGED, False, BLOCK_N, BLOCK_R, BLOCK_V,
    )  # fmt: skip
    basis = tl.load(
        value_basis + value_ranks[:, None] * value_dim + value_columns[None, :],
        mask=(value_ranks < value_rank)[:, None] & (value_columns < value_dim)[None, :],
        other=0,
    )
    shrink = tl.exp(before - tl.where(top == float("-inf"), 0.0, top))
    return top, total, acc * shrink[:, None] + tl.dot(mixed.to(basis.dtype), basis, input_precision="ieee")
