"""Partial results merged by their log-sum-exps, and latent ones expanded by the value bases.

    w_i = exp(lse_i) / sum_j exp(lse_j)
    out[b, m] = sum_s (sum_{i in segment s} w_i latent_i) B_v[s, b, h]  +  sum_{i in tail} w_i partial_i

One program takes the query rows of one KV head and `BLOCK_D` dims of the result. A row whose every part saw no token is
zero.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from attnpack_fx.kernels.triton.launch import VARYING, cdiv, combine_tile
from attnpack_fx.kernels.triton.problem import Problem
from attnpack_fx.kernels.triton.softmax import load_sinks


@triton.jit(do_not_specialize=VARYING)
def combine_kernel(
    latent,  # [splits0 + splits1, B, Hq * Tq, BLOCK_V] fp32
    latent_sums,  # [splits0 + splits1, B, Hq * Tq] fp32
    partial,  # [tail_splits, B, Hq * Tq, Dv] fp32
    partial_sums,
    basis0,  # [B, H, R, Dv]
    basis1,
    out,  # [B, Hq, Tq, Dv]
    log_sums,  # [B, Hq * Tq] fp32, of all tokens
    heads,
    members,  # query rows of a KV head
    queries,
    rank0,
    rank1,
    dim,
    splits0,
    splits1,
    tail_splits,
    sinks,  # [B or 1, Hq]
    sink_sample,
    SEGMENTS: tl.constexpr,
    SUMS: tl.constexpr,  # whether log_sums is written
    SINKS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    sample, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    samples = tl.num_programs(0) // heads
    member = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    valid = member < members
    rows = sample * heads * members + head * members + member
    all_rows = samples.to(tl.int64) * heads * members
    columns = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    top = tl.full([BLOCK_G], float("-inf"), tl.float32)
    if SEGMENTS > 0:
        top = highest(latent_sums, splits0 + splits1, rows, valid, all_rows, top, BLOCK_S)
    top = highest(partial_sums, tail_splits, rows, valid, all_rows, top, BLOCK_S)
    total = tl.full([BLOCK_G], 0.0, tl.float32)
    if SINKS:
        sink = load_sinks(sinks + sample * sink_sample, head * members + member, valid, queries)
        top = tl.maximum(top, sink)
        total = tl.exp(sink - top)
    top = tl.where(top == float("-inf"), 0.0, top)
    acc = tl.full([BLOCK_G, BLOCK_D], 0.0, tl.float32)
    total, acc = weighted_sum(
        partial, partial_sums, 0, tail_splits, rows, valid, all_rows, columns, dim, top, total, acc, BLOCK_S
    )
    if SEGMENTS > 0:
        total, acc = expanded(
            latent, latent_sums, 0, splits0, rows, valid, all_rows, top, total, acc,
            basis0 + (sample * heads + head) * rank0 * dim, rank0, columns, dim,
            BLOCK_G, BLOCK_S, BLOCK_V,
        )  # fmt: skip
    if SEGMENTS > 1:
        total, acc = expanded(
            latent, latent_sums, splits0, splits0 + splits1, rows, valid, all_rows, top, total, acc,
            basis1 + (sample * heads + head) * rank1 * dim, rank1, columns, dim,
            BLOCK_G, BLOCK_S, BLOCK_V,
        )  # fmt: skip
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    cells = out + rows[:, None] * dim + columns[None, :]
    tl.store(cells, acc.to(out.dtype.element_ty), mask=valid[:, None] & (columns < dim)[None, :])
    if SUMS:
        merged = tl.where(total > 0, top + tl.log(tl.where(total > 0, total, 1.0)), float("-inf"))
        if tl.program_id(2) == 0:
            tl.store(log_sums + rows, merged, mask=valid)


@triton.jit
def highest(sums, splits, rows, valid, all_rows, top, BLOCK_S: tl.constexpr):
    """The largest log-sum-exp of each row, at least `top`."""
    for first in range(0, splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        there = (split < splits)[:, None] & valid[None, :]
        seen = tl.load(sums + split[:, None] * all_rows + rows[None, :], mask=there, other=float("-inf"))
        top = tl.maximum(top, tl.max(seen, 0))
    return top


@triton.jit
def weighted_sum(
    parts, sums, begin, end, rows, valid, all_rows, columns, width, top, total, acc, BLOCK_S: tl.constexpr
):
    """Add splits begin .. end - 1, weighted, to `acc` `[G, columns]`, and their weights to `total`."""
    for first in range(begin, end, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        there = (split < end)[:, None] & valid[None, :]
        place = split[:, None] * all_rows + rows[None, :]
        weight = tl.exp(tl.load(sums + place, mask=there, other=float("-inf")) - top[None, :])
        cells = parts + place[:, :, None] * width + columns[None, None, :]
        part = tl.load(cells, mask=there[:, :, None] & (columns < width)[None, None, :], other=0)
        acc += tl.sum(part * weight[:, :, None], 0)
        total += tl.sum(weight, 0)
    return total, acc


@triton.jit
def expanded(
    latent, sums, begin, end, rows, valid, all_rows, top, total, acc, basis, rank, columns, dim,
    BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Add the latent splits begin .. end - 1 of one segment, expanded by its basis."""
    ranks = tl.arange(0, BLOCK_V)
    mixed = tl.full([BLOCK_G, BLOCK_V], 0.0, tl.float32)
    total, mixed = weighted_sum(
        latent, sums, begin, end, rows, valid, all_rows, ranks, BLOCK_V, top, total, mixed, BLOCK_S
    )
    tile = tl.load(
        basis + ranks[:, None] * dim + columns[None, :],
        mask=(ranks < rank)[:, None] & (columns < dim)[None, :],
        other=0,
    )
    if BLOCK_G < 16:  # too few rows for tensor cores
        acc += tl.sum(mixed[:, :, None] * tile.to(tl.float32)[None, :, :], 1)
    else:
        acc += tl.dot(mixed.to(tile.dtype), tile, input_precision="ieee")
    return total, acc


