"""Truncated singular value decomposition of a batch of matrices, `A ~ coefficient @ basis`.

A: fp32 or float64 `[B, N, M]`; coefficient `[B, N, R]` carries the singular values; basis `[B, R, M]` has orthonormal
rows.

For ranks well below min(N, M), one step of subspace iteration (Halko, Martinsson & Tropp 2011, algorithm 4.4) from a
sparse sketch, with b columns, somewhat more than R:

    Z_0 = (S A)^T,  Y = orth(A orth(Z_0)),  Z = A^T Y          A ~ Y Z^T

and the leading left singular vectors of the thin Z, from the eigenvectors of Z^T Z, are the basis; coefficient is
`A basis^T`. S sums every b-th row with random weights, which reads A once, where a dense sketch costs a product with
it. All else is matrix products and factorisations of small matrices: Householder QR of the tall factors costs more than
the products, on CPU and on GPU. In float64 every matrix is factored exactly: who computes in it wants its digits.
"""

import torch
from torch import Tensor

from attnpack_fx.kernels.linalg import inverse_of_triangle, orthonormal

#: Directions below this share of the largest singular value are fp32 rounding.
NEGLIGIBLE = 1e-6
#: Squares from this share of the largest on have digits in fp32, and from this number on.
SURE, TINY = 1e-4, 1e-30


def truncated_svd(a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best rank-`rank` approximation of a `[B, N, M]`, exact or (for small ranks) within 2 % of its error."""
    smallest = min(a.shape[1:])
    rank = min(rank, smallest)
    columns = _columns(rank)
    if a.dtype == torch.float64 or 2 * columns > smallest:
        left, singular, right = torch.linalg.svd(a, full_matrices=False)
        return left[..., :rank] * singular[:, None, :rank], right[:, :rank]
    return _subspace_iteration(a, rank, columns)


def _columns(rank: int) -> int:
    """How many are iterated: these leave at most 2 % of error above the optimum at rank 64 on a spectrum as slow as
    k^-0.5, less on faster ones and at lower ranks."""
    return rank + rank // 2 + 16


def _subspace_iteration(a: Tensor, rank: int, columns: int) -> tuple[Tensor, Tensor]:
    # A generator of its own: the same matrix gives the same factors, and the global random state stays untouched.
    generator = torch.Generator(device=a.device).manual_seed(0)
    start = _orthonormal(_sketched(a, columns, generator).mT)
    z = (_orthonormal(a @ start).mT @ a).mT
    basis = _leading_directions(z, rank, generator)
    return a @ basis, basis.mT


def _sketched(a: Tensor, columns: int, generator: torch.Generator) -> Tensor:
    """Weighted sums of the rows of a `[B, N, M]`, `columns` of them: row i is in sum i modulo that."""
    weights = torch.randn((a.shape[1], 1), generator=generator, device=a.device)
    sums = a.new_zeros((a.shape[0], columns, a.shape[2]))
    for rows, each in zip(a.split(columns, 1), weights.split(columns), strict=True):
        sums[:, : rows.shape[1]].addcmul_(rows, each)
    return sums


def _leading_directions(z: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """The first left singular vectors of z `[B, M, k]`: `[B, M, rank]`."""
    squared, vectors = _eigen(z, rank)
    singular = squared.flip(-1)[:, :rank].clamp(min=0).sqrt()
    missing = singular <= NEGLIGIBLE * singular[:, :1]
    turn = vectors.flip(-1)[..., :rank] / singular.masked_fill(missing, 1)[:, None]
    directions = z @ turn.to(z.dtype)
    if z.is_cuda or missing.any():
        # Where the matrix has no more directions, random ones complete the basis, with coefficients that are rounding.
        random = torch.randn(directions.shape[1:], generator=generator, device=z.device)
        directions = torch.where(missing[:, None], random, directions)
    return _orthonormal(directions)


def _eigen(z: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors of the Gram matrix of z, in fp32 where the last `rank` have digits."""
    if not z.is_cuda and (gram := z.mT @ z).isfinite().all():
        squared, vectors = torch.linalg.eigh(gram)
        if bool((squared[:, -rank] > (SURE * squared[:, -1]).clamp(min=TINY)).all()):
            return squared, vectors
    wide = z.double()
    return torch.linalg.eigh(wide.mT @ wide)


def _orthonormal(z: Tensor) -> Tensor:
    """As `orthonormal`, of fp32 columns, with their Gram matrix in fp32 where that has digits enough."""
    if not z.is_cuda:
        lower, failed = torch.linalg.cholesky_ex(z.mT @ z)
        squares = lower.diagonal(dim1=-2, dim2=-1).square()
        if not failed.any() and bool((squares.amin(-1) > (SURE * squares.amax(-1)).clamp(min=TINY)).all()):
            return z @ inverse_of_triangle(lower).mT
    return orthonormal(z)
