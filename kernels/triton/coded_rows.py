"""Attention to rows in few bits (`parts.Rows`): tiles of keys and values become numbers in registers.

Keys and values may be coded at different times: of some tokens one of them is coded, and the other a row of its tail.

    x = norm (level(codes) scale + zero)     scale and zero of a token's group of channels, or of a channel and the
                                             group that the token is in

A form, compiled in: 0 bits, 1 channels of a group (0: all of a token share none, no scale), 2 whether scales are of
channels and groups of tokens, 3 zero points, 4 codebook (0 none, 1 for all heads, 2 one a head), 5 norm, 6 elements of
a row of codes, 7 head dim.
"""

import triton
import triton.language as tl

from attnpack_fx.kernels.triton.codes import fields, levels, load_codes
from attnpack_fx.kernels.triton.softmax import masked, step, store_scores


@triton.jit
def attend_coded_rows(
    q,  # [M, BLOCK_D] query rows of one KV head
    rows,  # [M] their numbers in the sample
    valid,  # [M]
    top,
    total,
    out,  # [M, BLOCK_DV] fp32
    keys,  # tensors of the rows of all samples: codes, scale, zero, group_of, codebook, norm
    values,
    key_groups,  # groups of tokens, where those share scales
    value_groups,
    key_count,  # coded rows
    value_count,
    key_tail,  # of one sample and KV head
    value_tail,
    key_step,  # elements from one tail row to the next
    value_step,
    sample,
    head,
    heads,
    first,  # tokens first .. last - 1 are attended to
    last,
    scale,
    index,  # of the sample, from the segment's first slot on
    first_slot,
    mask,
    mask_head,
    mask_query,
    mask_token,
    queries,
    scores_out,  # of the sample, [Hq, all_slots] fp32
    all_slots,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    MIXED: tl.constexpr,  # whether of a token only the key or only the value is coded
    MASK: tl.constexpr,
    CAP: tl.constexpr,
    RAGGED: tl.constexpr,
    SCORES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Attention to a range of coded rows, added to a running softmax: returns `top, total, out`."""
    for start in range(first, last, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        there = token < last
        k = load_rows(
            keys, key_groups, key_count, sample, head, heads, token, there, key_tail, key_step, KEYS, MIXED, BLOCK_D
        )
        scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * scale
        column = token.to(tl.int64)
        if RAGGED or MASK != 0:
            column = tl.load(index + token, mask=there, other=0)
        scores = masked(
            scores, rows, there, column, queries, mask, mask_head, mask_query, mask_token, MASK, CAP, RAGGED
        )
        if SCORES:
            store_scores(scores_out, scores, rows, valid, queries, first_slot + token, there, all_slots)
        weights, top, total, shrink = step(scores, top, total)
        v = load_rows(
            values, value_groups, value_count, sample, head, heads, token, there, value_tail, value_step, VALUES, MIXED,
            BLOCK_DV,
        ).to(q.dtype)  # fmt: skip
        out = out * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return top, total, out


@triton.jit
def load_rows(
    tensors, groups, count, sample, head, heads, token, there, tail, tail_step,
    FORM: tl.constexpr, MIXED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows `[N, BLOCK]` of one KV head as numbers, fp32: with MIXED those from `count` on are of the tail."""
    if MIXED:
        coded = there & (token < count)
        x = decode_rows(tensors, groups, count, sample, head, heads, token, coded, FORM, BLOCK)
        column = tl.arange(0, BLOCK)
        cells = tail + (token - count).to(tl.int64)[:, None] * tail_step + column[None, :]
        kept = tl.load(cells, mask=(there & (token >= count))[:, None] & (column < FORM[7])[None, :], other=0)
        x = tl.where(coded[:, None], x, kept.to(tl.float32))
    else:
        x = decode_rows(tensors, groups, count, sample, head, heads, token, there, FORM, BLOCK)
    return x


@triton.jit
def decode_rows(
    tensors, groups, tokens, sample, head, heads, token, there, FORM: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Coded rows `[N, BLOCK]` of one KV head as numbers, fp32; beyond the head dim anything finite."""
    BITS: tl.constexpr = FORM[0]
    GROUP: tl.constexpr = FORM[1]
    CHANNEL: tl.constexpr = FORM[2]
    CODEBOOK: tl.constexpr = FORM[4]
    STEP: tl.constexpr = FORM[6]
    DIM: tl.constexpr = FORM[7]
    codes, scale, zero, group_of, codebook, norm = tensors
    # A token's number within its sample, which 32 bits hold.
    row, begin = token * heads + head, sample * tokens * heads
    found = load_codes(codes + begin * STEP, row, there, 0, DIM, BLOCK, STEP, BITS)
    if CODEBOOK != 0:
        books = codebook + (head << BITS if CODEBOOK == 2 else 0)
        x = tl.load(books + fields(found, BITS).to(tl.int32)).to(tl.float32)
    elif BITS == 0:
        x = found.to(tl.float32)
    else:
        x = levels(found, BITS, False)
        if BITS > 8:
            x *= 256.0
    if CHANNEL:
        group = tl.load(group_of + sample * tokens + token, mask=there, other=0)
        first = sample * groups * heads * DIM
        column = tl.arange(0, BLOCK)
        inside = there[:, None] & (column < DIM)[None, :]
        cells = ((group * heads + head) * DIM)[:, None] + column[None, :]
        x *= tl.load(scale + first + cells, mask=inside, other=0).to(tl.float32)
        if FORM[3]:
            x += tl.load(zero + first + cells, mask=inside, other=0).to(tl.float32)
    elif GROUP > 0:
        GROUPS: tl.constexpr = (DIM + GROUP - 1) // GROUP
        x *= per_channel(scale + begin * GROUPS, row, there, GROUP, GROUPS, DIM, BLOCK)
        if FORM[3]:
            x += per_channel(zero + begin * GROUPS, row, there, GROUP, GROUPS, DIM, BLOCK)
    if FORM[5]:
        x *= tl.load(norm + begin + row, mask=there, other=0).to(tl.float32)[:, None]
    return x


@triton.jit
def per_channel(
    x, row, there, GROUP: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """What every channel is given of its group's entry in `x[row]`, `[N, BLOCK]` or `[N, 1]` fp32."""
    if GROUPS == 1:
        found = tl.load(x + row, mask=there, other=0).to(tl.float32)[:, None]
    elif GROUP & (GROUP - 1) == 0:  # a tile is whole groups: read each entry once
        group = tl.arange(0, BLOCK // GROUP)
        inside = there[:, None] & (group < GROUPS)[None, :]
        entries = tl.load(x + row[:, None] * GROUPS + group[None, :], mask=inside, other=0).to(tl.float32)
        spread = tl.broadcast_to(entries[:, :, None], [row.shape[0], BLOCK // GROUP, GROUP])
        found = tl.reshape(spread, [row.shape[0], BLOCK])
    else:
        column = tl.arange(0, BLOCK)
        inside = there[:, None] & (column < DIM)[None, :]
        found = tl.load(x + row[:, None] * GROUPS + (column // GROUP)[None, :], mask=inside, other=0).to(tl.float32)
    return found
