"""Blocks of a packed tensor: the segment each belongs to, and codes of low-rank factors turned into numbers."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attnpack_fx.kernels.aten.quantize import dequantize_basis, dequantize_coefficient
from attnpack_fx.kernels.parts import OWNED, ROWS, RowForm, Rows, formats, row_extras


class Factors(NamedTuple):
    """One low-rank block: coefficient `[B, n, r]` and basis `[B or 1, H, r, D]`."""

    coefficient: Tensor
    basis: Tensor


#: A segment: the blocks of its low-rank matrix, the first of which covers all its tokens; or rows.
Stored = list[Factors] | Rows[Tensor]


def segments(
    coefficients: Sequence[Tensor],
    bases: Sequence[Tensor],
    scales: Sequence[Tensor],
    owners: Sequence[Tensor],
    blocks: Sequence[int],
    dim: int,
    dtype: torch.dtype,
) -> list[Stored]:
    """The segments that hold anything, in order; factors in `dtype`, rows as they are stored."""
    found: dict[int, Stored] = {}
    remaining, owning = iter(scales), iter(owners)
    for number, (coefficient, basis) in enumerate(zip(coefficients, bases, strict=True)):
        segment, kind = blocks[2 * number : 2 * number + 2] if blocks else (number, 0)
        if kind & ROWS:
            form = RowForm.of(kind)
            rows = Rows(form, coefficient, basis, **{name: next(remaining) for name in row_extras(form)})
            if coefficient.shape[1]:
                found[segment] = rows
            continue
        bits, basis_bits = formats(kind)
        if kind & OWNED:
            basis = basis.index_select(0, next(owning))
        if bits or basis_bits:
            scale = next(remaining)
            if bits:
                coefficient = dequantize_coefficient(coefficient, scale, scale.shape[2], bits, dtype)
            if basis_bits:
                basis = dequantize_basis(basis, scale, dim, basis_bits, dtype)
        if coefficient.shape[1]:
            low_rank = found.setdefault(segment, [])
            assert isinstance(low_rank, list), "rows share no segment with factors"
            low_rank.append(Factors(coefficient.to(dtype), basis.to(dtype)))
    return list(found.values())


def tokens(segment: Stored) -> int:
    """How many slots a segment has."""
    return segment.codes.shape[1] if isinstance(segment, Rows) else segment[0].coefficient.shape[1]
