"""Attention to keys kept before rotary embedding: which kernels run.

rebuilt, combine            key tiles are rebuilt and rotated
tables, split, combine      queries are turned by every position of an axis instead, where that is less
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import wrap_triton

from attnpack_fx.kernels.parts import Angles
from attnpack_fx.kernels.triton.combine import combine
from attnpack_fx.kernels.triton.launch import BASIS_ROWS, LEAST, block, cdiv, per_program, processors
from attnpack_fx.kernels.triton.problem import Problem
from attnpack_fx.kernels.triton.rebuilt import rebuilt_kernel
from attnpack_fx.kernels.triton.split import split_kernel
from attnpack_fx.kernels.triton.tables import tables_kernel

#: Numbers of tables that `split` reads for a token and KV head, up to which it beats rebuilding the key: one for each
#: axis, query row and rank. They come from L2, and as many in the time in which tensor cores rebuild a key.
SPLIT_NUMBERS = 128
#: Most rotary axes that `split` takes. Tables of one axis would be as long as the tokens.
SPLIT_AXES = 4
#: Pairs of rotated dims that `rebuilt` rebuilds at a time: their keys, cos and sin stay in registers.
CHUNK = 32


def attend_unrotated(problem: Problem, out: Tensor, scores: Tensor, weights: bool, angles: Angles[Tensor]) -> Tensor:
    """Attend in the way that is less work; returns the log-sum-exps `[B, Hq * Tq]`."""
    if angles.axes is not None and _fits_split(problem, angles.cos, angles.axes):
        return _split_by_axis(problem, out, angles, angles.axes, scores, weights)
    return _rebuilt(problem, out, angles, scores, weights)


def _rebuilt(problem: Problem, out: Tensor, angles: Angles[Tensor], scores: Tensor, weights: bool) -> Tensor:
    """Rebuild and rotate key tiles, combine; returns the log-sum-exps `[B, Hq * Tq]`."""
    query = problem.query
    batch, device = query.shape[0], query.device
    blocks = cdiv(problem.group * query.shape[2], problem.block_g)
    rows_per_split, tail_splits = problem.tail_splits(blocks)
    partial, partial_sums = problem.partials(tail_splits, problem.value_tail.shape[3])
    tile = 64 if query.dtype != torch.float32 else 32  # rows that a warpgroup multiplies
    heads = _heads_of_a_program(problem, tile)
    programs = batch * (problem.heads // heads)
    tokens_per_split = per_program(problem.packed, programs * blocks, tile, device)
    splits = [cdiv(segment.key.shape[1], tokens_per_split) for segment in problem.segments]
    latent, latent_sums = problem.partials(sum(splits), problem.block_v)
    cos, sin = angles.cos.contiguous(), angles.sin.contiguous()
    axes = problem.index if angles.axes is None else angles.axes.contiguous()
    rotated = 2 * int(cos.shape[2])
    wide = problem.block_r > 64 or problem.block_d > 128 or problem.block_g > LEAST or query.dtype == torch.float32
    rest, pairs = query.shape[3] - rotated, min(block(rotated // 2), 16 if problem.block_g > LEAST else CHUNK)
    basis_rows = min(problem.block_r, 32)
    (key0, key1), (value0, value1) = problem.pair("key"), problem.pair("value")
    basis0, basis1 = problem.pair("key_basis")
    wrap_triton(rebuilt_kernel)[(programs, blocks, sum(splits) + tail_splits * heads)](
        key0=key0,
        key1=key1,
        basis0=basis0,
        basis1=basis1,
        value0=value0,
        value1=value1,
        cos=cos,
        sin=sin,
        axes=axes,
        latent=latent,
        latent_sums=latent_sums,
        partial=partial,
        partial_sums=partial_sums,
        scores_out=scores,
        splits0=splits[0],
        splits=sum(splits),
        tokens_per_split=tokens_per_split,
        angle_sample=0 if cos.shape[0] == 1 else cos.stride(0),
        axes_sample=0 if axes.shape[0] == 1 else axes.stride(0),
        rows_per_split=rows_per_split,
        INTERLEAVED=angles.interleaved,
        ROTATED=rotated,
        AXES=0 if angles.axes is None else angles.axes.shape[1],
        shared=heads,
        SCORES=weights,
        BLOCK_N=tile,
        BLOCK_ROWS=16,
        BLOCK_BASIS=basis_rows,
        STEPS=problem.block_r // basis_rows,
        BLOCK_V=problem.block_v,
        BLOCK_E=pairs,
        CHUNKS=cdiv(rotated // 2, pairs),
        BLOCK_REST=block(rest) if rest else 0,
        num_warps=8 if wide else 4,
        num_stages=1,  # staging gathered rows in shared memory would take all of it
        **problem.shared_arguments(),
        **problem.segment_arguments(),
    )
    return combine(problem, out, latent, latent_sums, splits, partial, partial_sums, tail_splits, weights)


def _heads_of_a_program(problem: Problem, tile: int) -> Any:
    """KV heads whose keys a program of `rebuilt` rebuilds.

    No more than tensor cores take query rows of, and than leave a program of one tile for every multiprocessor.
    """
    query, heads = problem.query, problem.heads
    most = 1 if query.shape[2] > 1 else LEAST // problem.group
    work, count = query.shape[0] * cdiv(problem.packed, tile), processors(query.device)
    taken = 1
    for shared in (2, 4):
        if shared <= most and heads % shared == 0:
            enough = torch.sym_min(work * (heads // shared) // count, 1)
            taken = taken + (shared - shared // 2) * enough
    return taken


def _fits_split(problem: Problem, cos: Tensor, axes: Tensor) -> bool:
    """Whether `split` takes the problem, and is the faster way."""
    query = problem.query
    offsets = cos.shape[1] * problem.rows * problem.block_r
    return bool(
        1 < axes.shape[1] <= SPLIT_AXES
        and 2 * cos.shape[2] == query.shape[3]
        and axes.shape[1] * problem.group * query.shape[2] * problem.block_r <= SPLIT_NUMBERS
        and offsets < 2**31
    )


def _split_by_axis(
    problem: Problem, out: Tensor, angles: Angles[Tensor], axes: Tensor, scores: Tensor, weights: bool
) -> Tensor:
    """Tables of turned queries, attention to packed tokens, combine; returns the log-sum-exps `[B, Hq * Tq]`."""
    query, segments = problem.query, problem.segments
    batch, device, positions = query.shape[0], query.device, angles.cos.shape[1]
    blocks = cdiv(problem.group * query.shape[2], problem.block_g)
    rows_per_split, tail_splits = problem.tail_splits(blocks)
    partial, partial_sums = problem.partials(tail_splits, problem.value_tail.shape[3])
    tables = query.new_empty((len(segments), batch, positions, problem.rows, problem.block_r))
    basis_rows, position_rows = min(problem.block_r, BASIS_ROWS if problem.block_d <= 128 else 32), 16
    cos, sin, axes = angles.cos.contiguous(), angles.sin.contiguous(), axes.contiguous()
    (basis0, basis1), sizes = problem.pair("key_basis"), problem.segment_arguments()
    parts = len(segments) * cdiv(positions, position_rows) * (problem.block_r // basis_rows)
    wrap_triton(tables_kernel)[(batch * problem.heads, blocks, parts + tail_splits)](
        basis0=basis0,
        basis1=basis1,
        cos=cos,
        sin=sin,
        tables=tables,
        partial=partial,
        log_sums=partial_sums,
        scores_out=scores,
        rank0=sizes["key_rank0"],
        rank1=sizes["key_rank1"],
        positions=positions,
        angle_sample=0 if cos.shape[0] == 1 else cos.stride(0),
        rows_per_split=rows_per_split,
        INTERLEAVED=angles.interleaved,
        SCORES=weights,
        BLOCK_N=problem.tail_tile,
        BLOCK_P=position_rows,
        BLOCK_BASIS=basis_rows,
        BLOCK_R=problem.block_r,
        BLOCK_E=block(query.shape[3] // 2),
        num_warps=4,
        num_stages=2,
        **problem.shared_arguments(),
    )
    block_m, tile = 16, 32 if max(problem.block_r, problem.block_v) <= 32 and axes.shape[1] <= 3 else 16
    row_blocks = cdiv(problem.rows, block_m)
    tokens_per_split = per_program(problem.packed, batch * row_blocks, tile, device)
    splits = [cdiv(segment.key.shape[1], tokens_per_split) for segment in segments]
    latent, latent_sums = problem.partials(sum(splits), problem.block_v)
    (key0, key1), (value0, value1) = problem.pair("key"), problem.pair("value")
    arguments = problem.mask_arguments()
    del arguments["mask_tokens"]
    wrap_triton(split_kernel)[(sum(splits), batch, row_blocks)](
        tables=tables,
        axes=axes,
        key0=key0,
        key1=key1,
        value0=value0,
        value1=value1,
        partial=latent,
        log_sums=latent_sums,
        scores_out=scores,
        index=problem.index,
        splits0=splits[0],
        tokens_per_split=tokens_per_split,
        positions=positions,
        axes_sample=0 if axes.shape[0] == 1 else axes.stride(0),
        packed=problem.packed,
        all_rows=problem.rows,
        queries=query.shape[2],
        slots=problem.index.shape[1],
        all_slots=problem.packed + problem.length,
        SEGMENTS=len(segments),
        AXES=axes.shape[1],
        RAGGED=problem.ragged,
        SCORES=weights,
        BLOCK_M=block_m,
        BLOCK_N=tile,
        BLOCK_K=16,
        BLOCK_R=problem.block_r,
        BLOCK_V=problem.block_v,
        num_warps=8 if problem.block_v > 128 else 4,
        num_stages=1,  # staging gathered rows in shared memory would leave room for one program
        **sizes,
        **arguments,
    )
    return combine(problem, out, latent, latent_sums, splits, partial, partial_sums, tail_splits, weights)
