"""What coded segments want per KV head: queries absorbed into coded key bases, attention to coded rows and to the tail.

With basis `w s_b + z_b` and coefficients `u s_c + z_c` of a component (levels, scales, zero points), of a block

    a = scale (s_b q w^T + z_b sum_d q_d)       score of a token = sum_r a (u s_c + z_c)
    latent[b, m] = a s_c                         one multiply a component: the codes themselves are attended to
    shift[part, b, m] = sum_r a z_c              of the ranks of one part

Segments of `Rows` are attended to here as well, as they are. One program takes the query rows of one KV head and some
rows of a block's basis (a part), or a range of coded rows, or of tail rows; the latter leave partial results, see
`combine_coded.py`.
"""

import triton
import triton.language as tl

from attnpack_fx.kernels.triton.coded_rows import attend_coded_rows
from attnpack_fx.kernels.triton.codes import load_levels, load_scale
from attnpack_fx.kernels.triton.forms import pick
from attnpack_fx.kernels.triton.launch import VARYING
from attnpack_fx.kernels.triton.softmax import attend_rows, load_query, store_partial


@triton.jit(do_not_specialize=VARYING)
def absorb_coded_kernel(
    query,
    basis0,  # [B or 1, H, r, w] of each block
    basis1,
    basis2,
    basis3,
    scale0,  # [B, 2 or 4, r] fp32
    scale1,
    scale2,
    scale3,
    latent,  # [B, Hq * Tq, KEY_WIDTH]
    shift,  # [PARTS, B, Hq * Tq] fp32
    key_codes,  # [B, n, H, w], and what else there is of rows
    key_scale,
    key_zero,
    key_group_of,
    key_codebook,
    key_norm,
    value_codes,
    value_scale,
    value_zero,
    value_group_of,
    value_codebook,
    value_norm,
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
    query_sample,
    query_head,
    query_token,
    length,
    rows_per_split,
    key_count,  # coded rows
    value_count,
    coded_slot,  # their first slot
    coded_per_split,  # of those that are coded in keys and values
    coded_splits,
    mixed_per_split,  # of those that are coded in one
    mixed_splits,
    key_groups,  # groups of tokens that share scales
    value_groups,
    packed,
    slots,
    mask_sample,
    mask_head,
    mask_query,
    mask_token,
    mask_tokens,
    scale: tl.constexpr,  # a Python float, which Inductor would pass as fp64
    KEYS: tl.constexpr,  # forms of the blocks of every segment (`blocks.py`)
    PARTS: tl.constexpr,
    ROW_KEYS: tl.constexpr,  # form of coded rows (`coded_rows.py`), empty without
    ROW_VALUES: tl.constexpr,
    DIM: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    MASK: tl.constexpr,
    CAP: tl.constexpr,
    RAGGED: tl.constexpr,
    SCORES: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,  # coded rows of one step
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
    part = tl.program_id(2)
    if part < PARTS:
        bases, scales = (basis0, basis1, basis2, basis3), (scale0, scale1, scale2, scale3)
        cells = latent + (sample * all_rows + rows)[:, None] * KEY_WIDTH
        shifts = shift + (part.to(tl.int64) * samples + sample) * all_rows + rows
        for segment in tl.static_range(len(KEYS)):
            for block in tl.static_range(len(pick(KEYS, segment))):
                absorb_block(
                    q, valid, scale, bases, scales, cells, shifts, part, sample, head, heads,
                    pick(KEYS, segment, block), DIM, BLOCK_D,
                )  # fmt: skip
    else:
        split = part - PARTS
        top = tl.full([BLOCK_G], float("-inf"), tl.float32)
        total = tl.full([BLOCK_G], 0.0, tl.float32)
        out = tl.full([BLOCK_G, BLOCK_DV], 0.0, tl.float32)
        indices, masks = index + sample * slots, mask + sample * mask_sample
        seen = scores_out + sample * heads * group * (packed + length)
        key_rows, value_rows = (
            key_tail + (sample * heads + head) * dim,
            value_tail + (sample * heads + head) * value_dim,
        )
        key_step, value_step = samples * heads * dim, samples * heads * value_dim
        first = split * rows_per_split
        last = tl.minimum(first + rows_per_split, length)
        if len(ROW_KEYS) > 0:  # of the following three ranges, a program's split is in one, and the others are empty
            keys = (key_codes, key_scale, key_zero, key_group_of, key_codebook, key_norm)
            values = (value_codes, value_scale, value_zero, value_group_of, value_codebook, value_norm)
            both, most = tl.minimum(key_count, value_count), tl.maximum(key_count, value_count)
            mixed_split = split - coded_splits
            tail_split = mixed_split - mixed_splits
            first = split * coded_per_split
            top, total, out = attend_coded_rows(
                q, rows, valid, top, total, out, keys, values, key_groups, value_groups, key_count, value_count,
                key_rows, value_rows, key_step, value_step, sample, head, heads,
                first, tl.minimum(first + coded_per_split, both), scale, indices + coded_slot, coded_slot,
                masks, mask_head, mask_query, mask_token, queries, seen, packed + length,
                ROW_KEYS, ROW_VALUES, False, MASK, CAP, RAGGED, SCORES, BLOCK_ROWS, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
            first = both + mixed_split * mixed_per_split
            last = tl.where(mixed_split < 0, first, tl.minimum(first + mixed_per_split, most))
            top, total, out = attend_coded_rows(
                q, rows, valid, top, total, out, keys, values, key_groups, value_groups, key_count, value_count,
                key_rows, value_rows, key_step, value_step, sample, head, heads,
                first, last, scale, indices + coded_slot, coded_slot,
                masks, mask_head, mask_query, mask_token, queries, seen, packed + length,
                ROW_KEYS, ROW_VALUES, True, MASK, CAP, RAGGED, SCORES, BLOCK_ROWS, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
            # Tail rows are numbered as those of keys.
            first = most - key_count + tail_split * rows_per_split
            last = tl.where(tail_split < 0, first, tl.minimum(first + rows_per_split, length))
            value_rows += (key_count - value_count) * value_step.to(tl.int64)
        top, total, out = attend_rows(
            q, rows, valid, top, total, out, key_rows, value_rows, key_step, value_step, dim, value_dim,
            first, last, length, scale, indices, packed, slots,
            masks, mask_head, mask_query, mask_token, mask_tokens, queries, seen,
            MASK, CAP, RAGGED, SCORES, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
        place = (split * samples + sample) * all_rows + rows
        store_partial(partial, log_sums, out, top, total, place, valid, value_dim, BLOCK_DV)


@triton.jit
def absorb_block(
    q, valid, scale, bases, scales, cells, shifts, part, sample, head, heads,
    FORM: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Absorb q into one part of a block's basis, if that is this program's part."""
    NUMBER: tl.constexpr = FORM[0]
    BITS: tl.constexpr = FORM[1]
    BASIS_BITS: tl.constexpr = FORM[2]
    ASYMMETRIC: tl.constexpr = FORM[3]
    RANK: tl.constexpr = FORM[4]
    BLOCK: tl.constexpr = FORM[5]
    START: tl.constexpr = FORM[6]
    FIRST: tl.constexpr = FORM[7]
    PARTS: tl.constexpr = FORM[8]
    STEP: tl.constexpr = FORM[11]
    SHARED: tl.constexpr = FORM[10]
    if (part >= FIRST) & (part < FIRST + PARTS):
        number = (part - FIRST) * (BLOCK // PARTS) + tl.arange(0, BLOCK // PARTS)
        owner = head if SHARED else sample * heads + head
        tile = load_levels(
            bases[NUMBER] + owner * RANK * STEP, number, number < RANK, 0, DIM, BLOCK_D, STEP, BASIS_BITS,
            not ASYMMETRIC,
        )  # fmt: skip
        absorbed = tl.dot(q, tl.trans(tile.to(q.dtype)), input_precision="ieee") * scale
        if BITS != 0 or BASIS_BITS != 0:
            LINES: tl.constexpr = 4 if ASYMMETRIC else 2
            lines = scales[NUMBER] + sample * LINES * RANK
            absorbed *= load_scale(lines, 1, number, RANK, BASIS_BITS)[None, :]
            if ASYMMETRIC:
                sums = tl.sum(q.to(tl.float32), 1) * scale
                absorbed += sums[:, None] * load_scale(lines, 3, number, RANK, 0)[None, :]
                tl.store(shifts, tl.sum(absorbed * load_scale(lines, 2, number, RANK, 0)[None, :], 1), mask=valid)
            absorbed *= load_scale(lines, 0, number, RANK, BITS)[None, :]
        tl.store(cells + START + number[None, :], absorbed.to(q.dtype), mask=valid[:, None])
