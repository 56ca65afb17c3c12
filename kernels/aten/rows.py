"""Moving token rows: out of a dense `[B, H, T, D]`, into and out of the token-major tail `[rows, B, H, D]`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from attnpack_fx.kernels.aten.rotary import rotate


def select_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x `[B, H, T, D]` at `index` `[B, N]`, head-concatenable: `[B, N, H, D]`, zero at filler (-1).

    Tokens that are not selected are never part of any arithmetic, so that NaN among them cannot spread.
    """
    batch, _, tokens, _ = x.shape
    if tokens == 0:
        return x.new_zeros((batch, index.shape[1], x.shape[1], x.shape[3]))
    sample = torch.arange(batch, device=x.device)[:, None]
    chosen = x.transpose(1, 2)[sample, index.clamp(min=0)]
    return chosen.masked_fill_((index < 0)[:, :, None, None], 0)


def take_rows(x: Tensor, index: Tensor, spare: int) -> Tensor:
    """See `ops.take_rows`."""
    batch, heads, _, dim = x.shape
    rows = x.new_zeros((index.shape[1] + spare, batch, heads, dim))
    rows[: index.shape[1]] = select_tokens(x, index).transpose(0, 1)
    return rows


def append_(tails: Sequence[Tensor], new: Sequence[Tensor], positions: Sequence[int]) -> None:
    """See `ops.append_`; `narrow` refuses rows that are not there."""
    for tail, tokens, position in zip(tails, new, positions, strict=True):
        tail.narrow(0, position, tokens.shape[2]).copy_(tokens.permute(2, 0, 1, 3))


def decompress(
    coefficients: Sequence[Tensor],
    bases: Sequence[Tensor],
    tail: Tensor,
    length: int,
    index: Tensor,
    slot: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
) -> Tensor:
    """See `ops.decompress`."""
    _, batch, heads, dim = tail.shape
    packed = sum(coefficient.shape[1] for coefficient in coefficients)
    kept, prompt = index.shape[1] - packed, slot.shape[1]
    rows = tail[:length].permute(1, 2, 0, 3)
    dense = [coefficient[:, None] @ basis for coefficient, basis in zip(coefficients, bases, strict=True)]
    if cos is not None and sin is not None and packed:
        dense = [rotate(torch.cat(dense, 2), cos[:, None], sin[:, None], interleaved)]
    stored = torch.cat([*dense, rows[:, :, :kept]], 2)
    out = tail.new_zeros((batch, heads, prompt + length - kept, dim))
    if stored.shape[2]:
        sample = torch.arange(batch, device=tail.device)[:, None]
        logical = stored.transpose(1, 2)[sample, slot.clamp(min=0)].masked_fill_((slot < 0)[:, :, None, None], 0)
        out[:, :, :prompt] = logical.transpose(1, 2)
    out[:, :, prompt:] = rows[:, :, kept:]
    return out
