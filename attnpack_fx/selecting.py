"""Selective reading: vision tokens that attention does not turn to rest, and steps read the others.

Resting tokens are kept apart, as rows or coefficients of their own, so that what a step reads is contiguous and nothing
is masked. From time to time one step reads all, and attention says anew which tokens are of interest.
"""

from dataclasses import replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from attnpack_fx.cached_layer import CachedLayer
from attnpack_fx.evicting import tokens
from attnpack_fx.held import Held
from attnpack_fx.kernels.parts import Block, Segment
from attnpack_fx.moving import Choice, choose, chosen_positions, gathered, rows_of, segments_of, taken
from attnpack_fx.packed_tensor import PackedTensor
from attnpack_fx.passes.selection import Selection
from attnpack_fx.resting import Resting
from attnpack_fx.tail import exact


def select(layer: CachedLayer, method: Selection) -> None:
    """After a call: let tokens rest that the next steps do not read, or wake all where the next step reads all."""
    resting = layer.key.held.resting
    started = layer.key.shape[2] if resting is None else resting.started
    step = layer.key.shape[2] - started
    if resting is None or not resting.index.shape[1]:
        if not method.rereads(step + 1):
            _rest(layer, method, started)
    elif method.rereads(step + 1):
        wake(layer)


def _rest(layer: CachedLayer, method: Selection, started: int) -> None:
    shown = tokens(layer)
    read = method.core_of(shown)
    stored = shown.position >= 0
    core, other = choose(layer.key, layer.value, read & stored), choose(layer.key, layer.value, ~read & stored)
    index = chosen_positions(layer.key, other)
    resting = [_resting(packed, index, other, started) for packed in (layer.key, layer.value)]
    pair = taken(layer.key, layer.value, core)
    layer.key, layer.value = (
        PackedTensor(replace(packed.held, resting=rest), packed.lease, packed.importance)
        for packed, rest in zip(pair, resting, strict=True)
    )


def _resting(packed: PackedTensor, index: Tensor, choice: Choice, started: int) -> Resting:
    held = packed.held
    blocks = [block for segment in segments_of(held, choice) for block in segment.blocks]
    assert all(isinstance(block, Block) for block in blocks), "coded rows do not rest"
    ends = accumulate(held.counts, initial=0)
    counts = [choice.between(first, end).shape[1] for first, end in pairwise(ends)]
    tail = rows_of(packed, choice.between(held.packed, packed.slots))
    angles = held.angles
    return Resting(
        tuple(block.coefficient for block in blocks if isinstance(block, Block)),
        tail,
        index,
        (*counts, tail.shape[0]),
        None if angles is None else angles.reordered(choice.between(0, held.packed).clamp(min=0)).packed.axes,
        None if packed.importance is None else gathered(packed.importance, choice.order),
        started,
    )


def wake(layer: CachedLayer) -> None:
    """Let the next step read all tokens again."""
    resting = layer.key.held.resting
    assert resting is not None
    key = layer.key
    counts = (*key.held.counts, key.lease.length)
    index = _behind(key.positions, counts, resting.index, resting.counts)
    placement = key.placed.moved(index)
    made = []
    for packed in (layer.key, layer.value):
        held, rest = packed.held, packed.held.resting
        assert rest is not None
        importance = packed.importance
        if importance is not None and rest.importance is not None:
            importance = _behind(importance, counts, rest.importance, rest.counts)
        rows = torch.cat([packed.lease.buffer.rows[: packed.lease.length], rest.tail])
        woken = replace(
            held,
            segments=_joined(held, rest),
            placement=placement,
            angles=None if held.angles is None else held.angles.woken(rest.axes, held.counts, rest.counts),
            resting=_none(rest),
        )
        made.append(PackedTensor(woken, exact(rows), importance))
    layer.key, layer.value = made


def _joined(held: Held, rest: Resting) -> tuple[Segment[Tensor], ...]:
    remaining = iter(rest.coefficients)
    return tuple(
        Segment(
            tuple(
                replace(block, coefficient=torch.cat([block.coefficient, next(remaining)], 1))
                for block in segment.blocks
                if isinstance(block, Block)
            )
        )
        for segment in held.segments
    )


def _behind(read: Tensor, counts: tuple[int, ...], rest: Tensor, more: tuple[int, ...]) -> Tensor:
    """Per part `[B, n]` what is read, then what rests."""
    pairs = zip(read.split(list(counts), 1), rest.split(list(more), 1), strict=True)
    return torch.cat([each for pair in pairs for each in pair], 1)


def _none(rest: Resting) -> Resting:
    return Resting((), rest.tail[:0], rest.index[:, :0], (), None, None, rest.started)
