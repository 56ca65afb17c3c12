"""Attention to packed tokens by latent queries: a program takes a range of tokens for all query heads of a sample.

    scores = latent C_k^T,   partial[split] = softmax(scores) C_v     `[splits, B, Hq * Tq, BLOCK_V]`, see `combine.py`

So coefficients are read once, whatever the number of heads, and both products run on tensor cores.
"""

import triton
import triton.language as tl

from attnpack_fx.kernels.triton.launch import VARYING
from attnpack_fx.kernels.triton.softmax import attend_tokens, store_partial


@triton.jit(do_not_specialize=VARYING)
def tokens_kernel(
    latent,  # [S, B, Hq * Tq, BLOCK_R]
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
    all_rows,  # Hq * Tq
    queries,
    slots,
    all_slots,
    mask_sample,
    mask_head,
    mask_query,
    mask_token,
    SEGMENTS: tl.constexpr,
    MASK: tl.constexpr,
    CAP: tl.constexpr,
    RAGGED: tl.constexpr,
    SCORES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
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
    ranks = tl.arange(0, BLOCK_R)
    place = (segment * samples + sample) * all_rows + rows
    q = tl.load(latent + place[:, None] * BLOCK_R + ranks[None, :], mask=valid[:, None], other=0)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.full([BLOCK_M], 0.0, tl.float32)
    out = tl.full([BLOCK_M, BLOCK_V], 0.0, tl.float32)
    begin = inner * tokens_per_split
    end = tl.minimum(begin + tokens_per_split, tokens)
    top, total, out = attend_tokens(
        q, rows, valid, top, total, out, key, value, key_rank, value_rank, begin, end, index, first_slot,
        mask, mask_head, mask_query, mask_token, queries, scores_out + sample * (all_rows // queries) * all_slots,
        all_slots, MASK, CAP, RAGGED, SCORES, BLOCK_N, BLOCK_R, BLOCK_V,
    )  # fmt: skip
    place = (split * samples + sample) * all_rows + rows
    store_partial(partial, log_sums, out, top, total, place, valid, BLOCK_V, BLOCK_V)
