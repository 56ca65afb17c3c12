"""Attention over packed keys and values, absorbed: the dense K and V are never built.

Per KV head h, over the segments `K ~ C_k B_k`, `V ~ C_v B_v` and the dense tail rows, in one softmax:

    scores = [ (scale q_h B_k,h^T) C_k^T ...  |  scale q_h K_tail,h^T ]
    out    =   (p_segment C_v) B_v,h + ...    +  p_tail V_tail,h

Absorbed queries are `[B, Hq * Tq, R]`: the coefficients are read once for all heads, in one product per block. The
query heads of a KV head (GQA) are rows of one product, and so are the samples that share a basis. Keys kept before
rotary embedding: `unrotated.py`. Segments of `Rows`: `coded_attention.py`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from attnpack_fx.kernels.aten import coded_attention
from attnpack_fx.kernels.aten.blocks import Factors, Stored, segments, tokens
from attnpack_fx.kernels.aten.scores import attended, capped
from attnpack_fx.kernels.aten.unrotated import scores as unrotated_scores
from attnpack_fx.kernels.parts import Angles, PackedParts, Rows
from attnpack_fx.kernels.rotary import turned_slots

#: Most bytes of one score buffer; longer queries are taken in tiles.
SCORE_BYTES = 64 << 20


def attention(
    query: Tensor,
    keys: PackedParts[Tensor],
    values: PackedParts[Tensor],
    mask: Tensor | None,
    scale: float,
    cap: float = 0.0,
    sinks: Tensor | None = None,
    weights: bool = False,
    each: int = 0,
) -> tuple[Tensor, Tensor]:
    """See `ops.attention` and `ops.attention_weights`; without `weights`, the second result means nothing.

    each: not 0: of so many of the newest queries each by itself, as in `ops_newest.attention_each`.
    """
    batch, heads, queries, key_dim = query.shape
    kv_heads, value_dim = values.tail.shape[2:]
    dtype = query.dtype
    # CPUs have no fast fp16 matrix products: convert what is read.
    work = torch.float32 if dtype == torch.float16 and query.device.type == "cpu" else dtype
    key_segments, value_segments = segments(keys, work), segments(values, work)
    packed, length = sum(map(tokens, key_segments)), keys.length
    slots = packed + length
    if slots == 0:
        rows = (1 + min(each, queries),) if each else ()
        nothing = query.new_zeros((batch, *rows, 0), dtype=torch.float32)
        return query.new_zeros((batch, heads, queries, value_dim)), nothing
    key_rows = _per_head(keys.tail, length).to(work)
    value_rows = _per_head(values.tail, values.length).to(work)
    bias = _bias(mask, keys.index, packed, length, keys.ragged, batch)
    tile = max(1, SCORE_BYTES // (4 * batch * heads * slots))
    outs, seen = [], query.new_zeros((batch, slots), dtype=torch.float32)
    newest: list[Tensor] = []
    for start in range(0, queries, tile):
        part = query if tile >= queries else query[:, :, start : start + tile]
        count = part.shape[2]
        q = (part.to(work) * scale).reshape(batch * kv_heads, -1, key_dim)
        scores, first = [], 0
        for segment in key_segments:
            scores.append(_scores(q, segment, keys.angles, first, batch))
            first += tokens(segment)
        if length:
            scores.append(torch.bmm(key_rows, q.mT).mT.reshape(batch, heads * count, length))
        p = torch.cat(scores, -1) if len(scores) > 1 else scores[0]
        p = capped(p, cap).view(batch, heads, count, slots)
        if bias is not None:
            part_bias = bias if bias.shape[2] == 1 else bias[:, :, start : start + count]
            p = p.masked_fill(~part_bias, float("-inf")) if bias.dtype == torch.bool else p + part_bias
        p = attended(p, sinks, bias is not None).to(work).view(batch, heads * count, slots)
        out = _weighted_values(p, value_segments, value_rows)
        outs.append(out.view(batch, heads, count, value_dim))
        if each:
            of_queries = p.view(batch, heads, count, slots).mean(1, dtype=torch.float32)
            older = min(count, max(0, queries - each - start))
            seen += of_queries[:, :older].sum(1)
            newest.append(of_queries[:, older:])
        elif weights:
            seen += p.sum(1, dtype=torch.float32)
    out = outs[0] if len(outs) == 1 else torch.cat(outs, 2)
    if each:
        return out.to(dtype), torch.cat([seen[:, None], *newest], 1)
    return out.to(dtype), seen / (heads * max(queries, 1))


def _per_head(tail: Tensor, length: int) -> Tensor:
    """Tail rows `[rows, B, H, D]` as `[B * H, length, D]`, by strides alone."""
    return tail[:length].flatten(1, 2).transpose(0, 1)


def _scores(q: Tensor, segment: Stored, angles: Angles[Tensor] | None, first: int, batch: int) -> Tensor:
    """Scores of the segment whose tokens are slots first, ...: q `[B * H, g * Tq, D]` -> `[B, Hq * Tq, N]`."""
    if angles is not None and first >= turned_slots(angles):
        angles = None
    if isinstance(segment, Rows):
        return coded_attention.scores(q.unflatten(0, (batch, -1)), segment, angles, first).flatten(1, 2).to(q.dtype)
    if angles is None:
        return _absorbed(q, segment)
    return unrotated_scores(q, [(0, c, basis.flatten(0, 1)) for c, basis in segment], angles, batch, first)


def _absorbed(q: Tensor, blocks: Sequence[Factors]) -> Tensor:
    """Scores of one segment: q `[B * H, g * Tq, D]` -> `[B, Hq * Tq, N]`."""
    scores = None
    for coefficient, basis in blocks:
        batch, covered, rank = coefficient.shape
        # The basis goes first: with few queries this is a matrix-vector product, which streams it twice as fast from
        # memory as the transposed product would.
        latent = torch.bmm(basis.flatten(0, 1), _rows_of(q, batch, basis).mT).mT
        part = torch.bmm(_rows_back(latent, batch, basis).reshape(batch, -1, rank), coefficient.mT)
        if scores is None:
            scores = part
        else:
            scores[:, :, :covered] += part
    assert scores is not None
    return scores


def _weighted_values(p: Tensor, values: Sequence[Stored], rows: Tensor) -> Tensor:
    """p `[B, Hq * Tq, slots]` -> `[B * H, g * Tq, Dv]`, rows `[B * H, length, Dv]`."""
    out, start = None, 0
    for segment in values:
        end = start + tokens(segment)
        if isinstance(segment, Rows):
            heads = segment.codes.shape[2]
            weights = p[:, :, start:end].unflatten(1, (heads, -1))
            part = coded_attention.weighted(weights, segment, rows.shape[2]).flatten(0, 1).to(p.dtype)
            out = part if out is None else out + part
        else:
            out = _low_rank_values(out, p[:, :, start:end], segment, rows.shape[0])
        start = end
    if rows.shape[1]:
        weights = p[:, :, start:].reshape(rows.shape[0], -1, rows.shape[1])
        out = torch.bmm(weights, rows) if out is None else torch.baddbmm(out, weights, rows)
    assert out is not None
    return out


def _low_rank_values(out: Tensor | None, p: Tensor, blocks: Sequence[Factors], rows: int) -> Tensor:
    """p `[B, Hq * Tq, N]` times the values of one segment, added to out `[B * H, g * Tq, Dv]`; rows: B * H."""
    for coefficient, basis in blocks:
        batch, covered, rank = coefficient.shape
        latent = torch.bmm(p[:, :, :covered], coefficient).view(rows, -1, rank)
        if basis.shape[0] == batch:
            flat = basis.flatten(0, 1)
            out = torch.bmm(latent, flat) if out is None else torch.baddbmm(out, latent, flat)
        else:
            part = _rows_back(torch.bmm(_rows_of(latent, batch, basis), basis[0]), batch, basis)
            out = part if out is None else out + part
    assert out is not None
    return out


def _rows_of(x: Tensor, batch: int, basis: Tensor) -> Tensor:
    """x `[B * H, rows, d]` as the basis multiplies it: `[H, B * rows, d]` where the samples share one."""
    if basis.shape[0] == batch:
        return x
    return x.unflatten(0, (batch, -1)).transpose(0, 1).flatten(1, 2)


def _rows_back(x: Tensor, batch: int, basis: Tensor) -> Tensor:
    """The inverse of `_rows_of`."""
    if basis.shape[0] == batch:
        return x
    return x.unflatten(1, (batch, -1)).transpose(0, 1).flatten(0, 1)


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
