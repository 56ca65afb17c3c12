"""Blocks of a packed tensor with codes of low-rank factors turned into numbers."""

from typing import NamedTuple

import torch
from torch import Tensor

from attnpack_fx.kernels.aten.quantize import dequantize_basis, dequantize_coefficient
from attnpack_fx.kernels.parts import Block, PackedParts, Rows, formats, kind


class Factors(NamedTuple):
    """One low-rank block: coefficient `[B, n, r]` and basis `[B or 1, H, r, D]`."""

    coefficient: Tensor
    basis: Tensor


#: A segment: the blocks of its low-rank matrix, the first of which covers all its tokens; or rows.
Stored = list[Factors] | Rows[Tensor]


def segments(parts: PackedParts[Tensor], dtype: torch.dtype) -> list[Stored]:
    """The segments that hold anything, in order; factors in `dtype`, rows as they are stored."""
    found: list[Stored] = []
    for segment in parts.segments:
        rows = segment.blocks[0]
        if isinstance(rows, Rows):
            found += [rows] if rows.codes.shape[1] else []
            continue
        covering = [block for block in segment.factors if block.coefficient.shape[1]]
        found += [[_factors(block, parts.tail.shape[3], dtype) for block in covering]] if covering else []
    return found


def _factors(block: Block[Tensor], dim: int, dtype: torch.dtype) -> Factors:
    coefficient, basis, scale = block.coefficient, block.basis, block.scale
    if block.owner is not None:
        basis = basis.index_select(0, block.owner)
    if scale is not None:
        bits, basis_bits = formats(kind(block))
        if bits:
            coefficient = dequantize_coefficient(coefficient, scale, scale.shape[2], bits, dtype)
        if basis_bits:
            basis = dequantize_basis(basis, scale, dim, basis_bits, dtype)
    return Factors(coefficient.to(dtype), basis.to(dtype))


def tokens(segment: Stored) -> int:
    """How many slots a segment has."""
    return segment.codes.shape[1] if isinstance(segment, Rows) else segment[0].coefficient.shape[1]
