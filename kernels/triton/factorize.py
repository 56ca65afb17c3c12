"""Low-rank factors on a GPU: matrix products and Cholesky factorisations, and one small eigenproblem for all of them.

With heads concatenated, the selected tokens are `A [N, M]`, `M = H * D`, one matrix for each sample of each key or
value tensor.

sketch: k orthonormal-to-be columns Q that span the row space of A, or nearly so: block power iteration, with k a little
over the rank (Halko, Martinsson & Tropp 2011, algorithm 4.4; its QR as Cholesky QR), and the projection

    Y = A Q,  Q = orth(A^T Y)   twice           C = A Q           A ~ C (Q^T Q)^-1 Q^T

Q is orthonormal only up to what one Cholesky QR and the rounding to A's dtype leave, which the inverse makes up for.

align: coefficient and basis, sorted and cut to the rank. All matrices of a model, whatever their k, in one go:

    Q^T Q = S S^T,  S^-1 C^T C S^-T = L L^T,  L = V s J^T      (`jacobi.py`)
    turn = V_R^T S^-1,   coefficient = C turn^T,   basis = turn Q^T

fold: the rows of `[basis; rows]` span what a segment with dense rows added spans, so `C = [coefficient L_1; L_2]` with
`[L_1; L_2] = [basis; rows] Q`, and the rest is `align`.

No step waits for the device: no pivoting, no rank decisions. Directions that A lacks are filled up by a little of a
random matrix under Q, and a shift keeps `L L^T` definite without touching its eigenvectors.

In half precision A is multiplied as it is and iterates are rounded to its dtype, with sums in fp32: that blurs Q as
much as its storage does. Gram matrices, whose condition is the square, are fp64 everywhere.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from attnpack_fx.kernels.balance import balanced
from attnpack_fx.kernels.linalg import (
    cholesky,
    inverse_of_triangle,
    orthonormal,
    per_head,
    require_finite,
    sketch_size,
    whitening,
)
from attnpack_fx.kernels.triton.gather import gather_tokens
from attnpack_fx.kernels.triton.jacobi import left_singular_vectors
from attnpack_fx.kernels.triton.launch import block

HALF = (torch.float16, torch.bfloat16)
ITERATIONS = 2
#: Random part of a unit column of Q: over what fp32 rounds, under what storage rounds.
FILLING = {torch.float32: 3e-7, torch.float16: 1e-5, torch.bfloat16: 1e-5}
#: Most bytes that a sketch takes at once, and what a number of Q takes while it is made: fp64 beside fp32.
PART_BYTES = 2 << 30
ITERATE_BYTES = 24
#: Largest matrix that takes part in `jacobi.py`. Beyond it, which means lossless packing of many tokens, the library's
#: `eigh` is faster, though it waits for the device.
LARGEST = 512
#: Shift of `L L^T`, relative to its trace: singular values below 3e-7 of the norm are rounding.
SHIFT = 1e-13


def compress(x: Tensor, index: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """See `ops.compress`."""
    sketched, spanned = sketch([x], index, rank)
    coefficient, basis = align([sketched], [spanned], [rank])
    return coefficient, basis


def sketch(x: Sequence[Tensor], index: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """See `ops.sketch`."""
    batch, heads, tokens, dim = index.shape[0], x[0].shape[1], index.shape[1], x[0].shape[3]
    size = min(sketch_size(rank), tokens, heads * dim)
    each = len(x) * heads * dim * (tokens * x[0].element_size() + ITERATE_BYTES * size)
    step = max(1, PART_BYTES // max(each, 1))
    parts = [
        _sketch([item[start : start + step] for item in x], index[start : start + step], size)
        for start in range(0, batch, step)
    ]
    if len(parts) == 1:
        return parts[0]
    coefficients, bases = zip(*parts, strict=True)
    return torch.cat(coefficients, 1), torch.cat(bases, 1)


def _sketch(x: Sequence[Tensor], index: Tensor, size: int) -> tuple[Tensor, Tensor]:
    batch, heads, _, dim = x[0].shape
    a = gather_tokens(x, index)
    a = a if a.dtype in HALF else a.float()
    if not a.is_cuda:
        require_finite(a, "compress")
    q = _row_space(a, size)
    coefficient = _product(a, q)
    if a.is_cuda:  # where reading A once more costs as much as a product with it; NaN and Inf go through all of these
        require_finite(coefficient, "compress")
    coefficient = coefficient.unflatten(0, (len(x), batch))
    return coefficient, q.to(x[0].dtype).unflatten(1, (heads, dim)).unflatten(0, (len(x), batch))


def align(coefficient: Sequence[Tensor], basis: Sequence[Tensor], rank: Sequence[int]) -> list[Tensor]:
    """See `ops.align`."""
    left = iter(rank)
    ranks = [[next(left) for _ in c] for c in coefficient]
    turns: dict[int, Tensor] = {}
    for sizes in _of_like_size([c.shape[3] for c in coefficient]):
        cs = [coefficient[number].flatten(0, 1) for number in sizes]
        qs = [basis[number].flatten(0, 1).flatten(1, 2) for number in sizes]
        turn = _turns(cs, qs, max(max(ranks[number]) for number in sizes))[0]
        turns.update(zip(sizes, turn.split([len(c) for c in cs]), strict=True))
    factors: list[Tensor] = []
    for number, (sketched, spanned) in enumerate(zip(coefficient, basis, strict=True)):
        samples, size = sketched.shape[1], sketched.shape[3]
        parts = turns[number].split(samples)
        for c, q, part, wanted in zip(sketched, spanned, parts, ranks[number], strict=True):
            factors += _turned(c, q, part[:, : min(wanted, size), :size], q.dtype)
    return factors


def _of_like_size(sizes: list[int]) -> list[list[int]]:
    """Which matrices one eigenproblem takes: those that tiles of one width hold, as smaller ones are filled up."""
    found: dict[int, list[int]] = {}
    for number, size in enumerate(sizes):
        found.setdefault(block(size), []).append(number)
    return list(found.values())


def fold(coefficient: Tensor, basis: Tensor, rows: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `ops.fold`."""
    _, heads, old, dim = basis.shape
    rows = rows.permute(1, 0, 2, 3).flatten(2).float()
    require_finite(rows, "fold")
    spanning = torch.cat([basis.transpose(1, 2).flatten(2).float(), rows], 1)
    q = _row_space(spanning, min(spanning.shape[1:]))
    projected = spanning @ q
    c = torch.cat([coefficient.float() @ projected[:, :old], projected[:, old:]], 1)
    size = min(rank, q.shape[2])
    turn, shares, total = _turns([c], [q], size)
    new_coefficient, new_basis = _turned(c, q.unflatten(1, (heads, dim)), turn, basis.dtype)
    return new_coefficient, new_basis, (shares[:, size:].sum(-1) * total).sqrt().float()


