"""Attention over packed parts on a GPU: which kernels run, with which tiles, over which buffers.

    short cache, or many queries   fused                          1 launch
    decode step                    absorb, tokens, combine        3 launches
    keys before rotary embedding   rebuilt, combine               2 launches
      split by rotary axis         tables, split, combine         3 launches
    several blocks, few bits       absorb_coded, tokens_coded, combine_coded (`coded.py`)   3 launches

Splits of a segment and of the tail are partial results `[splits, B, Hq * Tq, ...]` that `combine` merges. Everything
that depends on a number of tokens is an argument of the kernels; the choice between the first two ways guards on it
once. Products are of precision `ieee`: fp32 is not rounded in them, as PyTorch does it, and other dtypes have no other.
"""

import torch
from torch import Tensor
from torch.library import wrap_triton

from attnpack_fx.kernels.parts import Block, PackedParts, kind, tensors_of
from attnpack_fx.kernels.triton.absorb import absorb_kernel
from attnpack_fx.kernels.triton.blocks import alike, contiguous, low_rank, stored, takes_parts
from attnpack_fx.kernels.triton.coded import CodedProblem, attend_coded, takes_rotary
from attnpack_fx.kernels.triton.combine import combine
from attnpack_fx.kernels.triton.fused import fused_kernel
from attnpack_fx.kernels.triton.launch import (
    BASIS_ROWS,
    block,
    cdiv,
    least_tokens,
    per_program,
    processors,
)
from attnpack_fx.kernels.triton.problem import Problem, Segment
from attnpack_fx.kernels.triton.tokens import tokens_kernel
from attnpack_fx.kernels.triton.unrotated import attend_unrotated

#: Most bytes of coefficients that a program of `fused` reads: about what it gets from L2 in the time two launches take.
FUSED_BYTES = 384 << 10
#: Programs of `fused` per multiprocessor, beyond which re-reading coefficients per head costs more than launches.
FUSED_PROGRAMS = 3
#: Multiprocessors to a program of `fused`, beyond which too many of them idle.
FUSED_IDLE = 8
#: Largest basis tile that `fused` keeps on chip.
FUSED_TILE_BYTES = 64 << 10
#: Largest head dim.
MOST_DIMS = 256
#: Segments that one launch takes.
MAX_SEGMENTS = 2


def takes(query: Tensor, keys: PackedParts[Tensor], values: PackedParts[Tensor]) -> bool:
    """Whether the kernels take these arguments of `ops.attention`: all of one dtype, few segments, no giant heads.

    For ATen are also: bases that samples choose from; coded rows before rotary embedding, other keys before it where
    dims are paired with their neighbours and they are in several blocks, in few bits or with a shared basis; keys and
    values in unlike segments, or of unequally many tokens but for coded rows at the end.
    """
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return False
    if query.dtype != keys.tail.dtype or query.dtype != values.tail.dtype:
        return False
    if max(keys.tail.shape[3], values.tail.shape[3]) > MOST_DIMS:
        return False
    key_parts, value_parts = stored(keys), stored(values)
    if len(low_rank(key_parts)) > MAX_SEGMENTS or not alike(key_parts, value_parts):
        return False
    # Offsets within a sample are 32-bit: they take half the registers.
    first = [next(iter(tensors_of(block).values())) for block in (*keys.blocks, *values.blocks)]
    if not all(c.shape[1] * max(c.shape[2], MOST_DIMS) < 2**31 for c in first):
        return False
    factors = _plain(query, keys, values)
    if factors is None:
        turned = keys.angles is None or takes_rotary(key_parts, keys.angles)
        return turned and takes_parts(key_parts, value_parts, query)
    return all(
        factor.dtype == query.dtype for each in factors for block in each for factor in tensors_of(block).values()
    )


