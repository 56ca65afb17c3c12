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
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from attnpack_fx.kernels.parts import (
    Block,
    PackedParts,
    Rows,
    block_of,
    formats,
    kind,
    rank_of,
    tensors_of,
    tokens_of,
)
from attnpack_fx.kernels.triton.launch import block, cdiv

#: Low-rank blocks of keys, and of values, that one launch takes.
MOST_BLOCKS = 4
#: Ranks that one program absorbs queries into.
BASIS_ROWS = 64

Form = tuple[int, ...]


#: A segment: its low-rank blocks, or one block of rows.
Part = list[Block[Tensor]] | Rows[Tensor]


def block_form(each: Block[Tensor], number: int, start: int, first_part: int, dim: int) -> Form:
    """The form of a low-rank block."""
    (bits, basis_bits), rank = formats(kind(each)), rank_of(each)
    wide = block(rank)
    return (
        number,
        bits,
        basis_bits,
        int(each.asymmetric),
        rank,
        wide,
        start,
        first_part,
        wide // min(wide, BASIS_ROWS),
        _step(rank, bits),
        int(each.basis.shape[0] == 1),
        _step(dim, basis_bits),
    )


def rows_form(rows: Rows[Tensor], dim: int) -> Form:
    """The form of rows, see `coded_rows.py`."""
    form, book = rows.form, rows.codebook
    books = 0 if book is None else 2 if book.dim() == 2 and book.shape[0] > 1 else 1
    flags = int(form.channel), int(form.zero), books, int(form.norm)
    return form.bits, form.group, *flags, _step(dim, form.bits), dim


def _step(size: int, bits: int) -> int:
    """Elements of a row of `size` numbers: bytes, or with 0 bits numbers."""
    return size if bits == 0 or bits >= 8 else cdiv(size * bits, 8)


def stored(parts: PackedParts[Tensor]) -> list[Part]:
    """The blocks of each segment that hold tokens; low-rank segments without are left out."""
    found: list[Part] = []
    for segment in parts.segments:
        rows = segment.blocks[0]
        if isinstance(rows, Rows):
            found.append(rows)
        elif covering := [each for each in segment.factors if each.coefficient.shape[1]]:
            found.append(covering)
    return found


def low_rank(parts: Sequence[Part]) -> list[list[Block[Tensor]]]:
    return [part for part in parts if not isinstance(part, Rows)]


def part_tokens(part: Part) -> int:
    """How many tokens a segment holds: its first block covers all."""
    return tokens_of(part if isinstance(part, Rows) else part[0])


def contiguous(parts: Sequence[Part]) -> list[Part]:
    return [_contiguous(part) if isinstance(part, Rows) else list(map(_contiguous, part)) for part in parts]


def _contiguous(each: Any) -> Any:
    return block_of(kind(each), {name: tensor.contiguous() for name, tensor in tensors_of(each).items()})


def key_forms(segments: Sequence[Sequence[Block[Tensor]]], dim: int) -> tuple[tuple[tuple[Form, ...], ...], int, int]:
    """Forms of the blocks of keys, the width of latent queries, and how many parts absorb them."""
    forms: list[tuple[Form, ...]] = []
    number = start = part = 0
    for blocks in segments:
        alike = []
        for each in blocks:
            alike.append(block_form(each, number, start, part, dim))
            number, start, part = number + 1, start + alike[-1][5], part + alike[-1][8]
        forms.append(tuple(alike))
    return tuple(forms), start, part


def value_forms(segments: Sequence[Sequence[Block[Tensor]]], dim: int) -> tuple[tuple[tuple[Form, ...], ...], int]:
    """Forms of the blocks of values, and the width of latent results."""
    forms: list[tuple[Form, ...]] = []
    number = width = 0
    for blocks in segments:
        alike, start = [], 0
        for each in blocks:
            alike.append(block_form(each, number, start, 0, dim))
            number, start = number + 1, start + alike[-1][5]
        forms.append(tuple(alike))
        width = max(width, start)
    return tuple(forms), width


def alike(keys: Sequence[Part], values: Sequence[Part]) -> bool:
    """Whether keys and values have the same segments, of the same tokens: of rows that come last, in any number."""
    kinds = [[isinstance(part, Rows) for part in parts] for parts in (keys, values)]
    if kinds[0] != kinds[1] or sum(kinds[0]) > 1:
        return False
    ends = len(keys) - bool(kinds[0] and kinds[0][-1])
    return all(part_tokens(key) == part_tokens(value) for key, value in zip(keys[:ends], values[:ends], strict=True))


def takes_parts(keys: Sequence[Part], values: Sequence[Part], query: Tensor) -> bool:
    """Whether the kernels take these segments of keys and values, which are alike."""
    return all(_takes_blocks(parts, query) and all(map(_takes_rows, parts)) for parts in (keys, values))


def _takes_blocks(parts: Sequence[Part], query: Tensor) -> bool:
    """Whether there are few enough low-rank blocks, and none with a basis that samples choose."""
    every = [each for blocks in low_rank(parts) for each in blocks]
    whole = [
        factor
        for each in every
        for factor, bits in zip((each.coefficient, each.basis), formats(kind(each)), strict=True)
        if not bits
    ]
    return (
        len(every) <= MOST_BLOCKS
        and not any(each.owner is not None for each in every)
        and all(each.basis.shape[0] in (1, query.shape[0]) for each in every)
        and all(factor.dtype == query.dtype for factor in whole)
    )


def _takes_rows(part: Part) -> bool:
    """Whether rows are codes and scales alone, and offsets within a sample fit 32 bits."""
    if not isinstance(part, Rows):
        return True
    # `Size.numel` would fix symbolic sizes.
    sizes = [math.prod(tensor.shape[1:]) for name, tensor in tensors_of(part).items() if name != "codebook"]
    return not part.form.outliers and not part.form.rank and all(size < 2**31 for size in sizes)
