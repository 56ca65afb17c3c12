"""The plain description of one packed key or value tensor, shared by ops, passes and `PackedTensor`.

A packed tensor stands for a dense `[B, H, T, D]` one. Its `T` logical tokens are `P` placed tokens (the prompt's,
padding included, and those folded since) followed by the tokens appended after them. Storage knows *slots* instead:

    slot      0 ........ N_1 ........ N_1 + N_2 ......... N | appended
    holds     segment 1 | segment 2 ...       | tail rows 0..m-1 | tail rows m..n-1

A segment is either a low-rank matrix, the sum of one or more *blocks* `coefficient @ basis`, or one block of `Rows`:
tokens as they are, in fewer bits. The tail holds rows as they are, the `m` placed tokens that were not worth packing
first. `index` maps slots to logical positions and `slot` maps back; padding and evicted tokens have no slot, and
samples with fewer tokens than their neighbours have filler slots (`index == -1`).

A low-rank segment's first block covers all its tokens. Later blocks hold further columns, of lower singular values,
with bits of their own, and may cover only the segment's first tokens: those that are worth more columns come first.

Keys and values of a layer hold the same tokens in the same slots, but may have different numbers of them in segments:
the value tail then has `packed keys + key length - packed values` rows.

The parts are generic: tensors at run time, graph nodes inside the passes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import register_dataclass

T = TypeVar("T")

#: Formats of eight bits in floating point, where a number of bits is expected: 4 exponent and 3 mantissa bits, 5 and 2.
E4M3, E5M2 = 9, 10

#: Set in what operators take as a block's kind (`kind`): samples find their basis by `owner`; zero points beside
#: scales; a block of `Rows`.
OWNED, ASYMMETRIC, ROWS = 1 << 4, 1 << 5, 1 << 6
#: Where the format of the basis stands in the kind of a low-rank block.
_BASIS_SHIFT = 8

#: Queries of one call, the newest so many, whose weights are known apart: as many drafts can be taken back.
NEWEST = 32

#: What is added to a tail's length wherever Dynamo or Inductor can see it as a size: they compile separate graphs for
#: sizes 0 and 1.
SPARE_ROWS = 2


@dataclass(frozen=True)
class Block(Generic[T]):
    """Some columns of a segment's low-rank matrix.

    coefficient: `[B, n, r]` for the segment's first n tokens, columns sorted by singular value and carrying it; filler
        rows are zero.
    basis: `[B, H, r, D]`, orthonormal rows once heads are concatenated (`[B, r, H * D]`), in half precision of one
        length that is a power of two (`balance.py`); `[1, H, r, D]` when all samples share it; `[G, H, r, D]` with
        owner int64 `[B]` when sample b has basis `owner[b]`.
    bits, basis_bits: formats of coefficient and basis: 8, 4, 2, `E4M3` or `E5M2` for codes (`aten/quantize.py`), 0 for
        numbers as they are; basis_bits None: as `bits`.
    scale: None where both are as they are. Else fp32 `[B, 2, r]`, of the coefficients at `[:, 0]`, of the basis at
        `[:, 1]` (1 where that one is as it is); with asymmetric `[B, 4, r]`, zero points at `[:, 2]` and `[:, 3]`:
        `number = code * scale + zero`.
    """

    coefficient: T
    basis: T
    scale: T | None = None
    bits: int = 0
    owner: T | None = None
    basis_bits: int | None = None
    asymmetric: bool = False


@dataclass(frozen=True)
class RowForm:
    """What is fixed about a block of `Rows`.

    bits: format of the codes: 8, 4 or 2 (unsigned fields, the first in the low bits of a byte), `E4M3`, `E5M2`, or 0
        for numbers of the cache's dtype.
    channel: whether tokens in groups share a scale per channel (as KIVI's keys do), not channels of one token.
    group: channels that share a scale; with `channel` what `Rows.group_of` says counts, and this is 0.
    zero, codebook, outliers, residual, norm: which optional tensors there are.
    rank: columns of the residual, 0 without.
    """

    bits: int
    channel: bool = False
    group: int = 0
    zero: bool = False
    codebook: bool = False
    outliers: bool = False
    rank: int = 0
    norm: bool = False

    @property
    def kind(self) -> int:
        """As one int, for operators; `RowForm.of` is the inverse."""
        flags = (self.channel, self.zero, self.codebook, self.outliers, self.norm)
        packed = sum(1 << place for place, flag in enumerate(flags) if flag)
        return ROWS | self.bits | packed << 8 | self.rank << 16 | self.group << 32

    @classmethod
    def of(cls, kind: int) -> "RowForm":
        channel, zero, codebook, outliers, norm = (bool(kind >> 8 + place & 1) for place in range(5))
        return cls(kind & 15, channel, kind >> 32, zero, codebook, outliers, kind >> 16 & 0xFFFF, norm)


#: The optional tensors of `Rows`, in the order operators take them.
ROW_EXTRAS = ("zero", "group_of", "codebook", "outliers", "places", "left", "right", "part_of", "norm")


@dataclass(frozen=True)
class Rows(Generic[T]):
    """Tokens as rows, in fewer bits: the one block of a segment that is not low rank.

        x[t, h] = norm[t, h] (level(codes[t, h]) scale + zero), outliers put in, + left[t, h] right[part_of[t], h]

    with `level` the number a code stands for: an unsigned int, an entry of the codebook, or a float.

    codes: `[B, n, H, w]`: uint8, `w = ceil(D bits / 8)`; with bits 0 the rows themselves, w = D.
    scale, zero: `[B, n, H, ceil(D / group)]` of a group of channels of one token, or with `form.channel` `[B, m, H, D]`
        of every channel of a group of tokens; any float dtype. With group 0 and no `form.channel` there is no scale:
        `[B, n, H, 0]`.
    group_of: with `form.channel` int32 `[B, n]`, the group of tokens that each belongs to.
    codebook: fp32 `[2 ** bits]`, or `[1 or H, 2 ** bits]`: ascending.
    outliers, places: `[B, o]`, numbers kept as they are, and where: int32 `(t H + h) D + d`, ascending, -1 (first) for
        none; D bits is then a multiple of 8.
    left, right, part_of: `[B, n, H, rank]`, `[B, F, H, rank, D]`, int32 `[B, n]`: a low-rank residual per head, found
        for tokens in F parts.
    norm: `[B, n, H]`.
    Filler rows hold anything finite, and belong to some group and part.
    """

    form: RowForm
    codes: T
    scale: T
    zero: T | None = None
    group_of: T | None = None
    codebook: T | None = None
    outliers: T | None = None
    places: T | None = None
    left: T | None = None
    right: T | None = None
    part_of: T | None = None
    norm: T | None = None

    @property
    def extras(self) -> dict[str, T]:
        """The optional tensors that are there, in the order operators take them."""
        return {name: tensor for name in ROW_EXTRAS if (tensor := getattr(self, name)) is not None}


def row_extras(form: RowForm) -> tuple[str, ...]:
    """Which optional tensors a block of `Rows` has, in the order operators take them."""
    there = {
        "zero": form.zero,
        "group_of": form.channel,
        "codebook": form.codebook,
        **dict.fromkeys(("outliers", "places"), form.outliers),
        **dict.fromkeys(("left", "right", "part_of"), form.rank > 0),
        "norm": form.norm,
    }
    return tuple(name for name in ROW_EXTRAS if there[name])


@dataclass(frozen=True)
class Segment(Generic[T]):
    """Tokens of one modality as a low-rank matrix, the sum of `blocks`; or one block of `Rows`."""

    blocks: tuple[Block[T] | Rows[T], ...]

    @property
    def factors(self) -> tuple[Block[T], ...]:
        """The low-rank blocks: all, or none where tokens are `Rows`."""
        return tuple(block for block in self.blocks if isinstance(block, Block))


@dataclass(frozen=True)
class Angles(Generic[T]):
    """Rotary embedding of packed slots, for keys that are stored before it.

    Of the first slots alone where segments behind them hold keys as they are attended: whole segments either way.

    cos, sin: `[B or 1, P, E / 2]`, one entry per pair of the E <= D rotated dims.
    axes: None: row n belongs to slot n. Else int64 `[B or 1, A, N]`: cos and sin of slot n are the sums of rows
        `axes[:, n]`, one per rotary axis (time, height, width), each zero in the pairs of the others.
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
    slot: int64 `[B, P]`, slot of every placed logical position, -1 for padding; None where nothing asks for it.
    angles: of keys stored before rotary embedding; None: segments hold what is attended to. Tail rows always do.
    ragged: whether `index` holds filler.
    """

    segments: tuple[Segment[T], ...]
    tail: T
    length: Any
    index: T
    slot: T | None = None
    angles: Angles[T] | None = None
    ragged: bool = False

    @property
    def blocks(self) -> list[Block[T] | Rows[T]]:
        return [block for segment in self.segments for block in segment.blocks]

    @property
    def packed(self) -> Any:
        """How many slots the segments have. Of tensors alone."""
        firsts: list[Any] = [segment.blocks[0] for segment in self.segments]
        return sum(map(tokens_of, firsts))


# `torch.utils._pytree` sees through them: `tree_map_only(Tensor, function, parts)` maps every tensor.
for _ in (Block, RowForm, Rows, Segment, Angles, PackedParts):
    register_dataclass(_)


def tokens_of(block: Block[Tensor] | Rows[Tensor]) -> int:
    """How many tokens a block covers."""
    return (block.codes if isinstance(block, Rows) else block.coefficient).shape[1]


def rank_of(block: Block[Tensor]) -> int:
    """Columns of a block."""
    return (block.coefficient if block.scale is None else block.scale).shape[2]


def kind(block: Block[T] | Rows[T]) -> int:
    """How a block is stored, as operators take it: formats and flags in one int."""
    if isinstance(block, Rows):
        return block.form.kind
    basis_bits = block.bits if block.basis_bits is None else block.basis_bits
    flags = (OWNED if block.owner is not None else 0) | (ASYMMETRIC if block.asymmetric else 0)
    return block.bits | flags | basis_bits << _BASIS_SHIFT


def code_bytes(numbers: int, bits: int) -> int:
    """Bytes that hold so many neighbouring codes of a format other than 0."""
    return -(-numbers * min(bits, 8) // 8)


def formats(kind: int) -> tuple[int, int]:
    """Formats of coefficient and basis of a low-rank block of this kind."""
    return kind & 15, kind >> _BASIS_SHIFT & 15


def tensor_names(kind: int) -> tuple[str, ...]:
    """Which fields of a block of this kind are tensors, in the order operators take them."""
    if kind & ROWS:
        return "codes", "scale", *row_extras(RowForm.of(kind))
    scale = ("scale",) if any(formats(kind)) else ()
    return "coefficient", "basis", *scale, *(("owner",) if kind & OWNED else ())


def tensors_of(block: Block[T] | Rows[T]) -> dict[str, T]:
    """All tensors of a block by name, in the order operators take them."""
    return {name: getattr(block, name) for name in tensor_names(kind(block))}


def block_of(kind: int, tensors: Mapping[str, T]) -> Block[T] | Rows[T]:
    """The block of this kind with these tensors: what `kind` and `tensors_of` take apart."""
    if kind & ROWS:
        return Rows(RowForm.of(kind), **tensors)
    bits, basis_bits = formats(kind)
    return Block(**tensors, bits=bits, basis_bits=basis_bits, asymmetric=bool(kind & ASYMMETRIC))


@dataclass(frozen=True)
class AnglesForm:
    """What is fixed about `Angles`.

    pairs: of rotated dims; axes: how many, 0 for a row of cos and sin per slot; own_rows, own_axes: whether samples
    have their own; dtype: of cos and sin.
    """

    pairs: int
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
    rows: dtype, and dims beyond the first two, of every tensor of every block of `Rows`, by name.
    heads: 0, or the number of KV heads, each of which keeps tokens of its own: what counts as a sample here is then a
    (sample, head) pair of one head, heads of a sample in turn.
    weighed: whether attention is asked how much it attends to each slot.
    """

    modalities: tuple[str, ...]
    kinds: tuple[tuple[int, ...], ...]
    shared: tuple[tuple[bool, ...], ...]
    ragged: bool
    angles: AnglesForm | None = None
    rows: tuple[tuple[tuple[str, torch.dtype, tuple[int, ...]], ...], ...] = ()
    heads: int = 0
    weighed: bool = False
