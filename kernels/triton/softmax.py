"""Pieces that the attention kernels share: masked scores, an online softmax, attention to packed tokens, to dense rows.

Rows of a score tile are query rows: row `m` of a sample is query head `m // Tq` at query position `m % Tq`, so the
query heads of one KV head are neighbours. Columns are slots (`kernels/parts.py`). A row that saw no token yet has
maximum -inf and sum 0.
"""

import triton
import triton.language as tl


@triton.jit
def masked(
    scores,  # [M, N] fp32
    rows,  # [M] query rows of the sample
    seen,  # [N] slots that exist
    column,  # [N] position of each slot in the mask; negative: filler
    queries,  # Tq
    mask,  # of the sample
    mask_head,
    mask_query,
    mask_token,
    MASK: tl.constexpr,
    CAP: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """Scores with cap and mask applied and -inf where there is no token.

    MASK: 0 none, 1 bool, 2 additive. CAP: 0 none, else scores are `CAP tanh(scores / CAP)` before.
    """
    if CAP != 0:
        # As exp(2 x) is Inf where tanh is 1, the quotient is 0 there, and nothing overflows.
        scores = CAP - 2 * CAP / (tl.exp(2 / CAP * scores) + 1)
    if RAGGED:
        seen = seen & (column >= 0)
    allowed = seen[None, :]
    if MASK != 0:
        row = (rows // queries).to(tl.int64) * mask_head + (rows % queries).to(tl.int64) * mask_query
        cells = mask + row[:, None] + tl.maximum(column, 0)[None, :] * mask_token
        if MASK == 1:
            allowed = allowed & (tl.load(cells, mask=allowed, other=0) != 0)
        else:
            scores += tl.load(cells, mask=allowed, other=0).to(tl.float32)
    return tl.where(allowed, scores, float("-inf"))


@triton.jit
def step(scores, top, total):
    """One step of an online softmax: weights, the new maximum and sum, and the factor for what was summed before."""
    new = tl.maximum(top, tl.max(scores, 1))
    safe = tl.where(new == float("-inf"), 0.0, new)
    weights = tl.exp(scores - safe[:, None])
    shrink = tl.exp(top - safe)
    return weights, new, total * shrink + tl.sum(weights, 1), shrink


@triton.jit
def log_sum(top, total):
    """The logarithm of a row's sum of exponentials; -inf where it saw no token."""
    return tl.where(total > 0, top + tl.log(tl.where(total > 0, total, 1.0)), float("-inf"))


@triton.jit
def load_query(query, rows, valid, queries, stride_head, stride_query, dim, BLOCK_D: tl.constexpr):
    """Query rows of a sample as they are, `[M, BLOCK_D]`."""
    columns = tl.arange(0, BLOCK_D)
    start = (rows // queries).to(tl.int64) * stride_head + (rows % queries).to(tl.int64) * stride_query
    return tl.load(query + start[:, None] + columns[None, :], mask=valid[:, None] & (columns < dim)[None, :], other=0)


@triton.jit
def load_sinks(sinks, rows, valid, queries):
    """The sink of each query row of a sample, fp32 `[M]`."""
    return tl.load(sinks + rows // queries, mask=valid, other=0).to(tl.float32)


@triton.jit
def attend_tokens(
    q,  # [M, BLOCK_R] latent queries
    rows,  # [M] their numbers in the sample
    valid,  # [M]
    top,
    total,
    out,  # [M, BLOCK_V] fp32, latent
    key,  # coefficients of one sample
    value,
    key_rank,
    value_rank,
    first,  # tokens first .. last - 1 of the segment are attended to
    last,
    index,  # of the sample, from the segment's first slot on
    first_slot,
    mask,
    mask_head,
    mask_query,
    mask_token,
    queries,
    scores_out,  # of the sample, [Hq, all_slots] fp32
    all_slots,
    MASK: tl.constexpr,
    CAP: tl.constexpr,
    RAGGED: tl.constexpr,
    SCORES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Attention to packed tokens, added to a running softmax: returns `top, total, out`."""
    ranks, value_ranks = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_V)
    for start in range(first, last, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        there = token < last
        c = tl.load(
            key + token[:, None] * key_rank + ranks[None, :],
            mask=there[:, None] & (ranks < key_rank)[None, :],
            other=0,
        )
        scores = tl.dot(q, tl.trans(c), input_precision="ieee")
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
    return top, total, out


@triton.jit
def attend_rows(
    q,  # [M, BLOCK_D] query rows of one KV head
    rows,  # [M] their numbers in the sample
    valid,  # [M]
    top,
    total,
    out,  # [M, BLOCK_DV] fp32
    keys,  # tail rows of one sample and KV head
    values,
    key_step,  # elements from one tail row to the next
    value_step,
    key_dim,
    value_dim,
    first,  # tail rows first .. last - 1 are attended to
    last,
    length,
    scale,
    index,  # of the sample
    packed,  # slots before the tail
    slots,  # columns of index
    mask,
    mask_head,
    mask_query,
    mask_token,
    mask_tokens,
    queries,
    scores_out,  # of the sample, [Hq, packed + length] fp32
    MASK: tl.constexpr,
    CAP: tl.constexpr,
    RAGGED: tl.constexpr,
    SCORES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Attention to dense tail rows, added to a running softmax: returns `top, total, out`."""
    columns, value_columns = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    for start in range(first, last, BLOCK_N):
        row = start + tl.arange(0, BLOCK_N)
        there = row < last
        k = tl.load(
            keys + row.to(tl.int64)[:, None] * key_step + columns[None, :],
            mask=there[:, None] & (columns < key_dim)[None, :],
            other=0,
        )
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        column = tail_column(row, there, index, packed, slots, mask_tokens, length, MASK, RAGGED)
        scores = masked(
            scores, rows, there, column, queries, mask, mask_head, mask_query, mask_token, MASK, CAP, RAGGED
        )
        if SCORES:
            store_scores(scores_out, scores, rows, valid, queries, packed + row, there, packed + length)
        weights, top, total, shrink = step(scores, top, total)
        v = tl.load(
            values + row.to(tl.int64)[:, None] * value_step + value_columns[None, :],
            mask=there[:, None] & (value_columns < value_dim)[None, :],
            other=0,
        )
        out = out * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return top, total, out


@triton.jit
def tail_column(row, there, index, packed, slots, mask_tokens, length, MASK: tl.constexpr, RAGGED: tl.constexpr):
    """Mask columns of tail rows: the first hold prompt tokens, where `index` says; the others the last columns."""
    column = row.to(tl.int64)
    if RAGGED or MASK != 0:
        kept = slots - packed
        prompt = tl.load(index + packed + row, mask=there & (row < kept), other=0)
        if MASK != 0:
            column += mask_tokens - length
        column = tl.where(row < kept, prompt, column)
    return column


@triton.jit
def store_scores(scores_out, scores, rows, valid, queries, slot, there, slots):
    """Write the scores of the last query position, `[Hq, slots]`."""
    last = valid & (rows % queries == queries - 1)
    cells = scores_out + (rows // queries).to(tl.int64)[:, None] * slots + slot[None, :]
    tl.store(cells, scores, mask=last[:, None] & there[None, :])


@triton.jit
def store_partial(out, log_sums, acc, top, total, place, valid, width, BLOCK: tl.constexpr):
    """Write a normalised partial result `[M, width]` and its log-sum-exp at rows `place`."""
    columns = tl.arange(0, BLOCK)
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    cells = out + place[:, None] * width + columns[None, :]
    tl.store(cells, acc.to(out.dtype.element_ty), mask=valid[:, None] & (columns < width)[None, :])
    tl.store(log_sums + place, log_sum(top, total), mask=valid)