def _row_space(a: Tensor, size: int) -> Tensor:
    """`size` nearly orthonormal columns that span the dominant part of the rows of a `[b, N, M]`: `[b, M, size]`."""
    batch, rows, columns = a.shape
    if size == 0:
        return a.new_empty((batch, columns, 0))
    if size == columns:
        return torch.eye(columns, dtype=a.dtype, device=a.device).expand(batch, -1, -1).contiguous()
    start = _random(columns, block(size), a.device)[:, :size]
    if size == rows:
        return _completed(a.mT.float(), start, a.dtype)
    z = start.to(a.dtype).expand(batch, -1, -1)
    for iteration in range(ITERATIONS):
        y = _product(a, z)
        # In fp32 between all products, so that small singular values stay above rounding.
        y = orthonormal(y) if a.dtype == torch.float32 else _scaled(y)
        z = _product(a.mT, y.to(a.dtype))
        z = _completed(z, start, a.dtype) if iteration == ITERATIONS - 1 else orthonormal(z).to(a.dtype)
    return z


def _completed(z: Tensor, random: Tensor, dtype: torch.dtype) -> Tensor:
    """Columns of z made independent, then nearly orthonormal, in `dtype`.

    Also multiplied in fp64: columns that nearly depend on others (a token that occurs twice) make for large numbers
    that cancel.
    """
    z = _scaled(z)
    norms = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    wide = (z / norms.clamp(min=1e-30)).add_(random, alpha=FILLING[dtype]).double()
    return (wide @ whitening(wide)).to(dtype)


