"""Low-rank factors of selected tokens (compress), and of a segment with dense rows added (fold).

compress: with heads concatenated, the selected tokens are `A [N, H * D] ~ coefficient [N, R] @ basis [R, H * D]`.

fold: `[coefficient basis; rows]` is `N + n` rows of rank at most `R + n`, so the factors of the old rows are never
rebuilt:

    coefficient = Q_c F                     F is the [R, R] triangle, the Q_c of no interest
    [basis; rows] = [L_1; L_2] Q            Q [K, H * D] orthonormal rows, K = min(R + n, H * D)
    [F L_1; L_2] = U S W^T                  the small SVD
    new basis = W_S^T Q,   new coefficients = [coefficient L_1 W_S; L_2 W_S]
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from attnpack_fx.kernels.aten.rows import select_tokens
from attnpack_fx.kernels.aten.svd import truncated_svd
from attnpack_fx.kernels.balance import balanced
from attnpack_fx.kernels.linalg import per_head, require_finite, sketch_size, working


def compress(x: Tensor, index: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """See `ops.compress`."""
    _, heads, _, dim = x.shape
    tokens = select_tokens(x, index).flatten(2).to(working(x.dtype))
    require_finite(tokens, "compress")
    coefficient, basis = truncated_svd(tokens, rank)
    coefficient = coefficient.masked_fill((index < 0)[:, :, None], 0)
    coefficient, basis = balanced(coefficient, basis, x.dtype)
    return coefficient.contiguous(), per_head(basis, heads, dim)


def sketch(x: Sequence[Tensor], index: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """See `ops.sketch`."""
    _, heads, _, dim = x[0].shape
    coefficients, bases = [], []
    for item in x:
        tokens = select_tokens(item, index).flatten(2).float()
        require_finite(tokens, "compress")
        basis = truncated_svd(tokens, sketch_size(rank))[1].mT.to(item.dtype)
        coefficients.append(tokens @ basis.float())
        bases.append(basis.unflatten(1, (heads, dim)))
    return torch.stack(coefficients), torch.stack(bases)


def align(coefficient: Sequence[Tensor], basis: Sequence[Tensor], rank: Sequence[int]) -> list[Tensor]:
    """See `ops.align`."""
    factors: list[Tensor] = []
    pairs = [pair for stacks in zip(coefficient, basis, strict=True) for pair in zip(*stacks, strict=True)]
    for (c, q), wanted in zip(pairs, rank, strict=True):
        _, heads, dim, size = q.shape
        orthogonal, triangle = torch.linalg.qr(q.flatten(1, 2).float())
        # c (q^T q)^-1 q^T, the projection on what q spans.
        c = torch.linalg.solve_triangular(triangle, c, upper=True, left=False)
        turn = torch.linalg.svd(c, full_matrices=False).Vh[:, : min(wanted, size)].mT
        made, spanned = balanced(c @ turn, (orthogonal @ turn).mT, q.dtype)
        factors += made, per_head(spanned, heads, dim)
    return factors


def fold(coefficient: Tensor, basis: Tensor, rows: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `ops.fold`."""
    _, heads, old, dim = basis.shape
    added, dtype = rows.shape[0], coefficient.dtype
    work = working(dtype)
    coefficient, rows = coefficient.to(work), rows.permute(1, 0, 2, 3).flatten(2).to(work)
    require_finite(rows, "fold")
    stacked = torch.cat([basis.transpose(1, 2).flatten(2).to(work), rows], 1)
    orthogonal, triangle = torch.linalg.qr(stacked.mT)
    lower = triangle.mT
    held, new = lower[:, :old], lower[:, old:]
    factor = torch.linalg.qr(coefficient, mode="r").R
    _, singular, right = torch.linalg.svd(torch.cat([factor @ held, new], 1), full_matrices=False)
    size = min(rank, old + added, heads * dim)
    missing = size - right.shape[1]
    if missing > 0:  # fewer old rows than R: complete the directions
        right = torch.linalg.svd(torch.cat([factor @ held, new], 1), full_matrices=True).Vh
    turn = right[:, :size].mT
    coefficient = torch.cat([coefficient @ (held @ turn), new @ turn], 1)
    dropped = torch.linalg.vector_norm(singular[:, size:], dim=-1).float()
    coefficient, basis = balanced(coefficient, (orthogonal @ turn).mT, dtype)
    return coefficient, per_head(basis, heads, dim), dropped
