"""Packed parts as operators take them: tensors in one list, each once, and for each packed tensor a list of ints.

A *layout* says which tensors of the list are which, by their numbers:

    flags, tail, index, [slot], [cos, sin, [axes]]
    of every segment: how many blocks, and of every block: its kind, its tensors in the order of `parts.tensor_names`

Keys and values of a layer share a list, and with it whatever they have in common.
"""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from attnpack_fx.kernels.parts import Angles, PackedParts, Segment, T, block_of, kind, tensor_names, tensors_of

_SLOT, _TURNED, _INTERLEAVED, _AXES, _RAGGED = (1 << place for place in range(5))


def flatten(*every: PackedParts[T]) -> tuple[list[T], list[list[int]]]:
    """The tensors of packed parts, and the layout of each. Lengths of tails are no part of it."""
    tensors: list[T] = []
    numbers: dict[int, int] = {}

    def number(tensor: T) -> int:
        if id(tensor) not in numbers:
            numbers[id(tensor)] = len(tensors)
            tensors.append(tensor)
        return numbers[id(tensor)]

    def layout(parts: PackedParts[T]) -> list[int]:
        found, flags = [parts.tail, parts.index], _RAGGED if parts.ragged else 0
        if parts.slot is not None:
            found, flags = [*found, parts.slot], flags | _SLOT
        if (angles := parts.angles) is not None:
            found, flags = [*found, angles.cos, angles.sin], flags | _TURNED | _INTERLEAVED * angles.interleaved
            if angles.axes is not None:
                found, flags = [*found, angles.axes], flags | _AXES
        made = [flags, *map(number, found)]
        for segment in parts.segments:
            made.append(len(segment.blocks))
            for block in segment.blocks:
                made += kind(block), *map(number, tensors_of(block).values())
        return made

    layouts = [layout(parts) for parts in every]
    return tensors, layouts


def unflatten(tensors: Sequence[T], layout: Sequence[int], length: int) -> PackedParts[T]:
    """The packed parts of this layout, with a tail of `length` rows."""
    numbers = iter(layout)
    flags = next(numbers)

    def following() -> T:
        return tensors[next(numbers)]

    tail, index = following(), following()
    slot = following() if flags & _SLOT else None
    angles: Angles[T] | None = None
    if flags & _TURNED:
        cos, sin = following(), following()
        angles = Angles(cos, sin, following() if flags & _AXES else None, bool(flags & _INTERLEAVED))
    segments = []
    for blocks in numbers:
        kinds = []
        for _ in range(blocks):
            of = next(numbers)
            kinds.append(block_of(of, {name: following() for name in tensor_names(of)}))
        segments.append(Segment(tuple(kinds)))
    return PackedParts(tuple(segments), tail, length, index, slot, angles, bool(flags & _RAGGED))


def unflatten_pair(
    tensors: Sequence[Tensor], key: Sequence[int], value: Sequence[int], length: int
) -> tuple[PackedParts[Tensor], PackedParts[Tensor]]:
    """Keys and values of these layouts; length: of the keys' tail. The values' has what gives as many slots."""
    keys, values = unflatten(tensors, key, length), unflatten(tensors, value, 0)
    return keys, replace(values, length=keys.packed + length - values.packed)
