"""Rotary embedding of key rows: pairs of the first E dims turn by one angle each, the others stay as they are.

A pair `(a, b)` becomes `(a cos - b sin, b cos + a sin)`. Pairs are `(i, i + E / 2)` or, interleaved, `(2i, 2i + 1)`.
"""

import functools
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Rotary(NamedTuple):
    """The rotary embedding of packed slots, for keys kept before it.

    cos, sin: `[B or 1, P, E / 2]`, one entry per pair; E is at most the head dim.
    interleaved: whether pairs are neighbours rather than halves.
    axes: None, and row n belongs to slot n (P = N); or int64 `[B or 1, A, N]`: cos of slot n is the sum over a of
        `cos[axes[a, n]]`, sin likewise. Rows are then tables of positions along the axes of multimodal rotary embedding
        (temporal, height, width), each row zero but for the pairs of its axis; see `rotary_axes.py`.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool
    axes: Tensor | None = None

    @property
    def slots(self) -> int:
        """How many slots, the first ones, are rotated: segments behind them hold keys as they are attended."""
        return self.cos.shape[1] if self.axes is None else self.axes.shape[2]


def per_slot(rotary: Rotary, first: int, end: int) -> tuple[Tensor, Tensor]:
    """cos and sin of slots first .. end - 1, `[B or 1, end - first, E / 2]` each."""
    if rotary.axes is None:
        return rotary.cos[:, first:end], rotary.sin[:, first:end]
    axes = rotary.axes[:, :, first:end]
    if rotary.cos.shape[0] == 1 and axes.shape[0] == 1:
        cos, sin = (_sum(table[0, rows] for rows in axes[0]) for table in rotary[:2])
        return cos[None], sin[None]
    sample = torch.arange(max(axes.shape[0], rotary.cos.shape[0]), device=axes.device)[:, None]
    of_table = sample % rotary.cos.shape[0]
    cos, sin = (_sum(table[of_table, rows] for rows in axes.unbind(1)) for table in rotary[:2])
    return cos, sin


def _sum(terms: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, terms)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x `[..., D]`; cos and sin `[..., E / 2]`, broadcastable to the pairs of x. Keeps x's dtype."""
    turning = 2 * cos.shape[-1]
    a, b = pairs(x[..., :turning], interleaved)
    one, other = (a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype)
    still = x[..., turning:]
    if interleaved:
        rotated = torch.stack((one, other), -1).flatten(-2)
        return torch.cat((rotated, still), -1) if still.shape[-1] else rotated
    return torch.cat((one, other, still), -1) if still.shape[-1] else torch.cat((one, other), -1)


def pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The first and the second dims of the pairs of x `[..., E]`: views `[..., E / 2]`."""
    if interleaved:
        return x[..., ::2], x[..., 1::2]
    first, second = x.chunk(2, -1)
    return first, second
