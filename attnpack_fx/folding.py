"""Streaming folds: the oldest dense tokens join the packed text, at a cost that knows nothing of what is packed.

AttentionPack compresses the text again every so many tokens. The low-rank text stands for those tokens already, so the
small SVD of `[coefficient basis; rows]` (`kernels/aten/factorize.py`) is the truncated SVD of all of them but for what
earlier truncations dropped. That is added up: the bound on the error of a layer's text is the sum of what each
truncation dropped, by the triangle inequality.
"""

import logging
import math
from dataclasses import replace

import torch
from torch import Tensor

from attnpack_fx.coding import turned_back
from attnpack_fx.held import Loss
from attnpack_fx.kernels import ops
from attnpack_fx.kernels.parts import Block, Segment
from attnpack_fx.packed_tensor import PackedTensor
from attnpack_fx.passes.state import TEXT
from attnpack_fx.passes.storage import Stored
from attnpack_fx.policy import PackPolicy
from attnpack_fx.tail import allocate

log = logging.getLogger(__name__)


def due(packed: PackedTensor, policy: PackPolicy) -> int:
    """How many of the oldest tail rows are to be folded now: a multiple of `fold_every`."""
    if policy.fold_every is None or packed.held.closed:
        return 0
    return max(0, packed.lease.length - policy.recent) // policy.fold_every * policy.fold_every


def fold(
    key: PackedTensor, value: PackedTensor, count: int, stored: Stored, most: float | None
) -> tuple[PackedTensor, PackedTensor]:
    """Keys and values of one layer with the oldest `count` tail rows in the text segment.

    Where that cannot be, they stay as they are and take no more folds: a bound would exceed `most`, or keys are stored
    before rotary embedding and the angles of these rows were not kept.
    """
    both = []
    for packed, columns in ((key, stored.key), (value, stored.value)):
        if packed.held.angles is not None and packed.held.angles.tail is None:
            break
        folded = _fold(packed, count, columns.rank)
        if most is not None and dict(folded.held.losses)[TEXT].relative > most:
            break
        both.append(folded)
    if len(both) < 2:
        log.info("tokens stay dense: folding %d more would break the bound %s, or cannot be done", count, most)
        both = [PackedTensor(replace(each.held, closed=True), each.lease, each.importance) for each in (key, value)]
    return both[0], both[1]


def _fold(packed: PackedTensor, count: int, rank: int) -> PackedTensor:
    held, tail = packed.held, packed.lease.buffer.rows[: packed.lease.length]
    rows, angles = tail[:count], held.angles
    if angles is not None:
        rows, angles = turned_back(rows, packed), angles.folded(count)
    # Filler, and what a crop left behind, which is no token any more.
    gone = held.placement.index[:, held.packed :][:, :count].T < 0
    rows = torch.cat([rows[: len(gone)].masked_fill(gone[:, :, None, None], 0), rows[len(gone) :]])
    # Of text packed without a loss nothing is known.
    segments, modalities, unknown = held.segments, held.modalities, math.inf
    if TEXT not in modalities:
        segments, modalities, unknown = (*segments, _empty(tail)), (*modalities, TEXT), 0.0
    blocks = segments[-1].factors
    old = torch.cat([block.coefficient for block in blocks], 2)
    basis = torch.cat([block.basis for block in blocks], 2).expand(old.shape[0], -1, -1, -1)
    coefficient, basis, dropped = ops.fold(old, basis, rows, rank)
    losses = dict(held.losses)
    zero = torch.zeros_like(dropped, dtype=torch.float64)
    before = losses.get(TEXT) or Loss(zero, zero + unknown)
    losses[TEXT] = Loss(before.squares + rows.double().square().sum((0, 2, 3)), before.bound + dropped.double())
    # Placed rows that were dense keep their slots, which now belong to the segment; appended ones are placed.
    placement = held.placement if count <= held.kept else held.placement.extend(count - held.kept)
    folded = replace(
        held,
        segments=(*segments[:-1], Segment((Block(coefficient, basis),))),
        modalities=modalities,
        placement=placement,
        angles=angles,
        losses=tuple(losses.items()),
    )
    left = tail[count:]
    lease = allocate(left, left.shape[0]).lease(left.shape[0])
    return PackedTensor(folded, lease, packed.importance)


def _empty(tail: Tensor) -> Segment[Tensor]:
    _, batch, heads, dim = tail.shape
    return Segment((Block(tail.new_empty((batch, 0, 0)), tail.new_empty((batch, heads, 0, dim))),))
