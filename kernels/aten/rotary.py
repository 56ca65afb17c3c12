"""Rotary embedding of key rows: `x * cos + turn(x) * sin` on the first E dims, the others as they are.

`turn` maps halves `(a, b)` to `(-b, a)`, or, interleaved, every pair `(x[2i], x[2i + 1])` to `(-x[2i + 1], x[2i])`.
"""

import functools
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Rotary(NamedTuple):
    """The rotary embedding of packed slots, for keys kept before it.

    cos, sin: `[B or 1, P, E]`, one entry per dim, E even and at most the head dim. Both dims of a pair have the same.
    interleaved: whether pairs are neighbours rather than halves.
    axes: None, and row n belongs to slot n (P = N); or int64 `[B or 1, A, N]`: cos of slot n is the sum over a of
        `cos[axes[a, n]]`, sin likewise. Rows are then tables of positions along the axes of multimodal rotary embedding
        (temporal, height, width), each row zero but for the dims of its axis; see `rotary_axes.py`.
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
    """cos and sin of slots first .. end - 1, `[B or 1, end - first, E]` each."""
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
    """x `[..., D]`; cos and sin `[..., E]`, broadcastable to it, one entry per dim. Keeps x's dtype."""
    turning, still = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    rotated = (turning * cos + turn(turning, interleaved) * sin).to(x.dtype)
    return torch.cat((rotated, still), -1) if still.shape[-1] else rotated


def turn(x: Tensor, interleaved: bool) -> Tensor:
    """Every pair `(a, b)` of the last dim of x as `(-b, a)`."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)
