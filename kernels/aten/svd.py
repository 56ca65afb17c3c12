"""Truncated singular value decomposition of a batch of matrices, `A ~ coefficient @ basis`.

A: fp32 `[B, N, M]`; coefficient `[B, N, R]` carries the singular values; basis `[B, R, M]` has orthonormal rows.

For ranks well below min(N, M), block power iteration with an oversampled random start (Halko, Martinsson & Tropp 2011,
algorithms 4.4 and 5.1):

    Z = A^T Omega;   repeat: Y = orth(A orth(Z)),  Z = A^T Y;     A ~ Y Z^T

and the SVD of the thin Z follows from the eigenvectors of Z^T Z. All of it is matrix products and factorisations of
`[k, k]` matrices (k = R + oversampling): Householder QR of the tall factors costs more than the products, on CPU and on GPU.
"""

import torch
from torch import Tensor

#: Columns beyond the rank, and pairs of products after the first: together they leave less than 1 % of error above the
#: optimum at rank 64 on spectra as slow as k^-0.5.
OVERSAMPLING = 32
ITERATIONS = 2
#: Directions below this share of the largest singular value are fp32 rounding.
NEGLIGIBLE = 1e-5


def truncated_svd(a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best rank-`rank` approximation of a `[B, N, M]`, exact or (for small ranks) within 1 % of its error."""
    smallest = min(a.shape[1:])
    rank = min(rank, smallest)
    if 2 * (rank + OVERSAMPLING) > smallest:
        left, singular, right = torch.linalg.svd(a, full_matrices=False)
        return left[..., :rank] * singular[:, None, :rank], right[:, :rank]
    return _power_iteration(a, rank)


def _power_iteration(a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    batch, rows, columns = a.shape
    # A generator of its own: the same matrix gives the same factors, and the global random state stays untouched.
    generator = torch.Generator(device=a.device).manual_seed(0)
    start = torch.randn((rows, rank + OVERSAMPLING), generator=generator, device=a.device)
    z = a.mT @ start
    for _ in range(ITERATIONS):
        y = orthonormal(orthonormal(a @ orthonormal(z)))
        z = a.mT @ y
    wide = z.double()
    squared, vectors = torch.linalg.eigh(wide.mT @ wide)
    squared, vectors = squared.flip(-1)[:, :rank], vectors.flip(-1)[..., :rank]
    singular = squared.clamp(min=0).sqrt()
    missing = singular <= NEGLIGIBLE * singular[:, :1]
    # Where the matrix has no more directions, random ones complete the basis; their coefficients come out as zero.
    filling = torch.randn((columns, rank), generator=generator, device=a.device) if bool(missing.any()) else 0
    basis = torch.where(missing[:, None], filling, (wide @ (vectors / singular.masked_fill(missing, 1)[:, None])).float())
    basis = orthonormal(basis)
    return y @ (z.mT @ basis), basis.mT


def orthonormal(z: Tensor) -> Tensor:
    """Columns of z `[B, n, k]` made orthonormal by Cholesky QR, twice for full accuracy; zero columns stay near zero."""
    wide = z.double()
    gram = wide.mT @ wide
    # The shift keeps a rank-deficient Gram matrix positive definite (Fukaya et al. 2020).
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    gram.diagonal(dim1=-2, dim2=-1).add_((1e-13 * trace + 1e-60)[:, None])
    factor = torch.linalg.cholesky(gram)
    inverse = torch.linalg.solve_triangular(factor, torch.eye(z.shape[-1], dtype=gram.dtype, device=z.device), upper=False)
    return z @ inverse.mT.to(z.dtype)
