"""The dense meaning of packed parts, for whatever reads them in another way than attention does."""

from collections.abc import Sequence

import torch
from torch import Tensor

from attnpack_fx.kernels.aten.blocks import by_segment, factors
from attnpack_fx.kernels.aten.rotary import Rotary, per_slot, rotate


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
    axes: Tensor | None,
    blocks: Sequence[int],
    scales: Sequence[Tensor],
    owners: Sequence[Tensor],
) -> Tensor:
    """See `ops.decompress`."""
    _, batch, heads, dim = tail.shape
    dense = []
    for alike in by_segment(factors(coefficients, bases, scales, owners, blocks, dim, tail.dtype)):
        total = alike[0].coefficient[:, None] @ alike[0].basis
        for block in alike[1:]:
            total[:, :, : block.coefficient.shape[1]] += block.coefficient[:, None] @ block.basis
        dense.append(total)
    packed = sum(part.shape[2] for part in dense)
    kept, prompt = index.shape[1] - packed, slot.shape[1]
    rows = tail[:length].permute(1, 2, 0, 3)
    if cos is not None and sin is not None and packed:
        cos, sin = per_slot(Rotary(cos, sin, interleaved, axes), 0, packed)
        dense = [rotate(torch.cat(dense, 2), cos[:, None], sin[:, None], interleaved)]
    stored = torch.cat([*dense, rows[:, :, :kept]], 2)
    out = tail.new_zeros((batch, heads, prompt + length - kept, dim))
    if stored.shape[2]:
        sample = torch.arange(batch, device=tail.device)[:, None]
        logical = stored.transpose(1, 2)[sample, slot.clamp(min=0)].masked_fill_((slot < 0)[:, :, None, None], 0)
        out[:, :, :prompt] = logical.transpose(1, 2)
    out[:, :, prompt:] = rows[:, :, kept:]
    return out
