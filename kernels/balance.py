"""Factors that a narrow dtype can hold: a coefficient is as large as a token's row over all heads, a number is not.

With heads concatenated, coefficients carry the norms of rows `[H * D]`, up to `sqrt(H D)` times the largest number: in
half precision keys that fit would give coefficients that do not. So a power of two moves into the basis, one for all
columns of a sample, which rounds nothing and leaves columns in their order. Rows of such a basis have that length, not
1, which counts where norms are read from coefficients (`lengths`).
"""

import torch
from torch import Tensor


def balanced(coefficient: Tensor, basis: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both in `dtype`, with `coefficient @ basis` what it was, and no number beyond what it holds.

    coefficient `[B, N, R]`, basis `[B, R, M]`, or `[1, R, M]` for all samples, in the dtype they were found in.
    """
    scale = overflow(coefficient, dtype)
    if scale is not None:
        if basis.shape[0] == 1:
            scale = scale.amax(0, keepdim=True)
        coefficient, basis = coefficient / scale, basis * scale
    return coefficient.to(dtype), basis.to(dtype)


def overflow(coefficient: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The power of two `[B, 1, 1]`, at least 1, by which every sample's coefficients are to shrink.

    None for dtypes that reach as far as fp32 does.
    """
    if dtype != torch.float16:
        return None
    # Half of what it holds: products of factors are summed before they are rounded.
    times = coefficient.flatten(1).abs() / (torch.finfo(dtype).max / 2)
    # One more column, as there may be none.
    largest = torch.cat([times, times.new_ones((times.shape[0], 1))], 1).amax(1)[:, None, None]
    return torch.exp2(torch.log2(largest).ceil())


def fits(coefficient: Tensor, dtype: torch.dtype) -> bool:
    """Whether coefficients are none but numbers of this dtype, as they are."""
    return dtype != torch.float16 or coefficient.dtype == dtype or bool((coefficient.to(dtype).isfinite()).all())


def lengths(basis: Tensor) -> Tensor:
    """By which power of two the rows of every basis `[G, H, R, D]` are longer than 1: float64 `[G]`."""
    norms = basis.double().square().sum((1, 3)).amax(1) if basis.shape[2] else basis.new_zeros(basis.shape[0]).double()
    return torch.exp2(norms.clamp(min=1).log2().div(2).round())
