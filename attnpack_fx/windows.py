"""Sliding windows: the oldest tokens of a cache leave one by one, and their memory in blocks."""

from dataclasses import replace

from attnpack_fx.held import Held
from attnpack_fx.moving import Choice, borders, choose, taken
from attnpack_fx.packed_tensor import PackedTensor
from attnpack_fx.tail import allocate

#: Part of a window, and tokens at least, that may have left before what stays is stored anew: a step then copies as
#: many tokens as this divides by, on average.
_PART, _LEAST = 16, 8


def room(tokens: int, window: int) -> int | None:
    """Rows of room that a tail needs once `tokens` of the prompt fill the window; None while they do not.

    As many come until what stays is stored anew.
    """
    return max(_LEAST, window // _PART) if tokens >= window else None


def compacted(key: PackedTensor, value: PackedTensor) -> tuple[PackedTensor, PackedTensor]:
    """Keys and values of a layer without the slots of tokens that have left, once these are many."""
    most = max(_LEAST, key.shape[2] // _PART)
    if key.held.left < most:
        return key, value
    placed = key.placed

    def derive() -> Choice:
        return choose(key, value, placed.index >= 0)

    choice = placed.derived("compacted", (*borders(key), *borders(value)), derive)
    pair = taken(key, value, choice)
    one, other = (_stored(after, most, before.held.closed) for after, before in zip(pair, (key, value), strict=True))
    return one, other


def _stored(packed: PackedTensor, most: int, closed: bool) -> PackedTensor:
    """With room for the tokens that come until the next time, and no more; without segments that hold none."""
    held, length = packed.held, packed.lease.length
    if not all(held.counts):
        held = _without_empty(held)
    buffer = allocate(packed.lease.buffer.rows[:length], length, most)
    return PackedTensor(replace(held, closed=closed, left=0), buffer.lease(length), packed.importance)


def _without_empty(held: Held) -> Held:
    there = [number for number, count in enumerate(held.counts) if count]
    kept = tuple(held.modalities[number] for number in there)
    turned = held.angles is not None and (kept or held.angles.tail is not None)
    return replace(
        held,
        segments=tuple(held.segments[number] for number in there),
        modalities=kept,
        angles=held.angles if turned else None,
        losses=tuple((name, loss) for name, loss in held.losses if name in kept),
    )
