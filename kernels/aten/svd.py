"""Truncated singular value decomposition of a batch of matrices, `A ~ coefficient @ basis`.

A: fp32 or float64 `[B, N, M]`; coefficient `[B, N, R]` carries the singular values; basis `[B, R, M]` has orthonormal
rows.

For ranks well below min(N, M), a randomised block Krylov method (Musco & Musco 2015, algorithm 2): with b = R / 2 + 16
columns
at a time, and every block of Y made orthonormal to those before it,

    Y_1 = orth(A Omega),  Z_i = A^T Y_i,  Y_i+1 = orth(A Z_i)          A ~ Y Z^T,  Y [N, 3 b],  Z [M, 3 b]

and the SVD of the thin Z follows from the eigenvectors of Z^T Z. It needs half the products with A that power
iteration with
oversampling does for the same error. All of it is matrix products and factorisations of small matrices: Householder QR
of the
tall factors costs more than the products, on CPU and on GPU. In float64 every matrix is factored exactly: who computes
in it wants its digits.
"""

import torch
from torch import Tensor

#: Blocks, and columns of a block beyond R / 2. Together they leave less than 1 % of error above the optimum at rank 64
#: on spectra as slow as k^-0.5.
BLOCKS = 3
OVERSAMPLING = 16
#: Directions below this share of the largest singular value are fp32 rounding.
NEGLIGIBLE = 1e-6


def truncated_svd(a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best rank-`rank` approximation of a `[B, N, M]`, exact or (for small ranks) within 1 % of its error."""
    smallest = min(a.shape[1:])
    rank = min(rank, smallest)
    block = rank // 2 + OVERSAMPLING
    if a.dtype == torch.float64 or 2 * BLOCKS * block > smallest:
        left, singular, right = torch.linalg.svd(a, full_matrices=False)
        return left[..., :rank] * singular[:, None, :rank], right[:, :rank]
    return _block_krylov(a, rank, block)


def sketch_size(rank: int) -> int:
    """Columns of a block power iteration (on a GPU, see `triton/factorize.py`).

    After two iterations less than 1 % of error above the optimum is left at rank 64 on spectra as slow as k^-0.5.
    """
    return rank + 16 + min(rank // 4, 32)


def _block_krylov(a: Tensor, rank: int, block: int) -> tuple[Tensor, Tensor]:
    # A generator of its own: the same matrix gives the same factors, and the global random state stays untouched.
    generator = torch.Generator(device=a.device).manual_seed(0)
    z = torch.randn((1, a.shape[2], block), generator=generator, device=a.device).expand(a.shape[0], -1, -1)
    ys: list[Tensor] = []
    zs: list[Tensor] = []
    for _ in range(BLOCKS):
        y = a @ (orthonormal(z, torch.float32) if zs else z)
        for _ in range(2):  # once loses orthogonality where little of the block is new
            for before in ys:
                y = y - before @ (before.mT @ y)
            y = orthonormal(y)
        z = a.mT @ y
        ys.append(y)
        zs.append(z)
    left, right = torch.cat(ys, -1), torch.cat(zs, -1)
    basis = _leading_directions(right, rank, generator)
    return left @ (right.mT @ basis), basis.mT


def _leading_directions(z: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """The first left singular vectors of z `[B, M, k]`: `[B, M, rank]`."""
    wide = z.double()
    squared, vectors = torch.linalg.eigh(wide.mT @ wide)
    singular = squared.flip(-1)[:, :rank].clamp(min=0).sqrt()
    missing = singular <= NEGLIGIBLE * singular[:, :1]
    turn = vectors.flip(-1)[..., :rank] / singular.masked_fill(missing, 1)[:, None]
    directions = z @ turn.to(z.dtype)
    if z.is_cuda or missing.any():
        # Where the matrix has no more directions, random ones complete the basis; their coefficients come out as
        # rounding.
        random = torch.randn(directions.shape[1:], generator=generator, device=z.device)
        directions = torch.where(missing[:, None], random, directions)
    return orthonormal(directions)


def orthonormal(z: Tensor, precision: torch.dtype = torch.float64) -> Tensor:
    """Columns of z `[B, n, k]` made orthonormal by Cholesky QR with the Gram matrix in `precision`; zero stays zero.

    A shift keeps the Gram matrix of dependent columns positive definite (Fukaya et al. 2020): for those, a second call
    is
    needed, and in single precision the result is only better conditioned.
    """
    return z @ whitening(z.to(precision)).to(z.dtype)


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
