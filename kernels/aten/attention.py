"""Attention over packed keys and values, absorbed: the dense K and V are never built.

Per KV head h, over the segments `K ~ C_k B_k`, `V ~ C_v B_v` and the dense tail rows, in one softmax:

    scores = [ (scale q_h B_k,h^T) C_k^T ...  |  scale q_h K_tail,h^T ]
    out    =   (p_segment C_v) B_v,h + ...    +  p_tail V_tail,h

Absorbed queries are `[B, Hq * Tq, R]`: the coefficients are read once for all heads, in one product per segment. The
query
heads of a KV head (GQA) are rows of one product. Keys kept before rotary embedding cannot be absorbed: their tiles are
rebuilt, rotated, used and thrown away.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from attnpack_fx.kernels.aten.rotary import rotate

#: Most bytes of one score buffer; longer queries are taken in tiles.
SCORE_BYTES = 64 << 20
#: Most bytes of one tile of rebuilt keys.
KEY_TILE_BYTES = 8 << 20


def attention(
    query: Tensor,
    key_coefficients: Sequence[Tensor],
    key_bases: Sequence[Tensor],
    value_coefficients: Sequence[Tensor],
    value_bases: Sequence[Tensor],
    key_tail: Tensor,
    value_tail: Tensor,
    length: int,
    index: Tensor,
    mask: Tensor | None,
    scale: float,
    ragged: bool,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    weights: bool = False,
) -> tuple[Tensor, Tensor]:
    """See `ops.attention` and `ops.attention_weights`; without `weights`, the second result means nothing."""
    batch, heads, queries, _ = query.shape
    kv_heads, value_dim = value_tail.shape[2:]
    packed = sum(c.shape[1] for c in key_coefficients)
    slots = packed + length
    if slots == 0:
        return query.new_zeros((batch, heads, queries, value_dim)), query.new_zeros((batch, 0), dtype=torch.float32)
    dtype = query.dtype
    # CPUs have no fast fp16 matrix products: convert what is read.
    work = torch.float32 if dtype == torch.float16 and query.device.type == "cpu" else dtype
    keys = [
        (c.to(work), b.to(work).flatten(0, 1)) for c, b in zip(key_coefficients, key_bases, strict=True) if c.shape[1]
    ]
    values = [
        (c.to(work), b.to(work).flatten(0, 1))
        for c, b in zip(value_coefficients, value_bases, strict=True)
        if c.shape[1]
    ]
    key_rows, value_rows = _per_head(key_tail, length).to(work), _per_head(value_tail, length).to(work)
    rotary = None if cos is None or sin is None else (cos, sin, interleaved)
    bias = _bias(mask, index, packed, length, ragged, batch)
    tile = max(1, SCORE_BYTES // (4 * batch * heads * slots))
    outs = []
    for start in range(0, queries, tile):
        part = query if tile >= queries else query[:, :, start : start + tile]
        count = part.shape[2]
        q = (part * scale).to(work).reshape(batch * kv_heads, -1, part.shape[3])
        scores = [_rebuilt_scores(q, keys, rotary, batch)] if rotary and keys else [_absorbed(q, c, b) for c, b in keys]
        if length:
            scores.append(torch.bmm(key_rows, q.mT).mT.reshape(batch, heads * count, length))
        p = torch.cat(scores, -1) if len(scores) > 1 else scores[0]
        if bias is None:
            p = p.softmax(-1)
        else:
            part_bias = bias if bias.shape[2] == 1 else bias[:, :, start : start + count]
            p = p.view(batch, heads, count, slots)
            p = p.masked_fill(~part_bias, float("-inf")) if bias.dtype == torch.bool else p + part_bias
            p = torch._safe_softmax(p, -1).to(work).view(batch, heads * count, slots)
        out = _weighted_values(p, values, value_rows, batch * kv_heads)
        outs.append(out.view(batch, heads, count, value_dim))
    out = outs[0] if len(outs) == 1 else torch.cat(outs, 2)
    if not weights:
        return out.to(dtype), p
    return out.to(dtype), p.view(batch, heads, -1, slots)[:, :, -1].mean(1, dtype=torch.float32)


def _per_head(tail: Tensor, length: int) -> Tensor:
    """Tail rows `[rows, B, H, D]` as `[B * H, length, D]`, by strides alone."""
    return tail[:length].flatten(1, 2).transpose(0, 1)


def _absorbed(q: Tensor, coefficient: Tensor, basis: Tensor) -> Tensor:
    """Scores of one segment: q `[B * H, g * Tq, D]`, basis `[B * H, R, D]` -> `[B, Hq * Tq, N]`."""
    # The basis goes first: with few queries this is a matrix-vector product, which streams it twice as fast from
    # memory as
    # the transposed product would.
    latent = torch.bmm(basis, q.mT).mT
    return torch.bmm(latent.reshape(coefficient.shape[0], -1, basis.shape[1]), coefficient.mT)


def _weighted_values(p: Tensor, values: list[tuple[Tensor, Tensor]], rows: Tensor, heads: int) -> Tensor:
    """p `[B, Hq * Tq, slots]` -> `[B * H, g * Tq, Dv]`."""
    out, start = None, 0
    for coefficient, basis in values:
        end = start + coefficient.shape[1]
        latent = torch.bmm(p[:, :, start:end], coefficient).view(heads, -1, coefficient.shape[2])
        out = torch.bmm(latent, basis) if out is None else torch.baddbmm(out, latent, basis)
        start = end
    if rows.shape[1]:
        weights = p[:, :, start:].reshape(heads, -1, rows.shape[1])
        out = torch.bmm(weights, rows) if out is None else torch.baddbmm(out, weights, rows)
    assert out is not None
    return out


def _rebuilt_scores(
    q: Tensor, keys: list[tuple[Tensor, Tensor]], rotary: tuple[Tensor, Tensor, bool], batch: int
) -> Tensor:
    """Scores of segments that hold keys before rotary embedding, one bounded tile of rebuilt keys at a time."""
    q = q.view(batch, -1, *q.shape[1:])
    scores = [torch.matmul(q, tile).view(batch, -1, tile.shape[-1]) for tile in _rotated_tiles(keys, *rotary, batch)]
    return torch.cat(scores, -1)


def _rotated_tiles(
    keys: list[tuple[Tensor, Tensor]], cos: Tensor, sin: Tensor, interleaved: bool, batch: int
) -> Iterator[Tensor]:
    """Rebuilt and rotated keys, `[B, H, D, tile]`, in slot order."""
    first = 0
    for coefficient, basis in keys:
        basis = basis.view(batch, -1, *basis.shape[1:])
        _, heads, rank, dim = basis.shape
        flat = basis.transpose(1, 2).reshape(batch, rank, heads * dim)
        size = max(1, KEY_TILE_BYTES // (4 * batch * heads * dim))
        for start in range(0, coefficient.shape[1], size):
            part = coefficient[:, start : start + size]
            end = first + part.shape[1]
            rows = torch.bmm(part, flat).unflatten(-1, (heads, dim))
            yield rotate(rows, cos[:, first:end, None], sin[:, first:end, None], interleaved).permute(0, 2, 3, 1)
            first = end


def _bias(mask: Tensor | None, index: Tensor, packed: int, length: int, ragged: bool, batch: int) -> Tensor | None:
    """The mask in slot order, `[B, Hq or 1, Tq or 1, slots or 1]`, with filler slots left out."""
    if mask is None and not ragged:
        return None
    appended = length - (index.shape[1] - packed)
    filled = torch.cat([index >= 0, index.new_ones((index.shape[0], appended), dtype=torch.bool)], 1)[:, None, None]
    if mask is None:
        return filled
    mask = mask[(None,) * (4 - mask.dim())]
    if mask.shape[-1] > 1:
        tokens = mask.shape[-1]
        last = torch.arange(tokens - appended, tokens, device=index.device).expand(index.shape[0], -1)
        columns = torch.cat([index.clamp(min=0), last], 1)[:, None, None]
        mask = mask.expand(batch, -1, -1, -1).gather(3, columns.expand(-1, mask.shape[1], mask.shape[2], -1))
    if not ragged:
        return mask
    return mask & filled if mask.dtype == torch.bool else mask.masked_fill(~filled, float("-inf"))
