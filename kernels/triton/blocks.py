"""Packed parts as the kernels for coded segments take them: which block stands where, and in which form.

A *form* is what is compiled in about a low-rank block: a tuple, since kernels' compiled-in arguments are numbers and
tuples of them.

    0 number      of its tensors among the kernel's arguments
    1 bits        of the coefficient          2 basis bits          3 whether there are zero points
    4 rank        5 rank padded to a tile
    6 start       column in buffers of latent queries (of all blocks of keys) or results (of a segment's values)
    7 first part  of the program that absorbs queries           8 parts, of equally many ranks
    9 step        elements from one row of the coefficient to the next
    10 shared     whether all samples have one basis             11 step of the basis
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from attnpack_fx.kernels.parts import ASYMMETRIC, OWNED, ROWS, RowForm, formats, row_extras
from attnpack_fx.kernels.triton.launch import block, cdiv

#: Low-rank blocks of keys, and of values, that one launch takes.
MOST_BLOCKS = 4
#: Ranks that one program absorbs queries into.
BASIS_ROWS = 64

Form = tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """One block as operators get it: its kind (`parts.kind`), and its tensors."""

    kind: int
    coefficient: Tensor
    basis: Tensor
    scale: Tensor | None

    @property
    def tokens(self) -> int:
        """How many of the segment's first tokens it covers."""
        return self.coefficient.shape[1]

    @property
    def rank(self) -> int:
        return int(self.coefficient.shape[2] if self.scale is None else self.scale.shape[2])

    def form(self, number: int, start: int, first_part: int, dim: int) -> Form:
        bits, basis_bits = formats(self.kind)
        wide, steps = block(self.rank), (_step(self.rank, bits), _step(dim, basis_bits))
        asymmetric, shared = int(bool(self.kind & ASYMMETRIC)), int(self.basis.shape[0] == 1)
        parts = wide // min(wide, BASIS_ROWS)
        return (
            number,
            bits,
            basis_bits,
            asymmetric,
            self.rank,
            wide,
            start,
            first_part,
            parts,
            steps[0],
            shared,
            steps[1],
        )


@dataclass(frozen=True)
class StoredRows:
    """A block of `parts.Rows` as operators get it."""

    form: RowForm
    codes: Tensor
    scale: Tensor
    extras: Mapping[str, Tensor]

    @property
    def tokens(self) -> int:
        return self.codes.shape[1]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "scale": self.scale, **self.extras}

    def compiled(self, dim: int) -> Form:
        """Form of the rows, see `coded_rows.py`."""
        form, book = self.form, self.extras.get("codebook")
        books = 0 if book is None else 2 if book.dim() == 2 and book.shape[0] > 1 else 1
        flags = int(form.channel), int(form.zero), books, int(form.norm)
        return form.bits, form.group, *flags, _step(dim, form.bits), dim


#: A segment: its low-rank blocks, or one block of rows.
Part = list[Stored] | StoredRows


def _step(size: int, bits: int) -> int:
    """Elements of a row of `size` numbers: bytes, or with 0 bits numbers."""
    return size if bits == 0 or bits >= 8 else cdiv(size * bits, 8)


def stored(
    coefficients: Sequence[Tensor], bases: Sequence[Tensor], scales: Sequence[Tensor], blocks: Sequence[int]
) -> list[Part]:
    """The blocks of each segment that hold tokens; low-rank segments without are left out."""
    found: list[Part] = []
    remaining, before = iter(scales), -1
    for number, (coefficient, basis) in enumerate(zip(coefficients, bases, strict=True)):
        segment, kind = blocks[2 * number : 2 * number + 2] if blocks else (number, 0)
        if kind & ROWS:
            form = RowForm.of(kind)
            extras = {name: next(remaining) for name in row_extras(form)}
            found.append(StoredRows(form, coefficient, basis, extras))
            continue
        scale = next(remaining) if any(formats(kind)) else None
        if not coefficient.shape[1]:
            continue
        block = Stored(kind, coefficient, basis, scale)
        if segment == before and isinstance(found[-1], list):
            found[-1].append(block)
        else:
            found.append([block])
        before = segment
    return found


