"""The plain description of one packed key or value tensor, shared by ops, passes and `PackedTensor`.

A packed tensor stands for a dense `[B, H, T, D]` one. Its `T` logical tokens are `P` placed tokens (the prompt's,
padding included, and those folded since) followed by the tokens appended after them. Storage knows *slots* instead:

    slot      0 ........ N_1 ........ N_1 + N_2 ......... N | appended
    holds     segment 1 | segment 2 ...       | tail rows 0..m-1 | tail rows m..n-1

Each segment is a low-rank matrix, the sum of one or more *blocks* `coefficient @ basis`; the tail holds rows as they
are, the `m` placed tokens that were not worth packing first. `index` maps slots to logical positions and `slot` maps
back; padding has no slot, and samples with fewer tokens than their neighbours have filler slots (`index == -1`).

A segment's first block covers all its tokens. Later blocks hold further columns, of lower singular values, with bits of
their own, and may cover only the segment's first tokens: those that are worth more columns come first.

The parts are generic: tensors at run time, graph nodes inside the passes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

T = TypeVar("T")

#: Set in what operators take as a block's bits when samples find their basis by `owner`.
OWNED = 16

#: What is added to a tail's length wherever Dynamo or Inductor can see it as a size: they compile separate graphs for
#: sizes 0 and 1.
SPARE_ROWS = 2


@dataclass(frozen=True)
class Block(Generic[T]):
    """Some columns of a segment's low-rank matrix.

    coefficient: `[B, n, r]` for the segment's first n tokens, columns sorted by singular value and carrying it; filler
        rows are zero.
    basis: `[B, H, r, D]`, orthonormal rows once heads are concatenated (`[B, r, H * D]`); `[1, H, r, D]` when all
        samples share it; `[G, H, r, D]` with owner int64 `[B]` when sample b has basis `owner[b]`.
    scale, bits: with bits 8, 4 or 2 both are codes (`aten/quantize.py`), scaled by `scale` fp32 `[B, 2, r]`; with 0
        they are as they are, and scale is None.
    """

    coefficient: T
    basis: T
    scale: T | None = None
    bits: int = 0
    owner: T | None = None


@dataclass(frozen=True)
class Segment(Generic[T]):
    """Tokens of one modality as a low-rank matrix, the sum of `blocks`."""

    blocks: tuple[Block[T], ...]


@dataclass(frozen=True)
class Angles(Generic[T]):
    """Rotary embedding of packed slots, for keys that are stored before it.

    cos, sin: `[B or 1, P, E]`, one entry per rotated dim, E <= D.
    axes: None: row n belongs to slot n. Else int64 `[B or 1, A, N]`: cos and sin of slot n are the sums of rows
        `axes[:, n]`, one per rotary axis (time, height, width), each zero in the dims of the others.
    interleaved: pairs of dims are `(2 i, 2 i + 1)`, not `(i, i + E / 2)`.
    """

    cos: T
    sin: T
    axes: T | None
    interleaved: bool


@dataclass(frozen=True)
class PackedParts(Generic[T]):
    """One packed key or value tensor.

    segments: low-rank parts, in slot order; may be empty.
    tail: `[rows, B, H, D]` with `rows >= length`; token-major, so that growing it moves nothing and changes no stride.
    length: how many tail rows hold tokens (an int, or a graph node of one).
    index: int64 `[B, N]`, logical position of every placed slot, -1 for filler.
    slot: int64 `[B, P]`, slot of every placed logical position, -1 for padding.
    angles: of keys stored before rotary embedding; None: segments hold what is attended to. Tail rows always do.
    """

    segments: tuple[Segment[T], ...]
    tail: T
    length: T | int
    index: T
    slot: T
    angles: Angles[T] | None = None

    @property
    def blocks(self) -> list[Block[T]]:
        return [block for segment in self.segments for block in segment.blocks]

    @property
    def coefficients(self) -> list[T]:
        return [block.coefficient for block in self.blocks]

    @property
    def bases(self) -> list[T]:
        return [block.basis for block in self.blocks]

    @property
    def scales(self) -> list[T]:
        return [block.scale for block in self.blocks if block.scale is not None]

    @property
    def owners(self) -> list[T]:
        return [block.owner for block in self.blocks if block.owner is not None]

    @property
    def layout(self) -> list[int]:
        """What operators take as `blocks`; see `layout`."""
        return layout([[kind(block) for block in segment.blocks] for segment in self.segments])

    @property
    def rotary(self) -> tuple[T | None, T | None, bool, T | None]:
        """What operators take as `cos, sin, interleaved, axes`."""
        if self.angles is None:
            return None, None, False, None
        return self.angles.cos, self.angles.sin, self.angles.interleaved, self.angles.axes


def kind(block: Block[T]) -> int:
    """How a block is stored, as operators take it: its bits, and `OWNED`."""
    return block.bits | (OWNED if block.owner is not None else 0)


def layout(kinds: Sequence[Sequence[int]]) -> list[int]:
    """Segment number and kind of every block, from the kinds of every segment; empty for one plain block each."""
    if all(list(blocks) == [0] for blocks in kinds):
        return []
    return [number for segment, blocks in enumerate(kinds) for block in blocks for number in (segment, block)]


def first_blocks(count: int, blocks: Sequence[int]) -> list[int]:
    """The numbers of the blocks that begin a segment, of `count` blocks in all; they cover all its tokens."""
    segments = blocks[::2] if blocks else range(count)
    return [number for number in range(count) if number == 0 or segments[number] != segments[number - 1]]


@dataclass(frozen=True)
class AnglesForm:
    """What is fixed about `Angles`: E, how many axes (0: a row per slot), what samples have of their own, dtype."""

    width: int
    axes: int
    own_rows: bool
    own_axes: bool
    interleaved: bool
    dtype: torch.dtype


@dataclass(frozen=True)
class Form:
    """What is fixed about a packed value while its sizes vary; compiled graphs are made for one form.

    modalities: of its segments; kinds: of every block of every segment (`kind`); shared: whether all samples share the
    basis, of every block; ragged: whether `index` holds filler; angles: of keys stored before rotary embedding.
    weighed: whether the importance of the first segment's tokens is kept, fp32 `[B, N]`.
    """

    modalities: tuple[str, ...]
    kinds: tuple[tuple[int, ...], ...]
    shared: tuple[tuple[bool, ...], ...]
    ragged: bool
    angles: AnglesForm | None = None
    weighed: bool = False
