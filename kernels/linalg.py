"""What every implementation of the factorisations has in common: sizes, forms, and small matrices."""

import torch
from torch import Tensor


def sketch_size(rank: int) -> int:
    """Columns of a block power iteration (on a GPU, see `triton/factorize.py`).

    After two iterations less than 1 % of error above the optimum is left at rank 64 on spectra as slow as k^-0.5.
    """
    return rank + 16 + min(rank // 4, 32)


def orthonormal(z: Tensor) -> Tensor:
    """Columns of z `[B, n, k]` made orthonormal by Cholesky QR with the Gram matrix in float64; zero stays zero.

    A shift keeps the Gram matrix of dependent columns positive definite (Fukaya et al. 2020): for those, a second call
    is needed. No number is read, for which a GPU would be waited for.
    """
    return z @ whitening(z.double()).to(z.dtype)


def whitening(z: Tensor) -> Tensor:
    """fp64 `[B, k, k]` that makes the columns of z `[B, n, k]` orthonormal, as `orthonormal` has it, from the right."""
    gram = (z.mT @ z).double()
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    diagonal += diagonal.sum(-1, keepdim=True) * (1e-13 if z.dtype == torch.float64 else 1e-6) + 1e-60
    return inverse_of_triangle(cholesky(gram)).mT


def cholesky(gram: Tensor) -> Tensor:
    """The lower factor of symmetric positive definite matrices. On a GPU nothing waits to hear whether they were."""
    return torch.linalg.cholesky_ex(gram, check_errors=not gram.is_cuda).L


def inverse_of_triangle(lower: Tensor) -> Tensor:
    """The inverse of lower triangular matrices `[b, k, k]`."""
    identity = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower, identity, upper=False)


def working(dtype: torch.dtype) -> torch.dtype:
    """In what a cache of this dtype is factored: fp32, or float64 where that is what it holds."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def per_head(basis: Tensor, heads: int, dim: int) -> Tensor:
    """`[B, R, H * D]` to `[B, H, R, D]`."""
    return basis.unflatten(-1, (heads, dim)).transpose(1, 2).contiguous()


def require_finite(tokens: Tensor, operator: str) -> None:
    """Refuse NaN and Inf, which would spread over a whole basis. On a GPU the check does not wait for the device."""
    if tokens.is_cuda:
        torch._assert_async(
            tokens.isfinite().all(), f"attnpack::{operator}: keys or values to be packed hold NaN or Inf"
        )
        return
    if tokens.numel() == 0 or all(bound.isfinite() for bound in torch.aminmax(tokens)):
        return
    count = int((~tokens.isfinite()).sum())
    raise ValueError(
        f"attnpack::{operator}: {count} of {tokens.numel()} numbers to be packed are NaN or Inf. Find where the model "
        "makes them (often fp16 overflow: try bfloat16), or mark those tokens as padding, or leave this cache dense."
    )
