"""The operations on packed tensors that stay packed; each may decline with NotImplemented, which decompresses.

While Dynamo traces, all decline: a packed value then means its dense form.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attnpack_fx.held import stacked
from attnpack_fx.kernels.balance import fits
from attnpack_fx.memoryless import Memoryless, is_fake
from attnpack_fx.shared import made_of
from attnpack_fx.tail import allocate

aten = torch.ops.aten


@lru_cache(maxsize=64)
def each_sample(start: int, end: int, repeats: int, device: torch.device) -> Tensor:
    """start .. end - 1, each so many times; one tensor, as layers share what they select by it."""
    with torch.inference_mode(False):
        return torch.arange(start, end, device=device).repeat_interleave(repeats)


def _is_packed(value: object) -> bool:
    return isinstance(value, Memoryless)


def _cat(tensors, dim=0):
    tensors = [tensor for tensor in tensors if not (tensor.dim() == 1 and tensor.numel() == 0)]
    first, *rest = tensors
    if not _is_packed(first) or is_fake(first):
        return NotImplemented
    if dim in (0, -4) and rest:
        return _join(tensors)
    if dim not in (2, -2):
        return NotImplemented
    batch, heads, _, width = first.shape
    for new in rest:
        fits = new.dim() == 4 and (new.shape[0], new.shape[1], new.shape[3]) == (batch, heads, width)
        if _is_packed(new) or not fits or new.dtype != first.dtype or new.device != first.device:
            return NotImplemented
    if not rest:
        return first.handle()
    return first.append(rest[0] if len(rest) == 1 else torch.cat(rest, dim=2))


def _join(tensors):
    """Samples of several caches in one batch: of prompts and tails as long, in the same segments."""
    if any(not _is_packed(tensor) for tensor in tensors):
        return NotImplemented
    if any(t.held.resting is not None and t.held.resting.index.shape[1] for t in tensors):
        # Decompressed they would be lost without a word.
        raise NotImplementedError(
            "joining caches along the batch: got tokens that rest, expected caches whose tokens are all read; use a "
            "method that evicts instead of A-VL, or join prompts before prefill"
        )
    first = tensors[0]
    kinds = {(t.shape[1:], t.placement.tokens, t.dtype, t.device, t.importance is None) for t in tensors}
    held = first.held.join([tensor.held for tensor in tensors[1:]])
    if len(kinds) > 1 or held is None:
        return NotImplemented
    of_all_slots = first.importance is not None and first.importance.shape[1] != (*first.held.counts, 0)[0]
    if of_all_slots and len({(t.held.counts, t.held.kept, t.importance.shape[1]) for t in tensors}) > 1:
        return NotImplemented  # slots would not stay where they are
    rows = []
    kept = max(tensor.held.kept for tensor in tensors)
    for tensor in tensors:
        placed, appended = tensor.lease.buffer.rows[: tensor.lease.length].tensor_split([tensor.held.kept])
        rows.append(torch.cat([placed, placed.new_zeros((kept - placed.shape[0], *placed.shape[1:])), appended]))
    joined = torch.cat(rows, dim=1)
    importance = None
    if first.importance is not None:
        importance = stacked([tensor.importance for tensor in tensors])
    return type(first)(held, allocate(joined, joined.shape[0]).lease(joined.shape[0]), importance)


def slice_packed(packed, dim=0, start=None, end=None, step=1):
    if is_fake(packed) or step != 1:
        return NotImplemented
    dim = dim % packed.dim()
    size = packed.shape[dim]
    start, end, _ = slice(start, end).indices(size)
    if (start, end) == (0, size):
        return packed.handle()
    if dim == 2 and start == 0:
        return packed.crop(end)
    if dim == 2 and end == size and packed.held.resting is None:
        return packed.newest(size - start)
    if dim == 0 and start < end:
        return packed.samples(each_sample(start, end, 1, packed.device))
    return NotImplemented


def _index_select(packed, dim, index):
    return NotImplemented if is_fake(packed) or dim % packed.dim() != 0 else packed.samples(index)


def _index(packed, indices):
    rows, *rest = indices
    if is_fake(packed) or rows is None or rows.dim() != 1 or any(other is not None for other in rest):
        return NotImplemented
    batch, masks = packed.shape[0], rows.dtype in (torch.bool, torch.uint8)

    def counted() -> Tensor:
        return rows.nonzero()[:, 0] if masks else torch.where(rows < 0, rows + batch, rows)

    return packed.samples(made_of(rows, ("counted", batch), counted))


def _to_copy(packed, *, dtype=None, device=None, non_blocking=False, layout=None, pin_memory=None, memory_format=None):
    if is_fake(packed) or pin_memory or (dtype is not None and not dtype.is_floating_point):
        return NotImplemented
    if dtype is not None and not all(fits(b.coefficient, dtype) for b in packed.held.factors if b.scale is None):
        return NotImplemented  # every number fits half precision, but not every norm
    target = packed.device if device is None else torch.device(device)
    return packed.map(
        lambda part: aten._to_copy(part, dtype=dtype, device=target, non_blocking=non_blocking), target, ("to", dtype)
    )


def _clone(packed, *, memory_format=None):
    return NotImplemented if is_fake(packed) else packed.map(torch.clone)


def _alias(packed):
    return NotImplemented if is_fake(packed) else packed.handle()


def _zero(packed):
    if is_fake(packed):
        return NotImplemented
    # New parts rather than zeroed ones: forks of this cache may read the old.
    zeros = packed.map(torch.zeros_like)
    for block in zeros.held.factors:
        if block.scale is not None:  # a copy; codes of any value then mean zero
            block.scale.zero_()
    packed.__init__(zeros.held, zeros.lease, zeros.importance)
    return packed


#: By operator.
PACKED: dict[Any, Callable[..., Any]] = {
    aten.cat.default: _cat,
    aten.slice.Tensor: slice_packed,
    aten.index_select.default: _index_select,
    aten.index.Tensor: _index,
    aten._to_copy.default: _to_copy,
    aten.clone.default: _clone,
    aten.detach.default: _alias,
    aten.alias.default: _alias,
    aten.zero_.default: _zero,
}