def attention(
    query: Tensor,
    keys: PackedParts[Tensor],
    values: PackedParts[Tensor],
    mask: Tensor | None,
    scale: float,
    cap: float = 0.0,
    sinks: Tensor | None = None,
    weights: bool = False,
) -> tuple[Tensor, Tensor]:
    """See `ops.attention` and `ops.attention_weights`; without `weights`, the second result means nothing."""
    if query.stride(3) != 1:
        query = query.contiguous()
    while mask is not None and mask.dim() < 4:
        mask = mask.unsqueeze(0)
    key_tail, value_tail, index, length = (
        keys.tail.contiguous(),
        values.tail.contiguous(),
        keys.index.contiguous(),
        keys.length,
    )
    sinks = None if sinks is None else sinks.contiguous()
    batch, heads, queries, _ = query.shape
    others = key_tail, value_tail, length, index, mask, scale, keys.ragged, cap, sinks
    problem: Problem
    factors = _plain(query, keys, values)
    if factors is None:
        problem = CodedProblem(query, [], *others, contiguous(stored(keys)), contiguous(stored(values)))
    else:
        segments = [
            Segment(*(factor.contiguous() for block in pair for factor in (block.coefficient, block.basis)))
            for pair in zip(*factors, strict=True)
            if pair[0].coefficient.shape[1]
        ]
        problem = Problem(query, segments, *others)
    out = query.new_empty((batch, heads, queries, value_tail.shape[3]))
    if not problem.tokens and length == 0:
        return out.zero_(), query.new_zeros((batch, 0), dtype=torch.float32)
    scores = query.new_empty((batch, heads, problem.packed + length), dtype=torch.float32) if weights else index
    if isinstance(problem, CodedProblem):
        sums = attend_coded(problem, out, scores, weights, keys.angles)
    elif keys.angles is not None and problem.segments:
        sums = attend_unrotated(problem, out, scores, weights, keys.angles)
    elif not weights and fits_fused(problem):
        _fused(problem, out)
        return out, scores
    else:
        sums = _split(problem, out, scores, weights)
    if not weights:
        return out, scores
    last = sums.view(batch, heads, queries).narrow(2, queries - 1, 1)
    # A row that saw no token has no weights; its log-sum-exp is -inf, as are its scores.
    return out, torch.exp(scores - last.clamp(min=torch.finfo(torch.float32).min)).mean(1)


def _plain(
    query: Tensor, keys: PackedParts[Tensor], values: PackedParts[Tensor]
) -> tuple[list[Block[Tensor]], list[Block[Tensor]]] | None:
    """The blocks of keys and of values where every segment is one, as it is, with a basis for every sample."""
    found = [[block for segment in parts.segments for block in segment.factors] for parts in (keys, values)]
    for parts, blocks in zip((keys, values), found, strict=True):
        if len(blocks) != len(parts.blocks) or len(blocks) != len(parts.segments):
            return None
        if any(kind(block) or block.basis.shape[0] != query.shape[0] for block in blocks):
            return None
    return found[0], found[1]


def fits_fused(problem: Problem) -> bool:
    """Whether one launch is the faster way. Guards on the number of packed tokens where it is symbolic."""
    segments, query = problem.segments, problem.query
    size = query.element_size()
    tile = max(problem.block_r * problem.block_d, problem.block_v * problem.block_dv) * size
    if tile > FUSED_TILE_BYTES:
        return False
    if query.shape[2] > 1:
        return True
    if not segments:  # a dense tail alone is best split, and nothing is saved by waiting for no other kernel
        return False
    programs = query.shape[0] * problem.heads * cdiv(problem.group, problem.block_g)
    read = sum(s.key.shape[1] * (s.key.shape[2] + s.value.shape[2]) * size for s in segments)
    there = processors(query.device)
    return bool(there <= FUSED_IDLE * programs <= FUSED_IDLE * FUSED_PROGRAMS * there and read <= FUSED_BYTES)


