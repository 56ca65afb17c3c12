"""What codes leave of dense tokens, as a matrix of low rank per head (GEAR, arXiv 2403.05527, section 3).

    E_h = X_h - X'_h ~ left_h right_h        left_h [n, r] orthonormal columns, right_h = left_h^T E_h [r, D]

with X' what the codes and the outliers beside them stand for. The subspace comes from power iterations, as in GEAR's
code, but with columns made orthonormal in each of them, not in the last alone, and from a start of its own, whatever
the state of the global generator.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from attnpack_fx.kernels.aten.coded_rows import decode
from attnpack_fx.kernels.aten.row_codes import real
from attnpack_fx.kernels.parts import Rows

#: GEAR's default.
ITERATIONS = 3


def with_residual(coded: Rows[Tensor], rows: Tensor, rank: int, width: int) -> Rows[Tensor]:
    """The same rows with a residual of rank `rank`, its factors zero-padded to `width` columns, in the rows' dtype.

    rows: `[B, n, H, D]`, what was coded.
    """
    error = (rows.float() - decode(coded, rows.shape[3])) * real(rows)
    left, right = low_rank(error.transpose(1, 2), rank)
    spare = width - left.shape[-1]
    left, right = F.pad(left, (0, spare)), F.pad(right, (0, 0, 0, spare))
    return replace(
        coded,
        form=replace(coded.form, rank=width),
        left=left.transpose(1, 2).to(rows.dtype).contiguous(),
        right=right[:, None].to(rows.dtype).contiguous(),
        part_of=torch.zeros(rows.shape[:2], dtype=torch.int32, device=rows.device),
    )


def low_rank(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors `[..., n, r]`, `[..., r, D]` of fp32 matrices `[..., n, D]`, r = min(rank, n, D)."""
    n, D = matrices.shape[-2:]
    r = min(rank, n, D)
    random = torch.Generator().manual_seed(0)
    right = torch.randn(D, r, generator=random).to(matrices).expand(*matrices.shape[:-2], D, r)
    for _ in range(ITERATIONS):
        left = torch.linalg.qr(matrices @ right).Q
        right = matrices.mT @ left
    return left, right.mT
