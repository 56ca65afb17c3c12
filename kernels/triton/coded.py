"""Attention over segments of several blocks, in few bits or of coded rows, on a GPU: which kernels run.

    absorb_coded, tokens_coded, combine_coded     3 launches; without low-rank segments the second is not needed
    rebuilt_coded, combine_coded                  2 launches, for keys before rotary embedding

Codes become numbers in registers and are never written. As in `attend.py`, whatever depends on a number of tokens is an
argument of the kernels; formats, ranks and head dims are compiled in.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.library import wrap_triton

from attnpack_fx.kernels.parts import Angles, Block, Rows, tensors_of, tokens_of
from attnpack_fx.kernels.triton.absorb_coded import absorb_coded_kernel
from attnpack_fx.kernels.triton.blocks import (
    MOST_BLOCKS,
    Form,
    Part,
    key_forms,
    low_rank,
    part_tokens,
    rows_form,
    value_forms,
)
from attnpack_fx.kernels.triton.combine_coded import combine_coded_kernel
from attnpack_fx.kernels.triton.launch import block, cdiv, combine_tile, least_tokens, per_program
from attnpack_fx.kernels.triton.problem import Problem
from attnpack_fx.kernels.triton.rebuilt_coded import rebuilt_coded_kernel
from attnpack_fx.kernels.triton.tokens_coded import tokens_coded_kernel

#: Rotary axes of keys before rotary embedding that are looked up one by one.
MOST_AXES = 4
_ROW_TENSORS = ("codes", "scale", "zero", "group_of", "codebook", "norm")


@dataclass(frozen=True)
class CodedProblem(Problem):
    """A problem whose segments are blocks: of keys and of values, segment by segment, and no `segments`."""

    keys: list[Part]
    values: list[Part]

    @property
    def tokens(self) -> list[int]:
        return list(map(part_tokens, self.keys))

    @cached_property
    def low_rank(self) -> "LowRank":
        """The low-rank segments."""
        slots = accumulate(self.tokens, initial=0)
        first_slots = [slot for slot, part in zip(slots, self.keys, strict=False) if not isinstance(part, Rows)]
        return LowRank(low_rank(self.keys), low_rank(self.values), first_slots, self)

    @cached_property
    def rows_of(self) -> tuple[Rows[Tensor] | None, Rows[Tensor] | None, int]:
        """The coded rows of keys and values, and their first slot."""
        slots = accumulate(self.tokens, initial=0)
        for slot, key, value in zip(slots, self.keys, self.values, strict=False):
            if isinstance(key, Rows) and isinstance(value, Rows):
                return key, value, slot
        return None, None, 0


class LowRank:
    """Low-rank segments as the kernels take them: tensors of all blocks in a row, and forms by segment."""

    def __init__(
        self,
        keys: list[list[Block[Tensor]]],
        values: list[list[Block[Tensor]]],
        first_slots: list[int],
        problem: Problem,
    ) -> None:
        self.keys = [each for blocks in keys for each in blocks]
        self.values = [each for blocks in values for each in blocks]
        self.first_slots, self.tokens = first_slots, [tokens_of(blocks[0]) for blocks in keys]
        self.key_forms, self.key_width, self.parts = key_forms(keys, problem.query.shape[3])
        self.value_forms, self.value_width = value_forms(values, problem.value_tail.shape[3])

    @property
    def widest(self) -> int:
        """Ranks of one segment, padded."""
        return max((sum(form[5] for form in alike) for alike in (*self.key_forms, *self.value_forms)), default=16)


@dataclass(frozen=True)
class Results:
    """Partial results of splits: sums fp32 `[splits, B, Hq * Tq]`; shares: see `tokens_coded.py`."""

    parts: Tensor
    sums: Tensor
    splits: list[Any]
    shares: Tensor


def takes_rotary(keys: Sequence[Part], angles: Angles[Tensor]) -> bool:
    """Whether keys in blocks are taken before rotary embedding: low rank, halves of dims in whole bytes, few axes."""
    few = angles.axes is None or angles.axes.shape[1] <= MOST_AXES
    return few and len(low_rank(keys)) == len(keys) and angles.cos.shape[2] % 4 == 0 and not angles.interleaved


def attend_coded(
    problem: CodedProblem, out: Tensor, scores: Tensor, weights: bool, angles: Angles[Tensor] | None
) -> Tensor:
    """Absorb, attend to coded tokens, combine; returns the log-sum-exps `[B, Hq * Tq]`.

    angles: of keys before rotary embedding, which are rebuilt instead of queries absorbed.
    """
    packed = Results(problem.index, problem.index, [], problem.index)
    if angles is not None and problem.low_rank.keys:
        packed, dense = _rebuild(problem, scores, weights, angles)
        return _combine(problem, out, packed, dense, weights)
    latent, shift, dense = _absorb(problem, scores, weights)
    if problem.low_rank.keys:
        packed = _tokens(problem, latent, shift, scores, weights)
    return _combine(problem, out, packed, dense, weights)


def _absorb(problem: CodedProblem, scores: Tensor, weights: bool) -> tuple[Tensor, Tensor, Results]:
    """Latent queries, what is added to their scores, and attention to coded rows and tail rows."""
    query, low_rank = problem.query, problem.low_rank
    batch, dim, value_dim = query.shape[0], query.shape[3], problem.value_tail.shape[3]
    blocks = cdiv(problem.group * query.shape[2], problem.block_g)
    latent = shift = problem.index
    if low_rank.parts:
        latent = query.new_empty((batch, problem.rows, low_rank.key_width))
    if _asymmetric(low_rank.key_forms):
        shift = query.new_empty((low_rank.parts, batch, problem.rows), dtype=torch.float32)
    keys, values, first_slot = problem.rows_of
    key_count, value_count = 0, 0
    forms: tuple[Form, Form] = ((), ())
    if keys is not None and values is not None:
        key_count, value_count, forms = (
            tokens_of(keys),
            tokens_of(values),
            (rows_form(keys, dim), rows_form(values, value_dim)),
        )
    both, most = torch.sym_min(key_count, value_count), torch.sym_max(key_count, value_count)
    programs, tile = batch * problem.heads * blocks, problem.tail_tile
    counts = both, most - both, problem.length - (most - key_count)
    per_split = [per_program(count, programs, tile, query.device) for count in counts]
    splits = [cdiv(count, each) for count, each in zip(counts, per_split, strict=True)]
    partial, partial_sums = problem.partials(sum(splits), value_dim)
    arguments = problem.shared_arguments()
    del arguments["SEGMENTS"]
    wrap_triton(absorb_coded_kernel)[(batch * problem.heads, blocks, low_rank.parts + sum(splits))](
        latent=latent,
        shift=shift,
        partial=partial,
        log_sums=partial_sums,
        scores_out=scores,
        key_count=key_count,
        value_count=value_count,
        coded_slot=first_slot,
        coded_per_split=per_split[0],
        coded_splits=splits[0],
        mixed_per_split=per_split[1],
        mixed_splits=splits[1],
        rows_per_split=per_split[2],
        key_groups=0 if keys is None else keys.scale.shape[1],
        value_groups=0 if values is None else values.scale.shape[1],
        KEYS=low_rank.key_forms,
        PARTS=low_rank.parts,
        ROW_KEYS=forms[0],
        ROW_VALUES=forms[1],
        DIM=dim,
        KEY_WIDTH=low_rank.key_width,
        SCORES=weights,
        BLOCK_N=tile,
        BLOCK_ROWS=16,  # more would spill
        num_warps=8 if query.dtype == torch.float32 else 4,
        num_stages=2,
        **_named("basis", [each.basis for each in low_rank.keys], problem.index),
        **_named("scale", [each.scale for each in low_rank.keys], problem.index),
        **_row_tensors("key", keys, problem.index),
        **_row_tensors("value", values, problem.index),
        **arguments,
    )
    return latent, shift, Results(partial, partial_sums, [sum(splits)], problem.index)


def _rebuild(problem: CodedProblem, scores: Tensor, weights: bool, angles: Angles[Tensor]) -> tuple[Results, Results]:
    """Attention to low-rank segments by keys rebuilt and rotated, and to tail rows."""
    query, low_rank = problem.query, problem.low_rank
    batch, dim = query.shape[0], query.shape[3]
    blocks = cdiv(problem.group * query.shape[2], problem.block_g)
    rows_per_split, tail_splits = problem.tail_splits(blocks)
    dense = Results(*problem.partials(tail_splits, problem.value_tail.shape[3]), [tail_splits], problem.index)
    tile = 32
    tokens_per_split = per_program(sum(low_rank.tokens), batch * problem.heads * blocks, tile, query.device)
    packed = _room(problem, [cdiv(tokens, tokens_per_split) for tokens in low_rank.tokens])
    cos, sin = angles.cos.contiguous(), angles.sin.contiguous()
    axes = problem.index if angles.axes is None else angles.axes.contiguous()
    rotated = 2 * int(cos.shape[2])
    arguments = problem.shared_arguments()
    del arguments["SEGMENTS"]
    wrap_triton(rebuilt_coded_kernel)[(batch * problem.heads, blocks, sum(packed.splits) + tail_splits)](
        cos=cos,
        sin=sin,
        axes=axes,
        latent=packed.parts,
        shares=packed.shares,
        latent_sums=packed.sums,
        partial=dense.parts,
        partial_sums=dense.sums,
        scores_out=scores,
        splits=sum(packed.splits),
        tokens_per_split=tokens_per_split,
        angle_sample=0 if cos.shape[0] == 1 else cos.stride(0),
        axes_sample=0 if axes.shape[0] == 1 else axes.stride(0),
        rows_per_split=rows_per_split,
        KEYS=low_rank.key_forms,
        DIM=dim,
        ROTATED=rotated,
        AXES=0 if angles.axes is None else angles.axes.shape[1],
        SCORES=weights,
        BLOCK_N=tile,
        BLOCK_ROWS=16,
        BLOCK_E=block(rotated // 2),
        BLOCK_REST=block(dim - rotated) if dim > rotated else 0,
        num_warps=4 if angles.axes is None and query.dtype != torch.float32 else 8,
        num_stages=2 if angles.axes is None else 1,  # staging gathered rows in shared memory would take all of it
        **_named("basis", [each.basis for each in low_rank.keys], problem.index),
        **_named("scale", [each.scale for each in low_rank.keys], problem.index),
        **_token_arguments(problem, packed),
        **arguments,
    )
    return packed, dense


def _tokens(problem: CodedProblem, latent: Tensor, shift: Tensor, scores: Tensor, weights: bool) -> Results:
    """Attention to low-rank segments by latent queries."""
    query, low_rank = problem.query, problem.low_rank
    batch = query.shape[0]
    block_m, tile = _token_tile(problem)
    row_blocks = cdiv(problem.rows, block_m)
    factors = [each.coefficient for each in (*low_rank.keys, *low_rank.values)]
    read = sum(each.shape[2] * each.element_size() for each in factors) // len(low_rank.tokens)
    least = least_tokens(read, 4 * block_m * low_rank.value_width)
    tokens_per_split = per_program(sum(low_rank.tokens), batch * row_blocks, tile, query.device, least)
    packed = _room(problem, [cdiv(tokens, tokens_per_split) for tokens in low_rank.tokens])
    arguments = problem.mask_arguments()
    del arguments["mask_tokens"]
    wide = query.dtype == torch.float32 or low_rank.widest * block_m > 64 * 64
    wrap_triton(tokens_coded_kernel)[(sum(packed.splits), batch, row_blocks)](
        latent=latent,
        shift=shift,
        partial=packed.parts,
        shares=packed.shares,
        log_sums=packed.sums,
        scores_out=scores,
        index=problem.index,
        tokens_per_split=tokens_per_split,
        all_rows=problem.rows,
        queries=query.shape[2],
        slots=problem.index.shape[1],
        all_slots=problem.packed + problem.length,
        KEYS=low_rank.key_forms,
        KEY_WIDTH=low_rank.key_width,
        RAGGED=problem.ragged,
        SCORES=weights,
        BLOCK_M=block_m,
        BLOCK_N=tile,
        num_warps=8 if wide else 4,
        num_stages=2 if wide else 3,
        **_token_arguments(problem, packed),
        **arguments,
    )
    return packed


def _room(problem: CodedProblem, splits: list[Any]) -> Results:
    """Where results of splits of low-rank segments are written."""
    low_rank, shares = problem.low_rank, problem.index
    if _asymmetric(low_rank.value_forms):
        lines = sum(splits), len(low_rank.values), problem.query.shape[0], problem.rows
        shares = problem.query.new_empty(lines, dtype=torch.float32)
    return Results(*problem.partials(sum(splits), low_rank.value_width), splits, shares)


def _token_arguments(problem: CodedProblem, packed: Results) -> dict[str, Any]:
    """What every kernel that reads coefficients takes."""
    low_rank = problem.low_rank
    return {
        "first_slot0": low_rank.first_slots[0],
        "first_slot1": low_rank.first_slots[-1],
        "tokens0": low_rank.tokens[0],
        "tokens1": low_rank.tokens[-1],
        "splits0": packed.splits[0],
        "VALUES": low_rank.value_forms,
        "VALUE_WIDTH": low_rank.value_width,
        "VALUE_BLOCKS": len(low_rank.values),
        **_named("key", [each.coefficient for each in low_rank.keys], problem.index),
        **_named("value", [each.coefficient for each in low_rank.values], problem.index),
        **_named("key_count", [tokens_of(each) for each in low_rank.keys], 0),
        **_named("value_count", [tokens_of(each) for each in low_rank.values], 0),
    }


def _combine(problem: CodedProblem, out: Tensor, packed: Results, dense: Results, weights: bool) -> Tensor:
    query, low_rank, value_dim = problem.query, problem.low_rank, problem.value_tail.shape[3]
    batch, members = query.shape[0], problem.group * query.shape[2]
    sums = query.new_empty((batch, problem.rows), dtype=torch.float32) if weights else problem.index
    widest = max((form[5] for forms in low_rank.value_forms for form in forms), default=16)
    block_g, block_d = combine_tile(query, members, widest, problem.block_dv)
    splits = [*packed.splits, 0, 0]
    wrap_triton(combine_coded_kernel)[(batch * problem.heads, cdiv(members, block_g), cdiv(value_dim, block_d))](
        latent=packed.parts,
        shares=packed.shares,
        latent_sums=packed.sums,
        partial=dense.parts,
        partial_sums=dense.sums,
        out=out,
        log_sums=sums,
        heads=problem.heads,
        members=members,
        queries=query.shape[2],
        splits0=splits[0],
        splits1=splits[1],
        dense_splits=dense.splits[0],
        VALUES=low_rank.value_forms,
        DIM=value_dim,
        VALUE_WIDTH=low_rank.value_width,
        VALUE_BLOCKS=len(low_rank.values),
        SUMS=weights,
        BLOCK_G=block_g,
        BLOCK_S=max(1, 2048 // (block_g * max(widest, block_d))),
        BLOCK_D=block_d,
        num_warps=4,
        num_stages=2,
        **problem.sink_arguments(),
        **_named("basis", [each.basis for each in low_rank.values], problem.index),
        **_named("scale", [each.scale for each in low_rank.values], problem.index),
    )
    return sums


def _named(name: str, given: Sequence[Any], absent: Any) -> dict[str, Any]:
    """Arguments `name0`, `name1`, ...; where there is none, one that is not read."""
    filled = [absent if each is None else each for each in given]
    return {f"{name}{number}": each for number, each in enumerate([*filled, *[absent] * (MOST_BLOCKS - len(filled))])}


def _row_tensors(kind: str, rows: Rows[Tensor] | None, absent: Tensor) -> dict[str, Tensor]:
    tensors = {} if rows is None else tensors_of(rows)
    return {f"{kind}_{name}": tensors.get(name, absent) for name in _ROW_TENSORS}


def _asymmetric(forms: Sequence[Sequence[Form]]) -> bool:
    return any(form[3] for alike in forms for form in alike)


def _token_tile(problem: CodedProblem) -> tuple[int, int]:
    """Query rows and tokens that a program of `tokens_coded` multiplies at a time."""
    wide = problem.low_rank.widest
    rows = min(block(problem.rows), 64) if problem.query.shape[2] == 1 else 64
    if wide > 128:
        rows = min(rows, 32)
    return rows, 64 if problem.query.dtype != torch.float32 and wide <= 128 else 32
