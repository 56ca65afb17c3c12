"""How much queries attend to every token, without the `[Hq, Tq, T]` weights that say so.

Queries are taken in tiles, and only those that count: the newest `window` real ones of each sample. Scores are fp32
whatever the dtype of keys, as sums over thousands of queries would lose in half precision what a single row does not.
"""

import torch
from torch import Tensor

from attnpack_fx.kernels.aten.scores import attended, capped
from attnpack_fx.kernels.linalg import working

#: Most bytes of the scores of one tile.
SCORE_BYTES = 64 << 20

STATISTICS = ("sum", "last", "pivotal", "pivotal together")


def observe(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    statistic: str,
    window: int,
    real: Tensor | None,
    cap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """See `ops.observe`."""
    batch, heads, queries, _ = query.shape
    kv_heads, tokens = key.shape[1], key.shape[2]
    _check(queries, tokens, mask, is_causal, statistic, window)
    seen = query.new_zeros((batch, kv_heads, tokens), dtype=torch.float32)
    if queries == 0 or tokens == 0:
        return seen
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
    counted = _counted(mask, real, batch, queries)
    wanted = 1 if statistic == "last" else window or queries
    rows, valid, known = _newest(counted, min(wanted, queries), batch, queries, query.device)
    flat = key.to(working(query.dtype)).flatten(0, 1)
    tile = max(1, SCORE_BYTES // (4 * batch * heads * tokens))
    for start in range(0, rows.shape[1], tile):
        part = rows[:, start : start + tile]
        count = part.shape[1]
        # Columns that no query of the tile sees are left out where that is known without asking the device.
        reach = queries - rows.shape[1] + start + count if is_causal and known else tokens
        weigh = None if valid is None else valid[:, start : start + tile]
        p, bias = _weights(query, flat[:, :reach], mask, scale, is_causal, part, weigh, cap, sinks)
        if statistic.startswith("pivotal"):
            found = _pivotal(p, bias, reach, statistic == "pivotal together")
            if weigh is not None:
                found &= weigh[:, None, :, None]
            seen[..., :reach] += found.sum(2)
        else:
            share = p.new_full((batch, count), kv_heads / heads)
            if weigh is not None:
                share = share * weigh
            share = share[:, None, None].expand(batch, kv_heads, heads // kv_heads, count)
            summed = torch.bmm(share.reshape(batch * kv_heads, 1, -1), p.view(batch * kv_heads, -1, reach))
            seen[..., :reach] += summed.view(batch, kv_heads, reach)
    return seen


def observe_newest(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    pivotal: bool,
    together: bool,
    newest: int,
    cap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """See `ops_newest.observe_newest`; newest: the most queries."""
    batch, heads, queries, _ = query.shape
    kv_heads, tokens = key.shape[1], key.shape[2]
    _check(queries, tokens, mask, is_causal, STATISTICS[0], 0)
    rows = min(newest, queries)
    seen = query.new_zeros((batch, 1 if together else kv_heads, rows, tokens), dtype=torch.float32)
    if rows == 0:
        return seen
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
    counted = _counted(mask, None, batch, queries)
    flat = key.to(working(query.dtype)).flatten(0, 1)
    tile = max(1, SCORE_BYTES // (4 * batch * heads * tokens))
    for start in range(queries - rows, queries, tile):
        end = min(start + tile, queries)
        part = torch.arange(start, end, device=query.device).expand(batch, -1)
        weigh = None if counted is None else counted[:, start:end]
        p, bias = _weights(query, flat, mask, scale, is_causal, part, weigh, cap, sinks)
        found = (
            _pivotal(p, bias, tokens, together) if pivotal else p.mean((1, 2)).unsqueeze(1) if together else p.mean(2)
        )
        if weigh is not None:
            found = found * weigh[:, None, :, None]
        seen[:, :, start - queries + rows : end - queries + rows] = found
    return seen


def _weights(
    query: Tensor,
    flat: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    rows: Tensor,
    weigh: Tensor | None,
    cap: float,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """What the queries numbered rows `[B, count]` give the keys `[B * H, reach, D]`: `[B, H, g, count, reach]`.

    And the mask of them. weigh: bool, which of them are any; what others give means nothing.
    """
    (batch, heads, _, dim), (count, reach) = query.shape, (rows.shape[1], flat.shape[1])
    kv_heads = flat.shape[0] // batch
    q = query.gather(2, rows[:, None, :, None].expand(batch, heads, count, dim)).to(flat.dtype)
    if weigh is not None:
        q = q.masked_fill(~weigh[:, None, :, None], 0)  # padding may hold anything, NaN too
    scores = capped(torch.bmm(q.view(batch * kv_heads, -1, dim), flat.mT).mul_(scale), cap)
    scores = scores.view(batch, kv_heads, heads // kv_heads, count, reach)
    bias = _bias(mask, rows, is_causal, reach, kv_heads)
    if bias is not None:
        scores = scores.masked_fill_(~bias, float("-inf")) if bias.dtype == torch.bool else scores.add_(bias)
    return attended(scores.flatten(1, 2), sinks, bias is not None).view_as(scores), bias


def _check(queries: int, tokens: int, mask: Tensor | None, is_causal: bool, statistic: str, window: int) -> None:
    if statistic not in STATISTICS:
        raise ValueError(f"statistic is {statistic!r}, expected one of {STATISTICS}")
    if window < 0:
        raise ValueError(f"window is {window}, expected the number of queries that count, or 0 for all")
    if queries > tokens:
        raise ValueError(f"there are {queries} queries and {tokens} keys; queries must be those of the last keys")
    if is_causal and (mask is not None or queries != tokens):
        got = "a mask" if mask is not None else f"{queries} queries of {tokens} keys"
        raise ValueError(f"is_causal with {got}: give is_causal alone and as many queries as keys, or a mask alone")


def out_of_sight(mask: Tensor) -> Tensor:
    """Where a mask lets no query look: False, or so low that it stands for -inf, as its dtype's lowest number does."""
    return ~mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min / 2


def _counted(mask: Tensor | None, real: Tensor | None, batch: int, queries: int) -> Tensor | None:
    """Which queries count, bool `[B, Tq]`; None for all."""
    counted = None
    if real is not None:
        counted = real[:, real.shape[1] - queries :].expand(batch, queries)
    if mask is not None:
        best = mask.any(-1) if mask.dtype == torch.bool else mask.amax(-1)
        looks = (~out_of_sight(best)).any(1).expand(batch, queries)
        counted = looks if counted is None else counted & looks
    return counted


def _newest(
    counted: Tensor | None, wanted: int, batch: int, queries: int, device: torch.device
) -> tuple[Tensor, Tensor | None, bool]:
    """The newest `wanted` queries that count: numbers int64 `[B, wanted]`, which of them are any (None: all).

    And whether they are simply the last ones, in order.
    """
    last = torch.arange(queries, device=device)
    if counted is None or wanted == queries:
        return last[queries - wanted :].expand(batch, -1), counted, True
    rows = torch.where(counted, last, -1).topk(wanted).values
    return rows.clamp(min=0), rows >= 0, False


def _bias(mask: Tensor | None, rows: Tensor, is_causal: bool, reach: int, kv_heads: int) -> Tensor | None:
    """The mask of these rows, `[B or 1, H or 1, g or 1, count or 1, reach or 1]`."""
    if is_causal:
        return (torch.arange(reach, device=rows.device) <= rows[..., None])[:, None, None]
    if mask is None:
        return None
    if mask.shape[2] > 1:
        batch, heads, _, columns = rows.shape[0], *mask.shape[1:]
        mask = mask.expand(batch, -1, -1, -1)
        mask = mask.gather(2, rows[:, None, :, None].expand(batch, heads, rows.shape[1], columns))
    return mask[:, :, None] if mask.shape[1] == 1 else mask.unflatten(1, (kv_heads, -1))


def _pivotal(weights: Tensor, bias: Tensor | None, reach: int, together: bool) -> Tensor:
    """`A >= 1 / t`, t the tokens in sight of any query head of the KV head; together: of the KV head that sees most.

    weights: `[B, H, g, count, T]`; result `[B, H, count, T]`, or together `[B, 1, count, T]`.
    """
    weights = weights.mean((1, 2)).unsqueeze(1) if together else weights.mean(2)
    if bias is None:
        return weights >= 1 / reach
    sight = (~out_of_sight(bias)).any(2).expand(-1, -1, -1, reach)
    count = sight.sum(-1, keepdim=True)
    if together:
        sight, count = sight.any(1, keepdim=True), count.amax(1, keepdim=True)
    return (weights >= count.to(weights.dtype).reciprocal()) & sight
