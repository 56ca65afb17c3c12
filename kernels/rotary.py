"""Rotary embedding of key rows: pairs of the first E dims turn by one angle each, the others stay as they are.

A pair `(a, b)` becomes `(a cos - b sin, b cos + a sin)`. Pairs are `(i, i + E / 2)` or, interleaved, `(2i, 2i + 1)`.
"""

import functools
from collections.abc import Iterable

import torch
from torch import Tensor

from attnpack_fx.kernels.parts import Angles


def turned_slots(angles: Angles[Tensor]) -> int:
    """How many slots, the first ones, are rotated: segments behind them hold keys as they are attended."""
    return angles.cos.shape[1] if angles.axes is None else angles.axes.shape[2]


def per_slot(angles: Angles[Tensor], first: int, end: int) -> tuple[Tensor, Tensor]:
    """cos and sin of slots first .. end - 1, `[B or 1, end - first, E / 2]` each."""
    tables = angles.cos, angles.sin
    if angles.axes is None:
        return angles.cos[:, first:end], angles.sin[:, first:end]
    axes = angles.axes[:, :, first:end]
    if angles.cos.shape[0] == 1 and axes.shape[0] == 1:
        cos, sin = (_sum(table[0, rows] for rows in axes[0]) for table in tables)
        return cos[None], sin[None]
    sample = torch.arange(max(axes.shape[0], angles.cos.shape[0]), device=axes.device)[:, None]
    of_table = sample % angles.cos.shape[0]
    cos, sin = (_sum(table[of_table, rows] for rows in axes.unbind(1)) for table in tables)
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
