"""Moving token rows: out of a dense `[B, H, T, D]`, into and out of the token-major tail `[rows, B, H, D]`."""

from collections.abc import Sequence

import torch
from torch import Tensor


def select_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x `[B, H, T, D]` at `index` `[B, N]`, head-concatenable: `[B, N, H, D]`, zero at filler (-1).

    Tokens that are not selected are never part of any arithmetic, so that NaN among them cannot spread. Not to be
    written to: tokens that follow each other, the same in all samples, are a view of x.
    """
    batch, _, tokens, _ = x.shape
    if tokens == 0:
        return x.new_zeros((batch, index.shape[1], x.shape[1], x.shape[3]))
    if (start := _start_of_run(index)) is not None:
        return x.narrow(2, start, index.shape[1]).transpose(1, 2)
    sample = torch.arange(batch, device=x.device)[:, None]
    chosen = x.transpose(1, 2)[sample, index.clamp(min=0)]
    return chosen.masked_fill_((index < 0)[:, :, None, None], 0)


def _start_of_run(index: Tensor) -> int | None:
    """Where each sample of `[B, N]` is that token and those after it; None elsewhere, and on a GPU, not to wait."""
    if index.is_cuda or index.numel() == 0:
        return None
    start = int(index[0, 0])
    run = torch.arange(start, start + index.shape[1], dtype=index.dtype)
    return start if start >= 0 and bool((index == run).all()) else None


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
