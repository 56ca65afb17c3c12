"""Blocks of a packed tensor as matrices: the segment each belongs to, and codes turned into numbers."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attnpack_fx.kernels.aten.quantize import dequantize_basis, dequantize_coefficient
from attnpack_fx.kernels.parts import OWNED


class Factors(NamedTuple):
    """One block: coefficient `[B, n, r]` and basis `[B or 1, H, r, D]` of segment number `segment`."""

    segment: int
    coefficient: Tensor
    basis: Tensor


def factors(
    coefficients: Sequence[Tensor],
    bases: Sequence[Tensor],
    scales: Sequence[Tensor],
    owners: Sequence[Tensor],
    blocks: Sequence[int],
    dim: int,
    dtype: torch.dtype,
) -> list[Factors]:
    """The blocks that hold anything, in `dtype`, in order."""
    found, remaining, owning = [], iter(scales), iter(owners)
    for number, (coefficient, basis) in enumerate(zip(coefficients, bases, strict=True)):
        segment, kind = blocks[2 * number : 2 * number + 2] if blocks else (number, 0)
        bits = kind & ~OWNED
        if kind & OWNED:
            basis = basis.index_select(0, next(owning))
        if bits:
            scale = next(remaining)
            rank = scale.shape[2]
            coefficient = dequantize_coefficient(coefficient, scale, rank, bits, dtype)
            basis = dequantize_basis(basis, scale, dim, bits, dtype)
        if coefficient.shape[1]:
            found.append(Factors(segment, coefficient.to(dtype), basis.to(dtype)))
    return found


def by_segment(blocks: Sequence[Factors]) -> Iterator[list[Factors]]:
    """The blocks of each segment; the first of them covers all its tokens."""
    alike: list[Factors] = []
    for block in blocks:
        if alike and block.segment != alike[0].segment:
            yield alike
            alike = []
        alike.append(block)
    if alike:
        yield alike
