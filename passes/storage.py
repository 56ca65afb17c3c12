"""How one attention layer is to be stored: ranks and bits, in plain terms that every pass can read.

A `LayerPlan` is what a policy decides for one layer. Its parts say how many columns of a factorisation
`[T, H * D] ~ coefficient [T, R] @ basis [R, H * D]` are kept, and in how many bits each block of columns is stored.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from attnpack_fx.kernels.parts import E4M3, E5M2

#: In what format an entry of a factor may be: a number of bits, or floating point of 8; 0 stands for the model's dtype.
BITS = (0, 2, 4, 8, E4M3, E5M2)
KeySpace = Literal["rotated", "unrotated"]
#: A number of columns, or `"full"` for as many as the matrix has.
Count = int | Literal["full"]
#: A format for coefficients and basis, or one for each.
Bits = int | tuple[int, int]

_BLOCKS_EXPECTED = (
    "(columns, bits) pairs, columns an int >= 1 and bits one of 0, 2, 4, 8, or such a pair for coefficients and basis, "
    "e.g. ((16, 8), (48, 4))"
)


@dataclass(frozen=True)
class Columns:
    """The columns of one factorisation, most significant first, in blocks of one precision each.

    blocks: `(number of columns, bits)` pairs. bits: 2, 4 or 8, `E4M3` or `E5M2` of `kernels/parts.py`, or 0 for the
        model's dtype; one for coefficients and basis alike, or a pair. The rank is the sum of the columns.
        `("full", bits)`, as many as the matrix has, stands alone.
    asymmetric: whether codes have a zero point.
    energy: None, or the share of the squared Frobenius norm, in (0, 1], that is enough: then the rank is the smallest
        that keeps this share of the data met at prefill, and the blocks are its upper limit.

    Raises ValueError for anything else. Lists count as tuples.
    """

    blocks: tuple[tuple[Count, Bits], ...]
    energy: float | None = None
    asymmetric: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", _checked_blocks(self.blocks))
        if self.energy is not None:
            object.__setattr__(self, "energy", _checked_energy(self.energy))

    @property
    def is_full(self) -> bool:
        """Whether the rank is `"full"`, still to be resolved by `within`."""
        return self.blocks[0][0] == "full"

    @property
    def rank(self) -> int:
        """All columns together. Raises ValueError where they are `"full"`, which is no number before `within`."""
        if self.is_full:
            raise ValueError("rank: got 'full', expected a number of columns; resolve it with Columns.within(width)")
        return sum(count for count, _ in self.blocks if count != "full")

    @property
    def quantised(self) -> bool:
        """Whether any block is stored in fewer bits than the model's dtype."""
        return any(each != 0 for _, bits in self.blocks for each in both(bits))

    def within(self, width: int) -> "Columns":
        """These columns of a matrix that has `width` of them. Raises ValueError if there are more."""
        if self.is_full:
            return replace(self, blocks=((width, self.blocks[0][1]),))
        if self.rank > width:
            raise ValueError(
                f"rank {self.rank} exceeds H * D = {width}, the largest rank there is; use a rank <= {width} or 'full'"
            )
        return self

    def share(self, processes: int) -> "Columns":
        """What each of several processes keeps that share the heads: of every block its part, rounded up."""
        if processes == 1:
            return self
        blocks = [(count if count == "full" else -(-count // processes), bits) for count, bits in self.blocks]
        return replace(self, blocks=tuple(blocks))

    def cut(self, boundaries: Iterable[int]) -> "Columns":
        """The same columns in the same bits, with a block ending after each of `boundaries` (numbers of columns)."""
        wanted = sorted(boundaries)
        blocks: list[tuple[Count, Bits]] = []
        start = 0
        for count, bits in self.blocks:
            assert count != "full", "resolved before it is cut"
            end = start + count
            for boundary in wanted:
                if start < boundary < end:
                    blocks.append((boundary - start, bits))
                    start = boundary
            blocks.append((end - start, bits))
            start = end
        return replace(self, blocks=tuple(blocks))

    def coded(self, formats: Iterable[tuple[int | None, int, int]], asymmetric: bool) -> "Columns":
        """The same columns in other formats, `(columns, of coefficients, of basis)` from the first on.

        None stands for all columns that are left; what no format is given for stays as it is.
        """
        given, blocks, end = list(formats), [], 0
        ends = [end := end + count if count is not None else self.rank for count, _, _ in given]
        cut, start = self.cut(ends), 0
        for count, bits in cut.blocks:
            assert count != "full", "resolved before it is coded"
            place = next((place for place, last in enumerate(ends) if start < last), None)
            blocks.append((count, bits if place is None else given[place][1:]))
            start += count
        return replace(cut, blocks=tuple(blocks), asymmetric=asymmetric)


@dataclass(frozen=True)
class Stored:
    """How the tokens of one modality are packed: keys and values together, or not at all."""

    key: Columns
    value: Columns

    def __post_init__(self) -> None:
        for name in ("key", "value"):
            if not isinstance(getattr(self, name), Columns):
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected Columns; e.g. Columns(((64, 0),))")

    def share(self, processes: int) -> "Stored":
        """As `Columns.share`."""
        return Stored(self.key.share(processes), self.value.share(processes))


@dataclass(frozen=True)
class LayerPlan:
    """What one attention layer packs.

    vision, text: how tokens of that modality are stored, or None to leave them dense.
    key_space: `"rotated"`: keys are stored after rotary embedding, as they are attended. `"unrotated"`: before it,
        where a pass recognises the embedding, else rotated.
    """

    vision: Stored | None
    text: Stored | None
    key_space: KeySpace

    def __post_init__(self) -> None:
        for name in ("vision", "text"):
            stored = getattr(self, name)
            if stored is not None and not isinstance(stored, Stored):
                raise ValueError(f"{name}: got {stored!r}, expected Stored(key, value) or None (leave dense)")
        if self.key_space not in ("rotated", "unrotated"):
            raise ValueError(f"key_space: got {self.key_space!r}, expected 'rotated' or 'unrotated' in a layer's plan")

    def of(self, modality: Literal["vision", "text"]) -> Stored | None:
        """How tokens of `modality` are stored."""
        return self.vision if modality == "vision" else self.text


def both(bits: Bits) -> tuple[int, int]:
    """The formats of coefficients and of the basis."""
    return (bits, bits) if isinstance(bits, int) else bits


def _checked_blocks(blocks: Any) -> tuple[tuple[Count, Bits], ...]:
    if not isinstance(blocks, (tuple, list)) or not blocks:
        raise ValueError(f"blocks: got {blocks!r}, expected at least one of {_BLOCKS_EXPECTED}")
    checked = tuple(_checked_block(block, blocks) for block in blocks)
    if len(checked) > 1 and any(count == "full" for count, _ in checked):
        raise ValueError(
            f"blocks: got {blocks!r}, expected numbers of columns where there are several blocks; "
            "'full' leaves no column for another block"
        )
    return checked


def _checked_block(block: Any, blocks: Any) -> tuple[Count, Bits]:
    if isinstance(block, (tuple, list)) and len(block) == 2:
        count, bits = block
        countable = (_is_int(count) and count >= 1) or (isinstance(count, str) and count == "full")
        if countable and _is_int(bits) and bits in BITS:
            return count, bits
        pair = isinstance(bits, (tuple, list)) and len(bits) == 2
        if countable and pair and all(_is_int(each) and each in BITS for each in bits):
            # One spelling each, so that equal plans are equal.
            return count, bits[0] if bits[0] == bits[1] else (bits[0], bits[1])
    raise ValueError(f"blocks: got {block!r} in {blocks!r}, expected {_BLOCKS_EXPECTED}")


def _checked_energy(energy: Any) -> float:
    if isinstance(energy, (int, float)) and not isinstance(energy, bool) and 0 < energy <= 1 and math.isfinite(energy):
        return float(energy)
    raise ValueError(f"energy: got {energy!r}, expected a share in (0, 1], or None for a fixed rank; e.g. 0.99")


def _is_int(value: Any) -> bool:
    # bool is an int to Python, but True is neither a number of columns nor of bits.
    return isinstance(value, int) and not isinstance(value, bool)
