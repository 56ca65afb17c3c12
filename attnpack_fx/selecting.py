"""Selective reading: vision tokens that attention does not turn to rest, and steps read the others.

Resting tokens are kept apart, as rows or coefficients of their own, so that what a step reads is contiguous and nothing
is masked. From time to time one step reads all, and attention says anew which tokens are of interest. Tokens in coded
rows, whose scales are not theirs alone, do not rest.
"""

from dataclasses import replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from attnpack_fx.cached_layer import CachedLayer
from attnpack_fx.evicting import tokens
from attnpack_fx.held import ROW_SEGMENT, Held
from attnpack_fx.kernels.parts import Block, Rows, Segment
from attnpack_fx.moving import Choice, choose, chosen_positions, gathered, rows_of, segments_of, taken
from attnpack_fx.packed_tensor import PackedTensor
from attnpack_fx.passes.selection import Selection
from attnpack_fx.resting import Resting
from attnpack_fx.tail import allocate


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
    stored = shown.position >= 0
    first, end = sum(_low_rank(layer.key.held)), max(layer.key.held.packed, layer.value.held.packed)
    rests = stored & ~method.core_of(shown)
    rests[:, first:end] = False
    if not bool(rests.any()):
        return
    core, other = (choose(layer.key, layer.value, each) for each in (stored & ~rests, rests))
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
    ends = accumulate(_low_rank(held), initial=0)
    counts = [choice.between(first, end).shape[1] for first, end in pairwise(ends)]
    order = choice.between(held.packed, packed.slots)
    tail = rows_of(packed, order)
    angles, axes, turns = held.angles, None, None
    if angles is not None:
        angles = angles.taken(choice.between(0, angles.slots), order)
        axes, turns = angles.packed.axes, None if angles.tail is None else angles.tail_rows()
    return Resting(
        tuple(block.coefficient for block in blocks if isinstance(block, Block)),
        tail,
        index,
        (*counts, tail.shape[0]),
        axes,
        None if (scores := packed.scores) is None else gathered(scores, choice.order),
        started,
        turns,
    )


def _low_rank(held: Held) -> tuple[int, ...]:
    """Slots of the low-rank segments, which come first."""
    return tuple(count for name, count in zip(held.modalities, held.counts, strict=True) if name != ROW_SEGMENT)


def wake(layer: CachedLayer) -> None:
    """Let the next step read all tokens again."""
    resting = layer.key.held.resting
    assert resting is not None
    key = layer.key
    low = _low_rank(key.held)
    counts = (*low, key.slots - sum(low))
    index = _behind(key.positions, counts, resting.index, resting.counts)
    placement = key.placed.moved(index)
    made = []
    for packed in (layer.key, layer.value):
        held, rest = packed.held, packed.held.resting
        assert rest is not None
        importance = packed.scores
        if importance is not None and rest.importance is not None:
            importance = _behind(importance, counts, rest.importance, rest.counts)
        rows, end = packed.lease.buffer.rows[: packed.lease.length], packed.lease.length + rest.tail.shape[0]
        buffer = allocate(rows, end)  # with room, as a step follows at once
        buffer.rows[len(rows) : end] = rest.tail
        woken = replace(
            held,
            segments=_joined(held, rest),
            placement=placement,
            angles=None if held.angles is None else held.angles.woken(rest.axes, low, rest.counts, rest.turns),
            resting=_none(rest),
        )
        made.append(PackedTensor(woken, buffer.lease(end), importance))
    layer.key, layer.value = made


def _joined(held: Held, rest: Resting) -> tuple[Segment[Tensor], ...]:
    remaining = iter(rest.coefficients)

    def joined(block: Block[Tensor] | Rows[Tensor]) -> Block[Tensor] | Rows[Tensor]:
        if isinstance(block, Rows):
            return block
        return replace(block, coefficient=torch.cat([block.coefficient, next(remaining)], 1))

    return tuple(Segment(tuple(map(joined, segment.blocks))) for segment in held.segments)


def _behind(read: Tensor, counts: tuple[int, ...], rest: Tensor, more: tuple[int, ...]) -> Tensor:
    """Per part `[B, n]` what is read, then what rests."""
    pairs = zip(read.split(list(counts), 1), rest.split(list(more), 1), strict=True)
    return torch.cat([each for pair in pairs for each in pair], 1)


def _none(rest: Resting) -> Resting:
    # New tensors: of a view all memory would live on.
    tail, index = rest.tail.new_empty((0, *rest.tail.shape[1:])), rest.index.new_empty((rest.index.shape[0], 0))
    return Resting((), tail, index, (), None, None, rest.started)