def combine(
    problem: Problem,
    out: Tensor,
    latent: Tensor,
    latent_sums: Tensor,
    splits: list[Any],
    partial: Tensor,
    partial_sums: Tensor,
    tail_splits: Any,
    weights: bool,
) -> Tensor:
    """Launch the kernel on the results of all splits; returns the log-sum-exps `[B, Hq * Tq]` where asked for."""
    query = problem.query
    members = problem.group * query.shape[2]
    sums = query.new_empty((query.shape[0], problem.rows), dtype=torch.float32) if weights else problem.index
    (basis0, basis1), sizes = problem.pair("value_basis"), problem.segment_arguments()
    block_g, block_d = combine_tile(query, members, problem.block_v, problem.block_dv)
    wrap_triton(combine_kernel)[
        (query.shape[0] * problem.heads, cdiv(members, block_g), cdiv(problem.value_tail.shape[3], block_d))
    ](
        latent=latent,
        latent_sums=latent_sums,
        partial=partial,
        partial_sums=partial_sums,
        basis0=basis0,
        basis1=basis1,
        out=out,
        log_sums=sums,
        heads=problem.heads,
        members=members,
        queries=query.shape[2],
        rank0=sizes["value_rank0"],
        rank1=sizes["value_rank1"],
        dim=problem.value_tail.shape[3],
        splits0=splits[0] if splits else 0,
        splits1=splits[1] if len(splits) > 1 else 0,
        tail_splits=tail_splits,
        SEGMENTS=len(problem.segments),
        SUMS=weights,
        BLOCK_G=block_g,
        BLOCK_S=max(1, 2048 // (block_g * max(problem.block_v, block_d))),
        BLOCK_V=problem.block_v,
        BLOCK_D=block_d,
        num_warps=4,
        num_stages=2,
        **problem.sink_arguments(),
    )
    return sums
