"""The dense meaning of packed parts, for whatever reads them in another way than attention does."""

from collections.abc import Sequence

import torch
from torch import Tensor

from attnpack_fx.kernels.aten.blocks import segments
from attnpack_fx.kernels.aten.coded_rows import decode
from attnpack_fx.kernels.aten.rotary import Rotary, per_slot, rotate
from attnpack_fx.kernels.parts import Rows


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
    for segment in segments(coefficients, bases, scales, owners, blocks, dim, tail.dtype):
        if isinstance(segment, Rows):
            dense.append(decode(segment, dim).to(tail.dtype).transpose(1, 2))
            continue
        total = segment[0].coefficient[:, None] @ segment[0].basis
        for block in segment[1:]:
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
