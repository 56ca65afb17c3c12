"""The plain description of one packed key or value tensor, shared by ops, passes and `PackedTensor`.

A packed tensor stands for a dense `[B, H, T, D]` one. Its `T` logical tokens are `P` prompt tokens (what was there
when it
was packed, padding included) followed by the tokens appended since. Storage knows *slots* instead:

    slot      0 ........ N_1 ........ N_1 + N_2 ......... N | appended
    holds     segment 1 | segment 2 ...       | tail rows 0..m-1 | tail rows m..n-1

Each segment is a low-rank pair `coefficient @ basis`; the tail holds rows as they are, the `m` prompt tokens that were
not
worth packing first. `index` maps prompt slots to logical positions and `slot` maps back; padding has no slot, and
samples with fewer tokens than their neighbours have filler slots (`index == -1`).

The parts are generic: tensors at run time, graph nodes inside the passes.
"""

from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

#: What is added to a tail's length wherever Dynamo or Inductor can see it as a size: they compile separate graphs for
#: sizes 0 and 1.
SPARE_ROWS = 2


@dataclass(frozen=True)
class Segment(Generic[T]):
    """Tokens of one modality as a low-rank pair.

    coefficient: `[B, N, R]`, columns sorted by singular value and carrying it; filler rows are zero.
    basis: `[B, H, R, D]`, orthonormal rows once heads are concatenated (`[B, R, H * D]`).
    """

    coefficient: T
    basis: T


@dataclass(frozen=True)
class PackedParts(Generic[T]):
    """One packed key or value tensor.

    segments: low-rank parts, in slot order; may be empty.
    tail: `[rows, B, H, D]` with `rows >= length`; token-major, so that growing it moves nothing and changes no stride.
    length: how many tail rows hold tokens (an int, or a graph node of one).
    index: int64 `[B, N]`, logical position of every prompt slot, -1 for filler.
    slot: int64 `[B, P]`, prompt slot of every logical prompt position, -1 for padding.
    """

    segments: tuple[Segment[T], ...]
    tail: T
    length: T | int
    index: T
    slot: T

    @property
    def coefficients(self) -> list[T]:
        return [segment.coefficient for segment in self.segments]

    @property
    def bases(self) -> list[T]:
        return [segment.basis for segment in self.segments]
