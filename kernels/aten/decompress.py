"""The dense meaning of packed parts, for whatever reads them in another way than attention does."""

import torch
from torch import Tensor

from attnpack_fx.kernels.aten.blocks import segments
from attnpack_fx.kernels.aten.coded_rows import decode
from attnpack_fx.kernels.parts import PackedParts, Rows
from attnpack_fx.kernels.rotary import per_slot, rotate, turned_slots


def decompress(parts: PackedParts[Tensor]) -> Tensor:
    """See `ops.decompress`."""
    tail, slot, angles = parts.tail, parts.slot, parts.angles
    assert slot is not None
    _, batch, heads, dim = tail.shape
    dense = []
    for segment in segments(parts, tail.dtype):
        if isinstance(segment, Rows):
            dense.append(decode(segment, dim).to(tail.dtype).transpose(1, 2))
            continue
        total = segment[0].coefficient[:, None] @ segment[0].basis
        for block in segment[1:]:
            total[:, :, : block.coefficient.shape[1]] += block.coefficient[:, None] @ block.basis
        dense.append(total)
    packed = sum(part.shape[2] for part in dense)
    kept, prompt = parts.index.shape[1] - packed, slot.shape[1]
    rows = tail[: parts.length].permute(1, 2, 0, 3)
    if angles is not None and packed:
        turning, together = turned_slots(angles), torch.cat(dense, 2)
        cos, sin = per_slot(angles, 0, turning)
        turned = rotate(together[:, :, :turning], cos[:, None], sin[:, None], angles.interleaved)
        dense = [turned, together[:, :, turning:]]
    stored = torch.cat([*dense, rows[:, :, :kept]], 2)
    out = tail.new_zeros((batch, heads, prompt + parts.length - kept, dim))
    if stored.shape[2]:
        sample = torch.arange(batch, device=tail.device)[:, None]
        logical = stored.transpose(1, 2)[sample, slot.clamp(min=0)].masked_fill_((slot < 0)[:, :, None, None], 0)
        out[:, :, :prompt] = logical.transpose(1, 2)
    out[:, :, prompt:] = rows[:, :, kept:]
    return out
