"""Truncated SVD that exports: matrix products, and one loop of Jacobi rotations.

Runtimes of artefacts have no `svd`, `qr` or `cholesky`. For a batch of matrices A [N, M], N known only when it runs:

    Y_i = orth(A Q_i),   Q_i+1 = orth(A^T Y_i)          Q [M, k], k a little above the rank
    B = A Q,   B^T B = V L V^T,                         coefficient = B V_R,   basis = (Q V_R)^T

with `orth(Z) = Z (Z^T Z)^-1/2` by the Newton-Schulz iteration (Higham 2008, section 6.7, coupled form), twice, and
the eigenproblem [k, k] by cyclic Jacobi, where a round turns k / 2 disjoint pairs at once (Brent and Luk 1985). The
Gram matrix of B has lost what is below 3e-4 of the largest singular value, but that of B V has columns of graded
lengths, each to its own precision, and is turned once more. All in fp32: directions below 1e-6 are rounding.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._higher_order_ops.while_loop import while_loop

from attnpack_fx.kernels.linalg import sketch_size

#: Iterations: of the subspace, of Newton-Schulz (each takes a direction's length 1.5 times nearer to 1).
_SUBSPACE, _NEWTON = 3, 24
#: Jacobi sweeps of the first and of the second eigenproblem.
_SWEEPS = 7, 2
#: Steps of Newton-Schulz on the basis itself, which correct what the coupled form has gathered in rounding.
_POLISH = 2
#: Added to the eigenvalues of a Gram matrix, as a share of their sum. Rounding takes those of lower rank to -1e-6, and
#: negative ones would grow without a bound.
_SHIFT = 2e-6


def starting_basis(width: int, rank: int) -> Tensor:
    """Columns to begin with, fp32 `[M, k]`, k even: random, and the same each time."""
    columns = min(sketch_size(rank), width)
    generator = torch.Generator().manual_seed(0)
    start = torch.linalg.qr(torch.randn((width, columns), generator=generator)).Q
    # Jacobi takes pairs: a column of zeros more where there is an odd one.
    return nn.functional.pad(start, (0, columns % 2)).contiguous()


def truncated_svd(a: Tensor, rank: int, start: Tensor) -> tuple[Tensor, Tensor]:
    """Of a fp32 `[n, N, M]`: coefficient `[n, N, R]`, columns sorted by singular value and carrying it, and basis
    `[n, R, M]`, orthonormal rows. Where N < R, further columns are zero or rounding.

    start: of `starting_basis`, for this rank or a higher one.
    """
    q = start.expand(a.shape[0], -1, -1)
    for _ in range(_SUBSPACE):
        q = orthonormal(a.mT @ orthonormal(a @ q))
    # Where the matrix has a lower rank, the other columns are rounding, of any length: now they get that of 1.
    q = orthonormal(q)
    for _ in range(_POLISH):
        q = 1.5 * q - 0.5 * q @ (q.mT @ q)
    product = a @ q
    for sweeps in _SWEEPS:
        turn = _eigenvectors(product.mT @ product, sweeps)
        product, q = product @ turn, q @ turn
    return product[:, :, :rank], q[:, :, :rank].mT


def orthonormal(z: Tensor) -> Tensor:
    """Columns of z `[n, m, k]` made orthonormal, zero ones left so."""
    for _ in range(2):  # once leaves what fp32 loses in the Gram matrix of ill-conditioned columns
        z = z @ _inverse_root(z.mT @ z)
    return z


def _inverse_root(gram: Tensor) -> Tensor:
    """`(G + shift)^-1/2` of positive semidefinite matrices `[n, k, k]`."""
    trace = _trace(gram)
    identity = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)

    def closer(y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        step = 1.5 * identity - 0.5 * (z @ y)
        return y @ step, step @ z

    start = gram / trace + _SHIFT * identity, identity.expand(gram.shape).clone()
    return _repeated(closer, start, _NEWTON)[1] / trace.sqrt()


def _eigenvectors(gram: Tensor, sweeps: int) -> Tensor:
    """Eigenvectors of symmetric matrices `[n, k, k]`, k even, as columns, those of large eigenvalues first."""
    count, size, _ = gram.shape
    half = size // 2
    # Pairs are (i, i + k / 2). Between rounds all but the first index move one place around the ring of the others.
    ring = [*range(1, half), *range(size - 1, half - 1, -1)]
    source = list(range(size))
    for place, number in enumerate(ring):
        source[number] = ring[place - 1]
    order = torch.tensor(source, device=gram.device)

    def turned(gram: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        gap = diagonal[:, half:] - diagonal[:, :half]
        off = gram[:, :half, half:].diagonal(dim1=-2, dim2=-1)
        # The smaller of the two angles: t = tan = 2 off sign(gap) / (|gap| + sqrt(gap^2 + 4 off^2)).
        tangent = 2 * off * torch.where(gap < 0, -1.0, 1.0) / _divisor(gap.abs() + (gap * gap + 4 * off * off).sqrt())
        cosine = 1 / (1 + tangent * tangent).sqrt()
        sine = tangent * cosine
        rows = _pairs_turned(gram, cosine[:, :, None], sine[:, :, None], 1)
        gram = _pairs_turned(rows, cosine[:, None], sine[:, None], 2)
        vectors = _pairs_turned(vectors, cosine[:, None], sine[:, None], 2)
        return gram.index_select(1, order).index_select(2, order), vectors.index_select(2, order)

    identity = torch.eye(size, dtype=gram.dtype, device=gram.device).expand(count, size, size).clone()
    # In units of the trace: squares of what is far smaller than 1e-19 would vanish.
    gram, vectors = _repeated(turned, (gram / _trace(gram), identity), sweeps * (size - 1))
    sorting = gram.diagonal(dim1=-2, dim2=-1).argsort(-1, descending=True)
    return vectors.gather(2, sorting[:, None].expand(-1, size, -1))


def _trace(gram: Tensor) -> Tensor:
    """`[n, 1, 1]`, something else for zero."""
    return _divisor(gram.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None])


def _divisor(x: Tensor) -> Tensor:
    """At least 1e-30. Not by a sum: optimisers of ONNX graphs take that for a sum with zero, and leave it out."""
    return x.clamp(min=1e-30)


def _pairs_turned(x: Tensor, cosine: Tensor, sine: Tensor, dim: int) -> Tensor:
    first, second = x.chunk(2, dim)
    return torch.cat([cosine * first - sine * second, sine * first + cosine * second], dim)


def _repeated(
    function: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], state: tuple[Tensor, Tensor], times: int
) -> tuple[Tensor, Tensor]:
    """`function` applied so many times: one loop of an exported program."""
    if not torch.compiler.is_exporting():
        # The operator below would be compiled, at every call with new sizes.
        for _ in range(times):
            state = function(*state)
        return state
    count = torch.zeros((), dtype=torch.int64, device=state[0].device)
    _, *last = while_loop(
        lambda number, *_: number < times, lambda number, *held: (number + 1, *function(*held)), (count, *state)
    )
    return last[0], last[1]
