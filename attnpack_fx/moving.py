"""Moving stored tokens: from a pair of packed keys and values to another that holds some of their tokens.

Keys and values of a layer hold the same tokens in the same slots, but may have different numbers of them in segments.
So tokens are chosen between neighbouring borders of either; samples that keep fewer than others get filler there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from attnpack_fx.held import Held
from attnpack_fx.kernels.aten import coded_rows
from attnpack_fx.kernels.aten.plan import positions
from attnpack_fx.kernels.parts import Block, Rows, Segment, tokens_of
from attnpack_fx.packed_tensor import PackedTensor
from attnpack_fx.tail import exact


@dataclass(frozen=True)
class Choice:
    """Some slots of a pair, in order.

    order: int64 `[B, n]`, slot numbers, -1 for filler; ends: how many of these there are before each old slot number
    that is a border.
    """

    order: Tensor
    ends: dict[int, int]
    _between: dict[tuple[int, int], Tensor] = field(default_factory=dict, repr=False)

    def between(self, first: int, end: int) -> Tensor:
        """Those of the old slots first .. end - 1 (both borders), counted from `first`; filler stays -1."""
        if (first, end) not in self._between:
            order = self.order[:, self.ends[first] : self.ends[end]]
            self._between[first, end] = torch.where(order < 0, order, order - first)
        return self._between[first, end]


def choose(key: PackedTensor, value: PackedTensor, keep: Tensor) -> Choice:
    """The slots where `keep`, bool `[B, slots]`, is True."""
    ordered = sorted({0, *borders(key), *borders(value)})
    pieces, ends, count = [], {0: 0}, 0
    for first, end in pairwise(ordered):
        piece = positions(keep[:, first:end])
        pieces.append(torch.where(piece < 0, piece, piece + first))
        count += piece.shape[1]
        ends[end] = count
    return Choice(torch.cat(pieces, 1) if pieces else keep.new_zeros((keep.shape[0], 0), dtype=torch.int64), ends)


def taken(key: PackedTensor, value: PackedTensor, choice: Choice) -> tuple[PackedTensor, PackedTensor]:
    """Keys and values with the chosen slots alone."""
    index = chosen_positions(key, choice)
    placement = key.placed.derived("taken", (choice,), lambda: key.placed.moved(index))
    made = []
    for packed in (key, value):
        held, tail = packed.held, packed.held.packed
        rows = rows_of(packed, choice.between(tail, packed.slots))
        angles = held.angles
        if angles is not None:
            angles = angles.taken(choice.between(0, angles.slots), choice.between(tail, packed.slots))
        pinned = choice.between(tail, tail + held.pinned).shape[1]
        moved = replace(
            held, segments=segments_of(held, choice), placement=placement, angles=angles, pinned=pinned, closed=True
        )
        importance = packed.scores
        if importance is not None:
            importance = gathered(importance, choice.order)
        made.append(PackedTensor(moved, exact(rows), importance))
    return made[0], made[1]


def chosen_positions(key: PackedTensor, choice: Choice) -> Tensor:
    """Logical positions of the chosen slots, int64 `[B, n]`, -1 for filler."""
    found = key.positions.gather(1, choice.order.clamp(min=0))
    return found.masked_fill(choice.order < 0, -1)


def segments_of(held: Held, choice: Choice) -> tuple[Segment[Tensor], ...]:
    """The segments with the chosen tokens."""
    made, start = [], 0
    for segment, count in zip(held.segments, held.counts, strict=True):
        order = choice.between(start, start + count)
        blocks: list[Block[Tensor] | Rows[Tensor]] = []
        for block in segment.blocks:
            if isinstance(block, Rows):
                blocks.append(coded_rows.select(block, order))
            else:
                assert tokens_of(block) == count, "blocks of some tokens alone are not for methods that move tokens"
                blocks.append(replace(block, coefficient=gathered(block.coefficient, order)))
        made.append(Segment(tuple(blocks)))
        start += count
    return tuple(made)


def gathered(tokens: Tensor, order: Tensor) -> Tensor:
    """`[B, n, ...]` at order `[B, m]`, zero for filler."""
    batch, count = order.shape
    if tokens.shape[1] == 0:
        return tokens.new_zeros((batch, count, *tokens.shape[2:]))
    if batch == 1:
        return _zeroed(tokens[0].index_select(0, order[0].clamp(min=0))[None], order)
    numbers = order.clamp(min=0).view(batch, count, *(1,) * (tokens.dim() - 2)).expand(-1, -1, *tokens.shape[2:])
    return _zeroed(tokens.gather(1, numbers), order)


def rows_of(packed: PackedTensor, order: Tensor) -> Tensor:
    """Tail rows `[m, B, H, D]` at order `[B, m]`, zero for filler."""
    rows = packed.lease.buffer.rows[: packed.lease.length]
    batch = rows.shape[1]
    if not rows.shape[0]:
        return rows.new_zeros((order.shape[1], *rows.shape[1:]))
    # Whole rows at a time, several times as fast as with two indices.
    place = order.T.clamp(min=0) * batch + torch.arange(batch, device=rows.device)
    found = rows.flatten(0, 1).index_select(0, place.flatten()).unflatten(0, (-1, batch))
    return _zeroed(found.transpose(0, 1), order).transpose(0, 1)


def _zeroed(found: Tensor, order: Tensor) -> Tensor:
    """`[B, m, ...]`, zeroed in place where order is filler. A CPU looks first if there is any: a fill reads all."""
    filler = order < 0
    if found.device.type != "cpu" or bool(filler.any()):
        found.masked_fill_(filler.view(*filler.shape, *(1,) * (found.dim() - 2)), 0)
    return found


def borders(packed: PackedTensor) -> Sequence[int]:
    """Slot numbers where something else begins: each segment, the tail, its rows that are not pinned, the end."""
    ends = list(accumulate(packed.held.counts))
    return [*ends, packed.held.packed + packed.held.pinned, packed.slots]
