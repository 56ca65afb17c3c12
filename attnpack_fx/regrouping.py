"""Attention-aware partial decompression (AttentionPack, section 3.3), without decompression.

Every step gives each packed vision token an importance, `I <- w^Tq I + (1 - w^Tq) mean_q A` (`passes/packed_past.py`).
Tokens are ranked by it and kept in that order; those of group f are read at the first `fraction_f R` columns only:

    block 1   columns 1 .. R_F        of all tokens
    block 2   columns R_F+1 .. R_F-1  of all groups but the last ...
    block F   columns R_2+1 .. R      of the first group

The coefficients a block leaves out are in reserve, for when attention turns to those tokens; with `store` they are
gone.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from attnpack_fx.held import Held
from attnpack_fx.kernels.parts import Segment, rank_of
from attnpack_fx.packed_tensor import PackedTensor
from attnpack_fx.partial import Partial
from attnpack_fx.passes.state import VISION
from attnpack_fx.policy import PackPolicy


def weighed(key: PackedTensor, policy: PackPolicy) -> PackedTensor:
    """Freshly packed keys, with an importance where the policy wants one: nothing is known yet."""
    if policy.partial is None or key.modalities[:1] != (VISION,):
        return key
    importance = torch.zeros((key.shape[0], key.held.counts[0]), dtype=torch.float32, device=key.device)
    return PackedTensor(key.held, key.lease, importance)


def is_due(key: PackedTensor, value: PackedTensor, added: int, partial: Partial) -> bool:
    """Whether `added` new tokens end a period of `regroup_every` steps, or are the first with an importance."""
    if key.importance is None:
        return False
    # Those with columns that not all tokens keep.
    cut = [held for held in ((key.held, value.held) if partial.keys else (value.held,)) if _is_cut(held, partial)]
    if not cut:
        return False
    grouped = any(block.coefficient.shape[1] < held.counts[0] for held in cut for block in held.segments[0].factors)
    if partial.store and grouped:
        return False  # what was dropped cannot be ranked anew
    return not grouped or key.shape[2] // partial.regroup_every > (key.shape[2] - added) // partial.regroup_every


def regroup(key: PackedTensor, value: PackedTensor, partial: Partial) -> tuple[PackedTensor, PackedTensor]:
    """Sort the vision tokens of one layer by importance, and let each group keep its columns."""
    importance = key.importance
    assert importance is not None
    # Filler comes last: it has no weight, and nothing is ranked below zero but by this.
    filler = key.index[:, : importance.shape[1]] < 0
    order = importance.masked_fill(filler, -1).argsort(dim=1, descending=True, stable=True)
    placement = key.placement.reorder(order)
    made = []
    for packed, cut in ((key, partial.keys), (value, True)):
        held = packed.held
        counts = _counts(held, partial) if cut else [importance.shape[1]] * len(held.segments[0].factors)
        segment, reserve = _sorted(held, order, counts)
        rest = torch.arange(order.shape[1], held.packed, device=order.device).expand(order.shape[0], -1)
        angles = None if held.angles is None else held.angles.reordered(torch.cat([order, rest], 1))
        kept = () if partial.store else reserve
        made.append(
            replace(held, segments=(segment, *held.segments[1:]), placement=placement, angles=angles, reserve=kept)
        )
    ranked = importance.gather(1, order)
    return PackedTensor(made[0], key.lease, ranked), PackedTensor(made[1], value.lease)


def _is_cut(held: Held, partial: Partial) -> bool:
    return min(_counts(held, partial)) < held.counts[0]


def _counts(held: Held, partial: Partial) -> list[int]:
    """How many tokens each block of the first segment covers."""
    tokens, ranks = held.counts[0], [rank_of(block) for block in held.segments[0].factors]
    total, counts, start = sum(ranks), [], 0
    ends = [round(sum(partial.shares[: number + 1]) * tokens) for number in range(len(partial.shares))]
    for rank in ranks:
        covered = [end for end, limit in zip(ends, partial.columns(total), strict=True) if start < limit]
        counts.append(max(covered))
        start += rank
    return counts


def _sorted(held: Held, order: Tensor, counts: Sequence[int]) -> tuple[Segment[Tensor], tuple[Tensor, ...]]:
    blocks, reserve = [], []
    for number, (block, count) in enumerate(zip(held.segments[0].factors, counts, strict=True)):
        rows = block.coefficient
        if held.reserve:
            rows = torch.cat([rows, held.reserve[number]], 1)
        rows = rows.gather(1, order[:, :, None].expand(-1, -1, rows.shape[2]))
        blocks.append(replace(block, coefficient=rows[:, :count].clone()))
        reserve.append(rows[:, count:].clone())
    return Segment(tuple(blocks)), tuple(reserve) if any(each.shape[1] for each in reserve) else ()
