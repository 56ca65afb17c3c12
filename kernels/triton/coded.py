"""Attention over segments of several blocks, or in few bits, on a GPU: which kernels run, over which buffers.

    absorb_coded, tokens_coded, combine_coded     3 launches

Codes become numbers in registers and are never written. As in `attend.py`, whatever depends on a number of tokens is an
argument of the kernels; formats, ranks and head dims are compiled in.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.library import wrap_triton

from attnpack_fx.kernels.triton.absorb_coded import absorb_coded_kernel
from attnpack_fx.kernels.triton.blocks import MOST_BLOCKS, Form, Stored, key_forms, value_forms
from attnpack_fx.kernels.triton.combine_coded import combine_coded_kernel
from attnpack_fx.kernels.triton.launch import block, cdiv, per_program, precision
from attnpack_fx.kernels.triton.problem import Problem
from attnpack_fx.kernels.triton.tokens_coded import tokens_coded_kernel


@dataclass(frozen=True)
class CodedProblem(Problem):
    """A problem whose segments are blocks: of keys and values, segment by segment."""

    keys: list[list[Stored]]
    values: list[list[Stored]]

    @property
    def tokens(self) -> list[int]:
        """Of each segment: its first block covers all."""
        return [blocks[0].tokens for blocks in self.keys]


def attend_coded(problem: CodedProblem, out: Tensor, scores: Tensor, weights: bool) -> Tensor:
    """Absorb, attend to coded tokens, combine; returns the log-sum-exps `[B, Hq * Tq]`."""
    query = problem.query
    batch, dim, value_dim = query.shape[0], query.shape[3], problem.value_tail.shape[3]
    keys, key_width, parts = key_forms(problem.keys, dim)
    values, value_width = value_forms(problem.values, value_dim)
    blocks = cdiv(problem.group * query.shape[2], problem.block_g)
    latent = query.new_empty((batch, problem.rows, key_width)) if parts else problem.index
    shift = query.new_empty((parts, batch, problem.rows), dtype=torch.float32) if _asymmetric(keys) else problem.index
    rows_per_split, tail_splits = problem.tail_splits(blocks)
    partial, partial_sums = problem.partials(tail_splits, value_dim)
    arguments = problem.shared_arguments()
    del arguments["SEGMENTS"]
    wrap_triton(absorb_coded_kernel)[(batch * problem.heads, blocks, parts + tail_splits)](
        latent=latent,
        shift=shift,
        partial=partial,
        log_sums=partial_sums,
        scores_out=scores,
        rows_per_split=rows_per_split,
        KEYS=keys,
        PARTS=parts,
        DIM=dim,
        KEY_WIDTH=key_width,
        SCORES=weights,
        BLOCK_N=problem.tail_tile,
        num_warps=4,
        num_stages=2,
        **_named("basis", [each.basis for each in _flat(problem.keys)], problem.index),
        **_named("scale", [each.scale for each in _flat(problem.keys)], problem.index),
        **arguments,
    )
    splits: list[Any] = []
    latent_sums = shares = results = problem.index
    count = len(_flat(problem.values))
    if keys:
        block_m, tile = _token_tile(problem, keys, values)
        row_blocks = cdiv(problem.rows, block_m)
        tokens_per_split = per_program(problem.packed, batch * row_blocks, tile, query.device)
        splits = [cdiv(tokens, tokens_per_split) for tokens in problem.tokens]
        results, latent_sums = problem.partials(sum(splits), value_width)
        if _asymmetric(values):
            shares = query.new_empty((sum(splits), count, batch, problem.rows), dtype=torch.float32)
        mask_arguments = problem.mask_arguments()
        del mask_arguments["mask_tokens"]
        wide = max(map(_width, (*keys, *values))) * block_m > 64 * 64
        wrap_triton(tokens_coded_kernel)[(sum(splits), batch, row_blocks)](
            latent=latent,
            shift=shift,
            partial=results,
            shares=shares,
            log_sums=latent_sums,
            scores_out=scores,
            index=problem.index,
            first_slot0=0,
            first_slot1=problem.tokens[0],
            tokens0=problem.tokens[0],
            tokens1=problem.tokens[-1],
            splits0=splits[0],
            tokens_per_split=tokens_per_split,
            all_rows=problem.rows,
            queries=query.shape[2],
            slots=problem.index.shape[1],
            all_slots=problem.packed + problem.length,
            KEYS=keys,
            VALUES=values,
            KEY_WIDTH=key_width,
            VALUE_WIDTH=value_width,
            VALUE_BLOCKS=count,
            RAGGED=problem.ragged,
            SCORES=weights,
            BLOCK_M=block_m,
            BLOCK_N=tile,
            PRECISION=precision(query.dtype),
            num_warps=8 if wide else 4,
            num_stages=2 if wide else 3,
            **_named("key", [each.coefficient for each in _flat(problem.keys)], problem.index),
            **_named("value", [each.coefficient for each in _flat(problem.values)], problem.index),
            **_named("key_count", [each.tokens for each in _flat(problem.keys)], 0),
            **_named("value_count", [each.tokens for each in _flat(problem.values)], 0),
            **mask_arguments,
        )
    sums = query.new_empty((batch, problem.rows), dtype=torch.float32) if weights else problem.index
    members = problem.group * query.shape[2]
    # One query row wants no tensor core; more rows share the basis tile.
    block_g = 1 if problem.group == 1 and query.shape[2] == 1 else 16
    widest = max((form[5] for forms in values for form in forms), default=16)
    block_d = min(problem.block_dv, 64 if widest <= 128 else 32)
    wrap_triton(combine_coded_kernel)[(batch * problem.heads, cdiv(members, block_g), cdiv(value_dim, block_d))](
        latent=results,
        shares=shares,
        latent_sums=latent_sums,
        partial=partial,
        partial_sums=partial_sums,
        out=out,
        log_sums=sums,
        heads=problem.heads,
        members=members,
        splits0=splits[0] if splits else 0,
        splits1=splits[1] if len(splits) > 1 else 0,
        dense_splits=tail_splits,
        VALUES=values,
        DIM=value_dim,
        VALUE_WIDTH=value_width,
        VALUE_BLOCKS=count,
        SUMS=weights,
        BLOCK_G=block_g,
        BLOCK_S=max(1, 2048 // (block_g * max(widest, block_d))),
        BLOCK_D=block_d,
        PRECISION=precision(query.dtype),
        num_warps=4,
        num_stages=2,
        **_named("basis", [each.basis for each in _flat(problem.values)], problem.index),
        **_named("scale", [each.scale for each in _flat(problem.values)], problem.index),
    )
    return sums


def _flat(segments: Sequence[Sequence[Stored]]) -> list[Stored]:
    return [each for blocks in segments for each in blocks]


def _named(name: str, given: Sequence[Any], absent: Any) -> dict[str, Any]:
    """Arguments `name0`, `name1`, ...; where there is none, one that is not read."""
    filled = [absent if each is None else each for each in given]
    return {f"{name}{number}": each for number, each in enumerate([*filled, *[absent] * (MOST_BLOCKS - len(filled))])}


def _asymmetric(forms: Sequence[Sequence[Form]]) -> bool:
    return any(form[3] for alike in forms for form in alike)


def _width(forms: Sequence[Form]) -> int:
    return sum(form[5] for form in forms)


def _token_tile(problem: Problem, keys: Sequence[Sequence[Form]], values: Sequence[Sequence[Form]]) -> tuple[int, int]:
    """Query rows and tokens that a program of `tokens_coded` multiplies at a time."""
    wide = max(map(_width, (*keys, *values)))
    rows = min(block(problem.rows), 64) if problem.query.shape[2] == 1 else 64
    if wide > 128:
        rows = min(rows, 32)
    return rows, 64 if problem.query.dtype != torch.float32 and wide <= 128 else 32
