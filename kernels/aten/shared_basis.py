"""One basis for the tokens of all samples, and one of its own for a sample that it fits badly.

Bases are half the bytes of AttentionPack's setting: samples alike in kind hold one instead of one each. A sample is
judged by the share of its squared Frobenius norm that the common basis leaves out.
"""

import torch
from torch import Tensor

from attnpack_fx.kernels.aten.rows import select_tokens
from attnpack_fx.kernels.aten.svd import truncated_svd
from attnpack_fx.kernels.balance import balanced, overflow
from attnpack_fx.kernels.linalg import per_head, require_finite, working


def compress_shared(
    x: Tensor, index: Tensor, rank: int, tolerance: float, given: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """See `ops.compress_shared`."""
    _, heads, _, dim = x.shape
    work = working(x.dtype)
    tokens = select_tokens(x, index).flatten(2).to(work)
    require_finite(tokens, "compress_shared")
    if given is None:
        common = _common_basis(tokens, rank, tolerance)
    else:
        common = given[:, :, :rank].transpose(1, 2).flatten(2).to(work)
    coefficient = tokens @ common.mT
    own = _left_out(tokens, coefficient) > tolerance
    if given is not None and (scale := overflow(coefficient, x.dtype)) is not None:
        own |= scale[:, 0, 0] > 1  # what is given is not ours to lengthen
    badly_fit, fit = own.nonzero()[:, 0], (~own).nonzero()[:, 0]
    bases = []
    if given is None and len(fit):
        coefficient[fit], common = (each.to(work) for each in balanced(coefficient[fit], common, x.dtype))
        bases.append(common)
    first = 1 if given is not None or bases else 0
    owner = torch.where(own, own.cumsum(0) - 1 + first, 0)
    if len(badly_fit):
        alone, basis = truncated_svd(tokens[badly_fit], coefficient.shape[2])
        alone, basis = (each.to(work) for each in balanced(alone, basis, x.dtype))
        coefficient[badly_fit] = _widened(alone, coefficient.shape[2], 2)
        bases.append(_widened(basis, coefficient.shape[2], 1))
    coefficient = coefficient.masked_fill((index < 0)[:, :, None], 0)
    stacked = torch.cat(bases) if bases else common[:0]
    return coefficient.to(x.dtype).contiguous(), per_head(stacked.to(x.dtype), heads, dim), owner


def _common_basis(tokens: Tensor, rank: int, tolerance: float) -> Tensor:
    """`[1, R, H * D]` for the samples that one basis fits; those far from the others must not turn it away from them.

    Of the samples it fits badly the worse half leaves the fit, until it is good for all that are left.
    """
    fitted = torch.arange(tokens.shape[0], device=tokens.device)
    while True:
        _, common = truncated_svd(tokens[fitted].flatten(0, 1)[None], rank)
        left_out = _left_out(tokens[fitted], tokens[fitted] @ common.mT)
        bad = int((left_out > tolerance).sum())
        if bad == 0 or len(fitted) == 1:
            return torch.cat([common, common.new_zeros(1, _rank(tokens, rank) - common.shape[1], common.shape[2])], 1)
        fitted = fitted[left_out.argsort()[: len(fitted) - (bad + 1) // 2]]


def _rank(tokens: Tensor, rank: int) -> int:
    batch, count, width = tokens.shape
    return min(rank, batch * count, width)


def _left_out(tokens: Tensor, coefficient: Tensor) -> Tensor:
    """The share of every sample's squared norm that is not in its coefficients, in float64: a small difference."""
    total, held = (part.double().square().sum((1, 2)) for part in (tokens, coefficient))
    return (total - held) / total.clamp(min=torch.finfo(torch.float64).tiny)


def _widened(factor: Tensor, rank: int, dim: int) -> Tensor:
    """With zero components up to `rank`: a sample alone may have fewer tokens than components are asked for."""
    missing = list(factor.shape)
    missing[dim] = rank - factor.shape[dim]
    return torch.cat([factor, factor.new_zeros(missing)], dim)
