"""Which prompt token goes where: vision segment, text segment, dense tail rows, or (padding) nowhere.

Every row of the batch lists its tokens of a kind in order of position, filled up with -1 to the longest row:

    index = [vision | text | dense]   int64 [B, Nv + Nt + m]     slot[b, index[b, j]] = j,  -1 for padding
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def plan(
    modality: Tensor | None,
    real: Tensor | None,
    like: Tensor,
    text: bool,
    vision_gain: Sequence[int],
    text_gain: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `ops.plan`."""
    shape = (like.shape[0], like.shape[2])
    real = like.new_ones(shape, dtype=torch.bool) if real is None else real.expand(shape)
    vision = positions(modality.expand(shape) & real) if modality is not None else None
    if modality is None or vision is None or not saves_memory(vision.shape[1], vision_gain):
        rest = positions(real)
        vision = rest[:, :0].clone()
    else:
        rest = positions(~modality & real)
    none = rest[:, :0].clone()
    packed, dense = (rest, none) if text and saves_memory(rest.shape[1], text_gain) else (none, rest)
    return vision, packed, dense, slots(torch.cat([vision, packed, dense], 1), shape[1])


def positions(chosen: Tensor) -> Tensor:
    """The positions of True in every row of a bool `[B, T]`, filled up with -1: int64 `[B, most in a row]`."""
    count = chosen.sum(1)
    widest = int(count.max()) if count.numel() else 0
    order = torch.argsort(chosen, dim=1, descending=True, stable=True)[:, :widest]
    filler = torch.arange(widest, device=chosen.device) >= count[:, None]
    return order.masked_fill(filler, -1)


def slots(index: Tensor, tokens: int) -> Tensor:
    """The inverse of `index`: int64 `[B, tokens]`, -1 where no slot holds the position."""
    slot = index.new_full((index.shape[0], tokens + 1), -1)
    number = torch.arange(index.shape[1], device=index.device).expand_as(index)
    # Filler writes to the extra last column, which is cut off.
    slot.scatter_(1, index.remainder(tokens + 1), number)
    return slot[:, :tokens].contiguous()


def saves_memory(tokens: int, gain: Sequence[int]) -> bool:
    """Whether a key and a value segment of that many tokens, with cos and sin, are smaller than their dense rows."""
    if tokens == 0:
        return False
    if not gain:
        return True
    ranks, widths, turning = gain[:2], gain[2:4], gain[4]
    packed = turning * tokens
    for rank, width in zip(ranks, widths, strict=True):
        packed += min(rank, tokens, width) * (tokens + width)
    return packed < tokens * sum(widths)