def low_rank(parts: Sequence[Part]) -> list[list[Stored]]:
    return [part for part in parts if not isinstance(part, StoredRows)]


def tokens_of(part: Part) -> int:
    """How many tokens a segment holds: its first block covers all."""
    return part.tokens if isinstance(part, StoredRows) else part[0].tokens


def contiguous(parts: Sequence[Part]) -> list[Part]:
    return [
        StoredRows(
            part.form,
            part.codes.contiguous(),
            part.scale.contiguous(),
            {name: tensor.contiguous() for name, tensor in part.extras.items()},
        )
        if isinstance(part, StoredRows)
        else [
            Stored(
                each.kind,
                each.coefficient.contiguous(),
                each.basis.contiguous(),
                None if each.scale is None else each.scale.contiguous(),
            )
            for each in part
        ]
        for part in parts
    ]


def key_forms(segments: Sequence[Sequence[Stored]], dim: int) -> tuple[tuple[tuple[Form, ...], ...], int, int]:
    """Forms of the blocks of keys, the width of latent queries, and how many parts absorb them."""
    forms: list[tuple[Form, ...]] = []
    number = start = part = 0
    for blocks in segments:
        alike = []
        for each in blocks:
            alike.append(each.form(number, start, part, dim))
            number, start, part = number + 1, start + alike[-1][5], part + alike[-1][8]
        forms.append(tuple(alike))
    return tuple(forms), start, part


def value_forms(segments: Sequence[Sequence[Stored]], dim: int) -> tuple[tuple[tuple[Form, ...], ...], int]:
    """Forms of the blocks of values, and the width of latent results."""
    forms: list[tuple[Form, ...]] = []
    number = width = 0
    for blocks in segments:
        alike, start = [], 0
        for each in blocks:
            alike.append(each.form(number, start, 0, dim))
            number, start = number + 1, start + alike[-1][5]
        forms.append(tuple(alike))
        width = max(width, start)
    return tuple(forms), width


def alike(keys: Sequence[Part], values: Sequence[Part]) -> bool:
    """Whether keys and values have the same segments, of the same tokens: of rows that come last, in any number."""
    kinds = [[isinstance(part, StoredRows) for part in parts] for parts in (keys, values)]
    if kinds[0] != kinds[1] or sum(kinds[0]) > 1:
        return False
    ends = len(keys) - bool(kinds[0] and kinds[0][-1])
    return all(tokens_of(key) == tokens_of(value) for key, value in zip(keys[:ends], values[:ends], strict=True))


def takes_parts(keys: Sequence[Part], values: Sequence[Part], query: Tensor) -> bool:
    """Whether the kernels take these segments of keys and values, which are alike."""
    return all(_takes_blocks(parts, query) and all(map(_takes_rows, parts)) for parts in (keys, values))


def _takes_blocks(parts: Sequence[Part], query: Tensor) -> bool:
    """Whether there are few enough low-rank blocks, and none with a basis that samples choose."""
    every = [each for blocks in low_rank(parts) for each in blocks]
    whole = [
        factor
        for each in every
        for factor, bits in zip((each.coefficient, each.basis), formats(each.kind), strict=True)
        if not bits
    ]
    return (
        len(every) <= MOST_BLOCKS
        and not any(each.kind & OWNED for each in every)
        and all(each.basis.shape[0] in (1, query.shape[0]) for each in every)
        and all(factor.dtype == query.dtype for factor in whole)
    )


def _takes_rows(part: Part) -> bool:
    """Whether rows are codes and scales alone, and offsets within a sample fit 32 bits."""
    if not isinstance(part, StoredRows):
        return True
    # `Size.numel` would fix symbolic sizes.
    sizes = [math.prod(tensor.shape[1:]) for name, tensor in part.tensors.items() if name != "codebook"]
    return not part.form.outliers and not part.form.rank and all(size < 2**31 for size in sizes)
