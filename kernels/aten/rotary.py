"""Rotary embedding of key rows: `x * cos + turn(x) * sin` on the first E dims, the others as they are.

`turn` maps halves `(a, b)` to `(-b, a)`, or, interleaved, every pair `(x[2i], x[2i + 1])` to `(-x[2i + 1], x[2i])`.
"""

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x `[..., D]`; cos and sin `[..., E]`, broadcastable to it, one entry per dim. Keeps x's dtype."""
    turning, still = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    if interleaved:
        turned = torch.stack((-turning[..., 1::2], turning[..., ::2]), -1).flatten(-2)
    else:
        first, second = turning.chunk(2, -1)
        turned = torch.cat((-second, first), -1)
    rotated = (turning * cos + turned * sin).to(x.dtype)
    return torch.cat((rotated, still), -1) if still.shape[-1] else rotated