def _fused(problem: Problem, out: Tensor) -> None:
    arguments = problem.shared_arguments() | problem.segment_arguments() | problem.sink_arguments()
    (key0, key1), (value0, value1) = problem.pair("key"), problem.pair("value")
    (key_basis0, key_basis1), (value_basis0, value_basis1) = problem.pair("key_basis"), problem.pair("value_basis")
    grid = (problem.query.shape[0] * problem.heads, cdiv(problem.group * problem.query.shape[2], problem.block_g))
    wide = max(problem.block_r, problem.block_v, problem.block_d, problem.block_dv) > 128 or problem.block_g > 16
    wrap_triton(fused_kernel)[grid](
        key0=key0,
        key1=key1,
        key_basis0=key_basis0,
        key_basis1=key_basis1,
        value0=value0,
        value1=value1,
        value_basis0=value_basis0,
        value_basis1=value_basis1,
        out=out,
        BLOCK_N=64 if problem.query.dtype != torch.float32 and problem.block_g == 16 else 32,
        BLOCK_ROWS=32,
        BLOCK_R=problem.block_r,
        BLOCK_V=problem.block_v,
        num_warps=8 if wide or problem.query.dtype == torch.float32 else 4,
        num_stages=2,
        **arguments,
    )


def _split(problem: Problem, out: Tensor, scores: Tensor, weights: bool) -> Tensor:
    """Absorb, attend to packed tokens, combine; returns the log-sum-exps `[B, Hq * Tq]`."""
    query, segments = problem.query, problem.segments
    batch, device = query.shape[0], query.device
    blocks = cdiv(problem.group * query.shape[2], problem.block_g)
    rows_per_split, tail_splits = problem.tail_splits(blocks)
    partial, partial_sums = problem.partials(tail_splits, problem.value_tail.shape[3])
    latent_query = query.new_empty((len(segments), batch, problem.rows, problem.block_r))
    basis_rows = min(problem.block_r, BASIS_ROWS)
    (basis0, basis1), sizes = problem.pair("key_basis"), problem.segment_arguments()
    wrap_triton(absorb_kernel)[
        (batch * problem.heads, blocks, len(segments) * (problem.block_r // basis_rows) + tail_splits)
    ](
        basis0=basis0,
        basis1=basis1,
        latent=latent_query,
        partial=partial,
        log_sums=partial_sums,
        scores_out=scores,
        rank0=sizes["key_rank0"],
        rank1=sizes["key_rank1"],
        rows_per_split=rows_per_split,
        SCORES=weights,
        BLOCK_N=problem.tail_tile,
        BLOCK_BASIS=basis_rows,
        BLOCK_R=problem.block_r,
        num_warps=8 if query.dtype == torch.float32 else 4,
        num_stages=2,
        **problem.shared_arguments(),
    )
    block_m, tile = _token_tile(problem)
    row_blocks = cdiv(problem.rows, block_m)
    read = (problem.block_r + problem.block_v) * query.element_size()
    least = least_tokens(read, 4 * block_m * problem.block_v)
    tokens_per_split = per_program(problem.packed, batch * row_blocks, tile, device, least)
    splits = [cdiv(segment.key.shape[1], tokens_per_split) for segment in segments]
    latent, latent_sums = problem.partials(sum(splits), problem.block_v)
    if segments:
        (key0, key1), (value0, value1) = problem.pair("key"), problem.pair("value")
        arguments = problem.mask_arguments()
        del arguments["mask_tokens"]
        wide = query.dtype == torch.float32 or max(problem.block_r, problem.block_v) * block_m > 64 * 64
        wrap_triton(tokens_kernel)[(sum(splits), batch, row_blocks)](
            latent=latent_query,
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
            all_rows=problem.rows,
            queries=query.shape[2],
            slots=problem.index.shape[1],
            all_slots=problem.packed + problem.length,
            SEGMENTS=len(segments),
            RAGGED=problem.ragged,
            SCORES=weights,
            BLOCK_M=block_m,
            BLOCK_N=tile,
            BLOCK_R=problem.block_r,
            BLOCK_V=problem.block_v,
            num_warps=8 if wide else 4,
            num_stages=2 if wide else 3,
            **sizes,
            **arguments,
        )
    return combine(problem, out, latent, latent_sums, splits, partial, partial_sums, tail_splits, weights)


def _token_tile(problem: Problem) -> tuple[int, int]:
    """Query rows and tokens that a program of `tokens` multiplies at a time."""
    wide = max(problem.block_r, problem.block_v)
    rows = min(block(problem.rows), 64) if problem.query.shape[2] == 1 else 64
    if wide > 128:
        rows = min(rows, 32)
    return rows, 64 if problem.query.dtype != torch.float32 and wide <= 128 else 32
