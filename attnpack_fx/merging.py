"""Merging adjacent layers: their older dense tokens become one direction for both, and a magnitude for each.

Both layers then hold a segment of `Rows` whose codes are one tensor. Tokens that differ too much stay dense, in front
of the tail, in both layers alike, so that keys and values of both go on holding the same tokens in the same slots.
"""

import logging
from dataclasses import replace

import torch
from torch import Tensor

from attnpack_fx.cached_layer import CachedLayer
from attnpack_fx.coding import due, oldest, place_all, with_rows
from attnpack_fx.held import ROW_SEGMENT
from attnpack_fx.kernels.aten.plan import positions
from attnpack_fx.kernels.balance import overflow
from attnpack_fx.kernels.parts import RowForm, Rows
from attnpack_fx.moving import gathered
from attnpack_fx.packed_tensor import PackedTensor
from attnpack_fx.passes.merging import Merging
from attnpack_fx.passes.row_coding import Kind, RowCoding

log = logging.getLogger(__name__)

_KINDS: tuple[Kind, Kind] = ("key", "value")


def merge(lower: CachedLayer, upper: CachedLayer, method: Merging, coding: RowCoding | None) -> bool:
    """Merge what is due of two adjacent layers; coding: how directions are stored, None: as they are.

    Returns whether they can be merged: False where they hold different tokens.
    """
    if not _alike(lower, upper):
        log.info("layers %s and %s hold different tokens and stay apart", lower.number, upper.number)
        return False
    pinned = lower.key.held.pinned
    count = method.due(lower.key.lease.length - pinned, lower.prefill)
    if coding is not None:
        count = min(due(lower, coding))
    if not count:
        return True
    for layer in (lower, upper):
        place_all(layer)
    layers, rows = (lower, upper), {}
    retained = torch.zeros((lower.key.held.placement.index.shape[0], count), dtype=torch.bool, device=lower.key.device)
    for kind in _KINDS:
        pair = [oldest(getattr(layer, kind), count, pinned).permute(1, 0, 2, 3) for layer in layers]
        rows[kind] = method.merge(*pair)
        retained = retained | rows[kind].retained
    key = lower.key
    packed, index = key.held.packed, key.index
    place = index[:, packed + pinned : packed + pinned + count]
    together, apart = positions(~retained & (place >= 0)), positions(retained & (place >= 0))
    parts = index[:, :packed], _at(place, together), index[:, packed : packed + pinned], _at(place, apart)
    placement = key.placement.moved(torch.cat([*parts, index[:, packed + pinned + count :]], 1))
    for kind in _KINDS:
        found = rows[kind]
        blocks = _blocks(found.direction, (found.lower_norm, found.upper_norm), together, kind, lower, coding)
        shared: PackedTensor | None = None
        for layer, block in zip(layers, blocks, strict=True):
            held: PackedTensor = getattr(layer, kind)
            tail = held.lease.buffer.rows[: held.lease.length]
            kept = gathered(tail[pinned : pinned + count].transpose(0, 1), apart).transpose(0, 1)
            made = with_rows(held, block, torch.cat([tail[:pinned], kept, tail[pinned + count :]]))
            own = replace(made.held, placement=placement, pinned=pinned + apart.shape[1])
            made = PackedTensor(own, made.lease, made.importance)
            made = made if shared is None else _sharing(made, shared)
            shared = made if shared is None else shared
            setattr(layer, kind, made)
    return True


def _alike(lower: CachedLayer, upper: CachedLayer) -> bool:
    first, second = lower.key, upper.key
    same = first.shape == second.shape and lower.value.shape == upper.value.shape and first.dtype == second.dtype
    return (
        same
        and first.device == second.device
        and first.held.counts == second.held.counts
        and first.held.pinned == second.held.pinned
        and first.placement.same_as(second.placement)
    )


def _at(place: Tensor, order: Tensor) -> Tensor:
    return place.gather(1, order.clamp(min=0)).masked_fill(order < 0, -1) if place.shape[1] else order


def _blocks(
    direction: Tensor,
    norms: tuple[Tensor, Tensor],
    order: Tensor,
    kind: Kind,
    layer: CachedLayer,
    coding: RowCoding | None,
) -> list[Rows[Tensor]]:
    """The block of either layer, which differ in magnitudes alone."""
    direction = gathered(direction, order)
    sizes = [gathered(norm, order) for norm in norms]
    scale = overflow(torch.cat(sizes, 2), direction.dtype)
    if scale is not None:  # a norm may be beyond half precision where every number fits
        direction, sizes = direction * scale[..., None].to(direction.dtype), [size / scale for size in sizes]
    sizes = [size.to(direction.dtype) for size in sizes]
    if coding is None:
        form = RowForm(bits=0, group=direction.shape[3])
        return [Rows(form, direction, size[..., None]) for size in sizes]
    made = coding.encode(direction, kind, layer.number, layer.prefill)
    return [replace(made, form=replace(made.form, norm=True), norm=size) for size in sizes]


def _sharing(packed: PackedTensor, other: PackedTensor) -> PackedTensor:
    """With the tensors of the other's coded segment for those of its own that are equal by construction."""
    assert packed.modalities[-1] == other.modalities[-1] == ROW_SEGMENT
    own, theirs = packed.segments[-1].blocks[0], other.segments[-1].blocks[0]
    assert isinstance(own, Rows) and isinstance(theirs, Rows)
    block = replace(theirs, norm=own.norm) if own.form.norm else replace(theirs, scale=own.scale)
    segments = (*packed.segments[:-1], replace(packed.segments[-1], blocks=(block,)))
    return PackedTensor(replace(packed.held, segments=segments), packed.lease, packed.importance)