def _turns(cs: list[Tensor], qs: list[Tensor], count: int) -> tuple[Tensor, Tensor, Tensor]:
    """For matrices `c q^T`, c fp32 `[b, N, k]`, q `[b, M, k]`: the first `count` rows of every turn.

    Returns `turn [n, count, K]`, zero beyond each k, and the squared singular values fp64 `[n, K]` as shares of their
    sum `[n]`.
    """
    size = max(c.shape[2] for c in cs)
    metric = _stacked([_gram(q) for q in qs], size)
    energy = _stacked([_gram(c.double()) for c in cs], size)
    padding = metric.diagonal(dim1=-2, dim2=-1) == 0
    inverse = inverse_of_triangle(cholesky(metric + torch.diag_embed(padding.double())))
    energy = inverse @ energy @ inverse.mT
    total = energy.diagonal(dim1=-2, dim2=-1).sum(-1)
    identity = torch.eye(size, dtype=energy.dtype, device=energy.device)
    energy = energy / total.clamp(min=1e-200)[:, None, None] + SHIFT * identity
    if size > LARGEST:
        values, vectors = torch.linalg.eigh(energy.masked_fill(padding[:, None], 0))
        squared, vectors = values.flip(-1), vectors.mT.flip(1)[:, :count].float()
    else:
        singular, vectors = left_singular_vectors(
            cholesky(energy).masked_fill(padding[:, None], 0).float(), min(count, size)
        )
        squared = singular.double().square()
    return vectors @ inverse.float(), (squared - SHIFT).clamp(min=0), total


def _turned(c: Tensor, q: Tensor, turn: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Coefficient `[B, N, R]` and basis `[B, H, R, D]` of c `[B, N, k]`, q `[B, H, D, k]` and turn `[B, R, k]`."""
    heads, dim = q.shape[1:3]
    coefficient, basis = balanced(c @ turn.mT, turn @ q.flatten(1, 2).mT.float(), dtype)
    return coefficient, per_head(basis, heads, dim)


def _gram(z: Tensor) -> Tensor:
    """`z^T z` of `[b, n, k]` in fp64, summed in fp32 where z is half precision (then its columns are well apart)."""
    if z.dtype in HALF:
        return _product(z.mT, z).double()
    wide = z.double()
    return wide.mT @ wide


def _stacked(grams: list[Tensor], size: int) -> Tensor:
    """Square matrices of several sizes in one batch, filled up by zeros."""
    missing = [size - gram.shape[-1] for gram in grams]
    return torch.cat(
        [torch.nn.functional.pad(gram, (0, n, 0, n)) if n else gram for gram, n in zip(grams, missing, strict=True)]
    )


def _product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` in fp32, of numbers as they are."""
    if a.is_cuda and a.dtype in HALF:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _scaled(z: Tensor) -> Tensor:
    """z `[b, n, k]` with largest number 1, or zero."""
    return z / torch.linalg.vector_norm(z, float("inf"), dim=(1, 2), keepdim=True).clamp(min=1e-37)


@functools.lru_cache(maxsize=8)
def _random(columns: int, count: int, device: torch.device) -> Tensor:
    """fp32 `[columns, count]`, columns of about unit norm, always the same.

    Kept, because a generator seeded at every call costs launches and cannot be captured in a CUDA graph.
    """
    generator = torch.Generator().manual_seed(0)
    return (torch.randn((columns, count), generator=generator) * columns**-0.5).to(device)
